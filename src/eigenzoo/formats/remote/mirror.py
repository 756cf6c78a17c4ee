"""Mirrors: remote models as local folders whose weights are headers and holes.

A mirror lies in `remote/<hash of the URL>/<hash of sizes and tags>/<name>`, and is never changed: a model whose files are
others by now has another folder. Opening a model again costs its listing and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from eigenzoo.errors import EigenzooError, FormatError, OutputError, UnsupportedError
from eigenzoo.formats.cache_folder import VARIABLE
from eigenzoo.formats.json_file import MAX_CONFIG_BYTES, parse_json
from eigenzoo.formats.kinds import INDEXES, kind_of_file, kind_of_folder, refuse_unreadable
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.lora.mlx_folder import MLX_FILE
from eigenzoo.formats.lora.peft_folder import PICKLE_FILE as PICKLED_ADAPTER
from eigenzoo.formats.lora.peft_folder import WEIGHTS_FILE
from eigenzoo.formats.paths import MAX_SIDE_BYTES, relative_name
from eigenzoo.formats.remote.address import shown_url
from eigenzoo.formats.remote.fetching import Request, fetch_each
from eigenzoo.formats.remote.hub_id import use_of_bundle
from eigenzoo.formats.remote.listing import Entry as Listed
from eigenzoo.formats.remote.listing import Folder, list_urls
from eigenzoo.formats.remote.record import Entry, mirror_folder, read_record, remember, write_record
from eigenzoo.formats.remote.retrying import Call, run_jobs
from eigenzoo.formats.remote.source import UNKNOWN, RemoteFile, fresh_info, tag_of
from eigenzoo.formats.safetensors.header import MAX_HEADER_BYTES
from eigenzoo.formats.side_files import CONFIG, SIDE_FILES, is_carried_from, is_side_file, tell_left
from eigenzoo.formats.stand_ins import START_BYTES
from eigenzoo.formats.tree import is_bundle
from eigenzoo.records import Progress, no_progress

FIRST_BYTES = 2**15
"""What is read of a weights file at first: its header's length, and most headers whole."""

SMALL_BYTES = 2**17
"""Side files up to this size are downloaded with the headers; a larger one (a tokenizer) when it is asked for."""

GROUP = 128
"""How many models are mirrored at once: what is held until they are written is bounded by that."""

NEEDED = frozenset({CONFIG, CONFIG_FILE, *INDEXES})
"""Side files that a model is opened by."""

MODEL_DEPTH = 2
"""Folders that are listed for one model: its own, and one that its index may name."""


@dataclass
class _Plan:
    """One model on its way into the cache: its files, what was fetched of them, and where it will lie."""

    listed: Listed
    kind: str | None
    files: dict[str, RemoteFile]
    stored: dict[str, bytes] = field(default_factory=dict)
    error: EigenzooError | None = None

    @property
    def url(self) -> str:
        return self.listed.url

    @cached_property
    def folder(self) -> Path:
        """The mirror of a folder; for a single file, the folder that it will lie in."""
        version = json.dumps(sorted([name, file.size, file.tag] for name, file in self.files.items()))
        source = self.listed.address.source if isinstance(self.listed, Folder) else self.listed.source
        # What a query says may choose the file: two signed URLs of one path are two places.
        text_of_url = self.url if shown_url(source) == source else f"{source} {self.url}"
        hashes = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in (text_of_url, version)]
        root = mirror_folder() / hashes[0] / hashes[1]
        return root / _local_name(self.listed) if isinstance(self.listed, Folder) else root

    @property
    def path(self) -> Path:
        """The path that the model is opened by."""
        return self.folder if isinstance(self.listed, Folder) else self.folder / next(iter(self.files))

    def weights(self) -> Iterator[str]:
        """Names of the files whose headers are read."""
        for name in self.files:
            if name in (WEIGHTS_FILE, MLX_FILE) or (self.kind != "adapter" and name.endswith(".safetensors")):
                yield name


