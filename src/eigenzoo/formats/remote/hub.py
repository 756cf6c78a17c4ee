"""Models and bundles of the Hugging Face hub by their ids, downloaded whole into huggingface_hub's own cache.

A revision becomes a commit first; one listing of that commit, which the cache keeps, says which files a model has that are
read here; and only those are downloaded. What has been downloaded is checked against its hash, once. So a second run asks for
the commit and for nothing else, and a run without a network asks for nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from eigenzoo.errors import EigenzooError, FormatError, UnsupportedError
from eigenzoo.formats.remote.hub_calls import persist
from eigenzoo.formats.remote.hub_files import HubModel, find_in_tree, needed_files
from eigenzoo.formats.remote.hub_id import HubId
from eigenzoo.formats.remote.retrying import Stopped, side_by_side
from eigenzoo.formats.side_files import tell_left
from eigenzoo.records import Progress, no_progress

MAX_DOWNLOADS = 8
"""Files that are downloaded side by side, as in huggingface_hub."""


FIRST_FILES = ["README.md", ".gitattributes"]


@dataclass(frozen=True)
class Commit:
    """A commit of a repository: where the cache has its files, and how many bytes each file has."""

    hub_id: HubId
    folder: Path
    sizes: Mapping[str, int]


def find_commit(hub_id: HubId, stopped: Event | None = None) -> Commit:
    """Resolve the revision of an id to a commit, and list it; without a network both come from the cache.

    When `stopped` is set it ends, in Stopped, before its next attempt.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    api, offline = HfApi(), constants.is_offline_mode()

    resolved = persist(
        lambda: api.resolve_revision(hub_id.repo, revision=hub_id.revision, local_files_only=offline),
        hub_id,
        local_too=True,
        stopped=stopped,
    )
    pinned = replace(hub_id, revision=resolved.resolved)
    # This call keeps the listing in the cache; that of a commit is asked for once.
    folder = persist(
        lambda: snapshot_download(
            hub_id.repo, revision=resolved, allow_patterns=FIRST_FILES, tqdm_class=_hidden_bar(lambda _: None)
        ),
        hub_id,
        stopped=stopped,
    )
    sizes = persist(partial(_list, api, pinned), hub_id, stopped=stopped)
    return Commit(pinned, Path(folder), sizes)


def _list(api: Any, hub_id: HubId) -> dict[str, int]:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        entries = get_cached_repo_tree(hub_id.repo, revision=hub_id.revision)
    except CachedRepoTreeNotFoundError:  # a cache that cannot be written to
        entries = api.list_repo_tree(hub_id.repo, recursive=True, revision=hub_id.revision)
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


def find_hub_models(
    hub_id: HubId,
    max_depth: int,
    *,
    allow_pickle: bool = False,
    allow_missing: bool = False,
    progress: Progress = no_progress,
    stopped: Event | None = None,
) -> list[tuple[Path, EigenzooError | None]]:
    """Download the models that an id names, by the rules for folders; returns their paths, and why one cannot be read.

    Args:
        hub_id: a repository, or a folder in it, that is a model or contains models.
        max_depth: how many folders deep models are looked for.
        allow_pickle: download pickles too.
        allow_missing: go on where a file cannot be had, which is then its model's error; else it is raised at once.
        progress: told of the bytes that are downloaded.
        stopped: ends all of it, in Stopped, when it is set.
    """
    stopped = stopped or Event()
    commit = find_commit(hub_id, stopped)
    models = find_in_tree(commit.sizes, hub_id.folder, max_depth, str(hub_id))
    paths: list[tuple[Path, EigenzooError | None]] = []
    wanted: list[HubModel] = []
    for model in models:
        error = _refused(model, commit, allow_pickle)
        wanted += [] if error else [model]
        paths.append((commit.folder / model.path, error))
    files = {name for model in wanted for name in model.files}
    errors = download(commit, files, progress, keep_going=allow_missing, stopped=stopped)
    shards: dict[int, set[str]] = {}
    for number, (path, error) in enumerate(paths):
        error = error or _first_of(models[number].files, errors)
        if error is None:
            try:
                shards[number] = needed_files(models[number], commit.folder, commit.sizes)
            except FormatError as fault:
                error = fault.at(f"{commit.hub_id}/{models[number].path}".rstrip("/"))
        paths[number] = (path, error)
    errors = download(commit, set().union(*shards.values()), progress, keep_going=allow_missing, stopped=stopped)
    for number, names in shards.items():
        model, prefix = models[number], f"{models[number].path}/" if models[number].path else ""
        tell_left(commit.folder / model.path, (name for name in model.left if prefix + name not in names))
        paths[number] = (paths[number][0], _first_of(names, errors))
    return paths