def mirror_url(url: str) -> Path:
    """Mirror the one model at a URL, a folder or a file; returns the path that opens it."""
    (folder,) = list_urls([url], [MODEL_DEPTH])
    if isinstance(folder, EigenzooError):
        raise folder
    if isinstance(folder, Folder) and not folder.entries:
        raise FormatError("there is no model here: nothing of this name exists", where=shown_url(url))
    if is_bundle(folder):
        raise FormatError(
            "this is a bundle, not a zoo or a model",
            where=shown_url(url),
            rule="bundles are not read from URLs",
            next_step=use_of_bundle(url),
        )
    (path,) = mirror_models([folder])
    if isinstance(path, EigenzooError):
        raise path
    return path


def mirror_models(models: Sequence[Listed], progress: Progress = no_progress) -> list[Path | EigenzooError]:
    """Mirror listed models, many at once; returns the path that opens each one, or why it cannot be."""
    paths: list[Path | EigenzooError] = []
    for start in range(0, len(models), GROUP):
        plans = [_plan(model) for model in models[start : start + GROUP]]
        _learn_sizes(plans)
        wanted = [plan for plan in plans if plan.error is None and not _is_mirrored(plan)]
        _fetch_side_files(wanted)
        _fetch_headers(wanted)
        for plan in wanted:
            if plan.error is None:
                _write(plan)
        paths += [plan.error or _remembered(plan) for plan in plans]
        progress("reading headers", len(paths), len(models))
    return paths


def _plan(listed: Listed) -> _Plan:
    """Decide by names what a model is and which of its files matter."""
    try:
        if isinstance(listed, RemoteFile):
            name = relative_name(listed.url.partition("::")[0].rpartition("/")[2])
            plan = _Plan(listed, kind_of_file(name), {name: listed})
        else:
            relative_name(_local_name(listed))
            files = {name: entry for name, entry in listed.entries.items() if isinstance(entry, RemoteFile)}
            plan = _Plan(listed, kind_of_folder(set(files)), files)
            matter = {*NEEDED, *SIDE_FILES, *plan.weights()}
            plan.files = {name: file for name, file in files.items() if name in matter}
            inner = _inner_files(listed)
            plan.files |= {name: file for name, file in inner.items() if is_carried_from(name, files)}
            if plan.kind == "checkpoint" and any(name in files for name in INDEXES):
                plan.files |= {name: file for name, file in inner.items() if name.endswith(".safetensors")}
        _refuse(plan)
    except FormatError as error:
        return _Plan(listed, None, {}, error=error)
    return plan


def _local_name(folder: Folder) -> str:
    return folder.last_name.replace(":", "_") or "root"


def _inner_files(folder: Folder) -> dict[str, RemoteFile]:
    """Files in the folders of a model, by their names from it: there its index may place shards, and modules lie there."""
    return {
        f"{inner.last_name}/{name}": entry
        for inner in folder.entries.values()
        if isinstance(inner, Folder)
        for name, entry in inner.entries.items()
        if isinstance(entry, RemoteFile)
    }


def _refuse(plan: _Plan) -> None:
    names = plan.listed.entries if isinstance(plan.listed, Folder) else plan.files
    refuse_unreadable(plan.kind, names, plan.url)
    if plan.kind == "pickle" or (plan.kind == "adapter" and WEIGHTS_FILE not in names and PICKLED_ADAPTER in names):
        raise UnsupportedError(
            "the weights are a Python pickle at a URL",
            where=plan.url,
            rule="pickles can run code and are read only from this machine, with permission",
            next_step="download it and pass --allow-pickle (allow_pickle=True), or convert it to safetensors",
        )
    if plan.kind == "pipeline":
        raise UnsupportedError(
            "this is a diffusers pipeline at a URL",
            where=plan.url,
            rule="only single components of a pipeline are read from URLs",
            next_step=f"name the folder of a component ({plan.url}/unet), or download the pipeline",
        )
    if plan.kind is None:
        raise FormatError(
            "there is no model here", where=plan.url, rule="only safetensors models and adapters are read from URLs"
        )


def _learn_sizes(plans: Sequence[_Plan]) -> None:
    """Ask for the sizes that a listing did not tell (of plain web servers), then check those of side files."""
    asked = [(plan, name) for plan in plans for name, file in plan.files.items() if file.size == UNKNOWN]
    calls = [Call(plan.files[name].url, partial(fresh_info, plan.files[name])) for plan, name in asked]
    for (plan, name), call, error in zip(asked, calls, run_jobs(calls), strict=True):
        size = call.value.get("size") if call.value else None
        if size is None:
            plan.error = plan.error or error or FormatError("its store does not state its size", where=call.url)
        else:
            plan.files[name] = replace(plan.files[name], size=int(size), tag=tag_of(call.value))
    for plan in plans:
        for name, file in plan.files.items():
            limit = MAX_CONFIG_BYTES if name in NEEDED else MAX_SIDE_BYTES
            if not name.endswith(".safetensors") and file.size > limit:
                plan.error = plan.error or FormatError(
                    f"{name!r} has {file.size} bytes", where=plan.url, rule=f"such a file has at most {limit} bytes"
                )


def _is_mirrored(plan: _Plan) -> bool:
    """Tell whether the mirror is there, whole and undamaged."""
    try:
        for folder, names in _by_folder(plan).items():
            record = read_record(plan.folder / folder)
            if record is None:
                return False
            entries = record[1]
            for name in names:
                base = name.rpartition("/")[2]
                if base in entries and not _is_sound(plan.folder / name, entries[base], plan.files[name]):
                    return False
        return True
    except FormatError:
        return False


def _is_sound(path: Path, entry: Entry, file: RemoteFile) -> bool:
    try:
        status = path.stat()
        with path.open("rb") as stream:
            stored = stream.read(entry.stored)
    except OSError:
        return False
    return (
        (status.st_size, status.st_mtime_ns) == (file.size, _mtime_ns(file))
        and len(stored) == entry.stored
        and hashlib.sha256(stored).hexdigest() == entry.sha256
    )


def _by_folder(plan: _Plan) -> dict[str, list[str]]:
    """Group a plan's names by the folder of the mirror that they lie in."""
    folders: dict[str, list[str]] = {"": []}
    for name in plan.files:
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    return folders


def _fetch_side_files(plans: Sequence[_Plan]) -> None:
    wanted = [
        (plan, name, file.size)
        for plan in plans
        for name, file in plan.files.items()
        if not name.endswith(".safetensors") and (name in NEEDED or file.size <= SMALL_BYTES)
    ]
    _fetch_first(wanted)
    for plan in plans:
        _keep_shards(plan)


def _keep_shards(plan: _Plan) -> None:
    """Of the folders of a checkpoint, keep the shards that its index names; what is wrong with one is its reader's to say."""
    inner = [name for name in plan.files if "/" in name and not is_side_file(name)]
    if not inner:
        return
    named: set[str] = set()
    for index in INDEXES:
        try:
            shards = parse_json(plan.stored.get(index, b"{}"), where=index).get("weight_map")
        except FormatError:
            continue
        named |= {shard for shard in shards.values() if isinstance(shard, str)} if isinstance(shards, dict) else set()
    for name in inner:
        if name not in named:
            plan.stored[name] = b""  # listed, so that the version stays the same; never written