def _first_of(names: Iterable[str], errors: Mapping[str, EigenzooError]) -> EigenzooError | None:
    return next((errors[name] for name in sorted(names) if name in errors), None)


def fetch_model(hub_id: HubId, *, allow_pickle: bool = False) -> Path:
    """Download the one model that an id names; returns the path that opens it."""
    paths = find_hub_models(hub_id, 0, allow_pickle=allow_pickle)
    if not paths:
        raise FormatError(
            "there is no model here", where=str(hub_id), rule="a model is a repository or a folder of a repository"
        )
    path, error = paths[0]
    if error is not None:
        raise error
    return path


def _refused(model: HubModel, commit: Commit, allow_pickle: bool) -> EigenzooError | None:
    where = f"{commit.hub_id.repo}/{model.path}".rstrip("/.")
    if model.error is not None:
        return model.error.at(where)
    if model.is_pickled and not allow_pickle:
        return UnsupportedError(
            "the weights are a Python pickle",
            where=where,
            rule="pickles can run code and are downloaded only with permission",
            next_step="pass --allow-pickle (allow_pickle=True), or ask its author for safetensors",
        )
    return None


def download(
    commit: Commit,
    names: Iterable[str],
    progress: Progress = no_progress,
    *,
    keep_going: bool = False,
    stopped: Event | None = None,
) -> dict[str, EigenzooError]:
    """Download those files of a commit that the cache has not, several at once, and check each against its hash.

    Raises the first error, and ends the other downloads; with `keep_going` returns each file's, and gets all that can be had.
    """
    missing = sorted(name for name in set(names) if not (commit.folder / name).exists())
    if not missing:
        return {}
    total, done, ended = sum(commit.sizes[name] for name in missing), 0, stopped or Event()

    def count(num_bytes: float) -> None:
        nonlocal done
        if ended.is_set():
            raise Stopped
        done += int(num_bytes)
        progress(f"downloading {commit.hub_id.repo}", min(done, total), total)

    bar = _hidden_bar(count)

    def fetch(name: str) -> EigenzooError | None:
        try:
            _download(commit, name, bar, ended)
        except EigenzooError as error:
            if not keep_going:
                raise
            return error
        return None

    errors = side_by_side([partial(fetch, name) for name in missing], MAX_DOWNLOADS, ended)
    return {name: error for name, error in zip(missing, errors, strict=True) if error is not None}


def _download(commit: Commit, name: str, bar: type[Any], stopped: Event) -> None:
    from huggingface_hub import hf_hub_download

    def call() -> None:
        path = hf_hub_download(commit.hub_id.repo, name, revision=commit.hub_id.revision, tqdm_class=bar)
        _check(Path(path), commit.sizes[name], name)

    persist(call, commit.hub_id, stopped=stopped)


def _check(path: Path, size: int, name: str) -> None:
    """Check a file that was just downloaded; what is wrong is taken out of the cache again, and raises OSError."""
    actual_size = path.stat().st_size
    fault = (
        f"{name} has {actual_size} bytes, its listing says {size}" if actual_size != size else _hash_fault(path, name)
    )
    if fault:
        blob = path.parent / os.readlink(path) if path.is_symlink() else None
        path.unlink()
        if blob is not None:
            blob.unlink(missing_ok=True)
        raise OSError(fault)


def _hash_fault(path: Path, name: str) -> str:
    """Say what is wrong with a file of the cache, whose blob is named by its hash: SHA-256, or git's own of small files."""
    expected = Path(os.readlink(path)).name if path.is_symlink() else ""
    if len(expected) not in (40, 64) or not set(expected) <= set("0123456789abcdef"):
        return ""
    with path.open("rb") as file:
        if len(expected) == 64:
            hashes = {hashlib.file_digest(file, "sha256").hexdigest()}
        else:
            data = file.read()
            # Some stores in the hub's place answer with the SHA-1 of the bytes alone.
            hashes = {hashlib.sha1(head + data).hexdigest() for head in (b"blob %d\0" % len(data), b"")}
    return "" if expected in hashes else f"{name} does not have the hash that the hub states"


def stored_sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file in the hub's cache where its blob is named by it, which was checked when it came."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if len(name) == 64 else None


def _hidden_bar(count: Callable[[float], None]) -> type[Any]:
    """Return a class of progress bars that are not drawn, and hand on what they are told."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """A bar that nobody sees."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, num: float | None = 1) -> None:
            """Count."""
            count(num or 0)

    return Bar