def _fetch_headers(plans: Sequence[_Plan]) -> None:
    """Fetch the first bytes of all weights, then what their headers have besides; a length beyond reason is not followed."""
    files = [(plan, name) for plan in plans for name in plan.weights() if name not in plan.stored]
    _fetch_first([(plan, name, min(plan.files[name].size, FIRST_BYTES)) for plan, name in files])
    longer = []
    for plan, name in files:
        stored = plan.stored.get(name, b"")
        end = 8 + int.from_bytes(stored[:8], "little")
        if len(stored) < 8 or end > min(plan.files[name].size, 8 + MAX_HEADER_BYTES):
            end = min(len(stored), START_BYTES)  # what is wrong with it is its reader's to say
        plan.stored[name] = stored[:end]
        longer.append((plan, name, min(end, plan.files[name].size)))
    _fetch_first(longer)


def _fetch_first(wanted: Sequence[tuple[_Plan, str, int]]) -> None:
    """Fetch the bytes of files up to an end, from where what is held of them stops."""
    unread = [(plan, name, end) for plan, name, end in wanted if plan.error is None]
    starts = [len(plan.stored.get(name, b"")) for plan, name, _ in unread]
    buffers = [bytearray(end - start) for (_, _, end), start in zip(unread, starts, strict=True)]
    requests: list[Request] = [
        (plan.files[name], start, memoryview(buffer))
        for (plan, name, _), start, buffer in zip(unread, starts, buffers, strict=True)
    ]
    for (plan, name, _), buffer, error in zip(unread, buffers, fetch_each(requests), strict=True):
        plan.error = plan.error or error
        plan.stored[name] = plan.stored.get(name, b"") + bytes(buffer)


def _write(plan: _Plan) -> None:
    """Write a mirror beside its place and rename it; another process may have been faster, which is as good."""
    target = plan.folder
    staging = target.parent / f".tmp-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        try:
            _fill(staging, plan)
            if target.exists() and not _is_mirrored(plan):
                damaged = target.parent / f"{staging.name}-old"
                target.rename(damaged)
                shutil.rmtree(damaged)
            if not target.exists():
                staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if not _is_mirrored(plan):
            plan.error = OutputError(
                f"the mirror cannot be written ({error.strerror})",
                where=f"{plan.url}, {target}",
                next_step=f"set {VARIABLE} to a folder that can be written, or to off",
            )


def _fill(root: Path, plan: _Plan) -> None:
    url = plan.url if isinstance(plan.listed, Folder) else plan.url.rpartition("/")[0]
    for folder, names in _by_folder(plan).items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        entries = {}
        for name in names:
            if "/" in name and not plan.stored.get(name):
                continue
            stored = plan.stored.get(name, b"")
            file = plan.files[name]
            with (root / name).open("xb") as stream:
                stream.write(stored)
                stream.truncate(file.size)
            os.utime(root / name, ns=(_mtime_ns(file), _mtime_ns(file)))
            entries[name.rpartition("/")[2]] = Entry(file, len(stored), hashlib.sha256(stored).hexdigest())
        write_record(root / folder, f"{url}/{folder}".rstrip("/") if folder else url, entries)


def _mtime_ns(file: RemoteFile) -> int:
    """A time that goes with the file's tag and size: a stub's size and time then identify the remote file's contents.

    Whole even seconds after the year 2000, which every file system can keep.
    """
    digest = hashlib.sha256(f"{file.size} {file.tag}".encode()).digest()
    return (946_684_800 + 2 * (int.from_bytes(digest[:4], "big") % 400_000_000)) * 10**9


def _remembered(plan: _Plan) -> Path:
    """Tell this process which of the mirror's files are stubs, and give the path that opens the model."""
    for folder, names in _by_folder(plan).items():
        record = read_record(plan.folder / folder)
        for name in names:
            entry = record[1].get(name.rpartition("/")[2]) if record else None
            if entry is not None and entry.stored < plan.files[name].size:
                remember(plan.folder / name, plan.files[name])
    if isinstance(plan.listed, Folder):
        files = {name for name, entry in plan.listed.entries.items() if isinstance(entry, RemoteFile)}
        tell_left(plan.folder, {*files, *_inner_files(plan.listed)} - plan.files.keys())
    return plan.path
