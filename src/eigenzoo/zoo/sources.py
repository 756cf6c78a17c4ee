"""Resolve a user's source (folder, glob, list, text file, URL) to the paths of models."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import TypeVar

from eigenzoo.display import natural_order
from eigenzoo.errors import EigenzooError, FormatError, UnsupportedError, ZooError
from eigenzoo.formats.kinds import FILE_SUFFIXES, USE_OF_BUNDLE, weights_stem
from eigenzoo.formats.opening import whole_model
from eigenzoo.formats.paths import did_you_mean, read_bounded
from eigenzoo.formats.remote import is_url, source_url
from eigenzoo.formats.remote.address import local_path, shown_url, split_glob
from eigenzoo.formats.remote.hub import find_hub_models
from eigenzoo.formats.remote.hub_id import HubId, find_id, hub_name, parse_id, use_of_bundle
from eigenzoo.formats.remote.listing import Entry, Folder, list_urls
from eigenzoo.formats.remote.mirror import MODEL_DEPTH, mirror_models
from eigenzoo.formats.remote.retrying import Stopped, side_by_side
from eigenzoo.formats.tree import (
    MAX_IN_LISTS,
    Budget,
    Disk,
    is_bundle,
    is_folder,
    is_model,
    models_at,
    models_matching,
    split_pattern,
)
from eigenzoo.records import Progress, no_progress

M = TypeVar("M")

Source = str | os.PathLike[str] | Iterable["str | os.PathLike[str]"]

MAX_DEPTH = 3
"""How many folders deep models are looked for: deep enough for run/checkpoint/adapter, and never a whole disk."""

MAX_LIST_BYTES, MAX_LINES = 16 * 2**20, 100_000
"""Of a text file of paths."""


MAX_REPOSITORIES = 4
"""Repositories of the hub that are asked and downloaded side by side, each with several files at once."""


@dataclass(frozen=True)
class Unreadable:
    """A remote model that cannot be read, and why."""

    name: str
    error: EigenzooError


def find_models(
    source: Source, progress: Progress = no_progress, *, allow_pickle: bool = False, allow_missing: bool = False
) -> list[Path | Unreadable]:
    """Return the paths of the models that a source names, each once, in the order given; folders and globs by name.

    A folder that is a model is that model; otherwise it holds models, down to `MAX_DEPTH`. Names that begin with `.` or
    `_` are not looked at in folders and globs: the nursery keeps a zoo's parent there. A URL is listed by the same rules,
    and its models are mirrored: the path is that of the mirror. So is an id of the hub, whose models are downloaded into the
    hub's cache; with `allow_missing` a file that cannot be had does not end the others' downloads.
    """
    return list(look_for_models(source, progress, allow_pickle=allow_pickle, allow_missing=allow_missing).models)


@dataclass(frozen=True)
class FoundModels:
    """The models that a source names.

    Attributes:
        models: their paths, or why one cannot be read.
        hidden: models on this machine that were passed over for their names, which begin with `.` or `_`.
    """

    models: tuple[Path | Unreadable, ...]
    hidden: tuple[Path, ...]


def look_for_models(
    source: Source, progress: Progress = no_progress, *, allow_pickle: bool = False, allow_missing: bool = False
) -> FoundModels:
    """Find the models that a source names, and those that were passed over; see `find_models`."""
    lists = _Lists()
    try:
        every = _expand(source, lists)
    except UnicodeDecodeError as error:
        raise ZooError("a list of models is not UTF-8 text", where=shown_source(source)) from error
    # The weights of an adapter with their config beside them are the adapter: named by folder or by file, it is one model.
    sources = list(dict.fromkeys(whole_model(item) if isinstance(item, Path) else item for item in every))
    # An invalid URL is reported before gigabytes are downloaded for the ids beside it.
    urls = [item for item in sources if isinstance(item, str)]
    listed = _listed(urls)
    models = _mirrored(_downloaded(sources, allow_pickle, allow_missing, progress), listed, progress)
    return FoundModels(tuple(_some(models, source)), tuple(dict.fromkeys(lists.hidden)))


def _some(models: list[M], source: Source, hidden: Sequence[Path] = ()) -> list[M]:
    """Raise ZooError if a source names no model. Beside other sources this would go unnoticed."""
    if not models and hidden:
        raise ZooError(
            f"the only model there is {hidden[0].name!r}, whose name begins with {hidden[0].name[0]!r}",
            where=shown_source(source),
            rule="folders and globs skip such names, so that a zoo's parent can be stored there",
            next_step=f"name it directly: {hidden[0]}",
        )
    if not models:
        raise ZooError(
            "no model was found",
            where=shown_source(source),
            rule="a zoo is a folder of models, a glob, a list, a .txt file of paths, URLs of these, or ids of the hub",
            next_step="a folder is searched three folders deep; if the models are deeper, name the folder that contains them",
        )
    return models


def shown_source(source: Source) -> str:
    """Say what a user named, without the secrets of URLs."""
    if isinstance(source, list | tuple):
        return repr([shown_url(item) if isinstance(item, str) else item for item in source])
    return repr(shown_url(source) if isinstance(source, str) else source)


def _downloaded(
    sources: Sequence[Path | str | HubId], allow_pickle: bool, allow_missing: bool, progress: Progress
) -> list[Path | str | Unreadable]:
    """Replace hub ids by their models."""
    hub_ids = list(dict.fromkeys(item for item in sources if isinstance(item, HubId)))
    if not hub_ids:
        return [item for item in sources if not isinstance(item, HubId)]
    stopped = Event()

    def telling(stage: str, done: int, total: int) -> None:
        if stopped.is_set():
            raise Stopped
        progress(stage, done, total)

    find = partial(
        find_hub_models,
        max_depth=MAX_DEPTH,
        allow_pickle=allow_pickle,
        allow_missing=allow_missing,
        progress=telling,
        stopped=stopped,
    )
    listed = side_by_side([partial(find, hub_id) for hub_id in hub_ids], MAX_REPOSITORIES, stopped)
    models = dict(zip(hub_ids, listed, strict=True))
    items: list[Path | str | Unreadable] = []
    for item in sources:
        if not isinstance(item, HubId):
            items.append(item)
            continue
        for path, error in models[item]:
            items.append(path if error is None else Unreadable(hub_name(path) or path.name, error))
    return items


def _mirrored(
    sources: Sequence[Path | str | Unreadable], listed: Mapping[str, Sequence[Entry]], progress: Progress
) -> list[Path | Unreadable]:
    """Replace URLs by the mirrors of their models."""
    paths = iter(mirror_models([model for models in listed.values() for model in models], progress))
    models: list[Path | Unreadable] = []
    for item in sources:
        if not isinstance(item, str):
            models.append(item)
            continue
        for model in listed[item]:
            path = next(paths)
            models.append(Unreadable(_last_name(model), path) if isinstance(path, EigenzooError) else path)
    return list(dict.fromkeys(models))


@dataclass
class _Lists:
    """The text files that are being read (one within another), those already read, the skipped models, and how many names the
    lists may still look at."""

    within: tuple[Path, ...] = ()
    read: set[Path] = field(default_factory=set)
    hidden: list[Path] = field(default_factory=list)
    names: Budget = field(default_factory=lambda: Budget(MAX_IN_LISTS))

    @property
    def budget(self) -> Budget | None:
        """What the line of a list takes names from; what a user names has no limit."""
        return self.names if self.within else None


def _expand(source: Source | HubId, lists: _Lists) -> list[Path | str | HubId]:
    if isinstance(source, HubId):
        return [source]
    if not isinstance(source, str | os.PathLike):
        return [path for item in source for path in _expand(item, lists)]
    if isinstance(source, str):
        if is_url(source):
            return [source]
        if (hub_id := find_id(source)) is not None:
            return [hub_id]
        source = local_path(source)
    path = Path(source)
    if os.path.isdir(path):
        folder = Disk(str(path), budget=lists.budget)
        if is_bundle(folder):
            raise ZooError(
                "this is a bundle, not a zoo or a model",
                where=str(path),
                next_step=USE_OF_BUNDLE,
            )
        models = models_at(folder, MAX_DEPTH, partial(_pass_over, lists.hidden))
        return [*_some(list(map(_path, models)), str(source), lists.hidden)]
    # os.path's answer to a name that no file can have (too long, a NUL in it) is no; pathlib's is an OSError.
    if os.path.isfile(path):
        return _in_list(path, lists) if path.suffix == ".txt" else [path]
    if glob.has_magic(str(source)) and "\0" not in str(source):
        return [*_some(_in_glob(str(source), lists), str(source), lists.hidden)]
    raise ZooError("there is no such file or folder", where=str(source), next_step=_meant(path))


def _meant(path: Path) -> str:
    """Suggest a source for a path that does not exist."""
    if re.match(r"[A-Za-z][\w+.-]+:/[^/]", str(path)):
        return "give a URL as text, because a path object merges its double slash"
    return did_you_mean(path) or ("give an id of the hub as text, not as a path object" if parse_id(str(path)) else "")


def _in_glob(pattern: str, lists: _Lists) -> list[Path]:
    root, parts = split_pattern(pattern)
    folder = Disk(root, budget=lists.budget)
    matching = models_matching(folder, parts, partial(_pass_over, lists.hidden), follow=not lists.within)
    try:
        paths = [_path(entry) for entry in matching if is_folder(entry) or not pattern.endswith("/")]
    except ZooError as error:
        raise error.at(pattern) from error
    return sorted(paths, key=lambda path: natural_order(str(path)))


def _path(entry: Disk | str) -> Path:
    return Path(entry.path if isinstance(entry, Disk) else entry)


def _pass_over(hidden: list[Path], entry: Disk | str) -> None:
    """Record a model that is skipped for its name, or the models in such a folder. Folders that begin with a dot are not searched.

    A folder that cannot be listed (snapshots of a file system, another user's files) counts as empty, because it is skipped anyway.
    """
    path = _path(entry)
    with suppress(FormatError):
        if is_model(entry, path.name):
            hidden.append(path)
        elif isinstance(entry, Disk) and not entry.is_link and path.name.startswith("_"):
            inner = sorted(entry.entries.items())
            hidden += [_path(child) for name, child in inner if is_model(child, name)]


def _listed(urls: Sequence[str]) -> dict[str, list[Entry]]:
    """Return the models of each URL. Several URLs are listed at once. Raise for the first URL without a model."""
    splits = [split_glob(url) for url in urls]
    for url in urls:
        if url.endswith(".txt"):
            raise UnsupportedError(
                "a list of models at a URL is not read",
                where=shown_url(url),
                rule="lists are read only from this machine, but may contain URLs",
                next_step="download it",
            )
    depths = [(len(parts) if "**" not in parts else MAX_DEPTH + len(parts)) or MAX_DEPTH for _, parts in splits]
    by_url: dict[str, list[Entry]] = {}
    listed = list_urls([root for root, _ in splits], [depth + MODEL_DEPTH for depth in depths])
    for url, (_, parts), entry in zip(urls, splits, listed, strict=True):
        if isinstance(entry, EigenzooError):
            raise entry
        by_url[url] = _at_url(entry, parts, shown_url(url))
    return by_url


def _at_url(entry: Entry, parts: Sequence[str], url: str) -> list[Entry]:
    if not isinstance(entry, Folder):
        return [entry]
    if parts:
        try:
            return sorted(models_matching(entry, parts), key=lambda match: natural_order(match.url))
        except ZooError as error:
            raise error.at(url) from error
    if not entry.entries:
        raise ZooError("there is no such file or folder, or no model in it", where=url)
    if is_bundle(entry):
        raise ZooError(
            "this is a bundle, not a zoo or a model",
            where=url,
            rule="bundles are not read from URLs",
            next_step=f"{use_of_bundle(url)}, or name the models it was made from",
        )
    return list(models_at(entry, MAX_DEPTH))


def _last_name(entry: Entry) -> str:
    return entry.last_name if isinstance(entry, Folder) else entry.url.partition("::")[0].rpartition("/")[2]


def _in_list(file: Path, lists: _Lists) -> list[Path | str | HubId]:
    """Read a list of models, folders of models, globs, and further lists, each once."""
    resolved = file.resolve()
    if resolved in lists.within:
        raise ZooError("a list of models names itself", where=str(file), rule="a .txt file lists models, not itself")
    if resolved in lists.read:
        return []
    lists.read.add(resolved)
    text = read_bounded(resolved, MAX_LIST_BYTES, where=str(file)).decode("utf-8")
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        lines.setdefault(line.strip(), number)
    if len(lines) > MAX_LINES:
        raise ZooError(
            f"the list has {len(lines)} lines", where=str(file), rule=f"a list of models has at most {MAX_LINES}"
        )
    within = _Lists((*lists.within, resolved), lists.read, lists.hidden, lists.names)
    models: list[Path | str | HubId] = []
    for line, number in lines.items():
        if line and not line.startswith("#"):
            try:
                models += _expand(_line(line, file.parent), within)
            except EigenzooError as error:
                raise error.at(f"{file}, line {number}") from error
    return models


def _line(line: str, folder: Path) -> Path | str | HubId:
    """Read a line of a list: a URL, a path from the list's folder, or an id of the hub where no such path is there."""
    return line if "://" in line else find_id(line, folder) or folder / line


def name_models(paths: list[Path]) -> list[str]:
    """Name models by their folder or file; where two agree, by the path below their common folder."""
    stems = [weights_stem(path.name) if path.name.endswith(FILE_SUFFIXES) else _folder_name(path) for path in paths]
    repeated = {stem for stem, count in Counter(stems).items() if count > 1}
    if not repeated:
        return stems
    resolved = [_whole_path(path) for path in paths]
    common = Path(os.path.commonpath([path.parent for path in resolved]))
    return [
        weights_stem(path.relative_to(common).as_posix()) if stem in repeated else stem
        for path, stem in zip(resolved, stems, strict=True)
    ]


def _whole_path(path: Path) -> Path:
    """Return the absolute path; for a mirror, the URL as a path. A hub commit is left out of names."""
    url = source_url(path)
    if url is None:
        return Path(os.path.abspath(path))
    return Path("/", re.sub(r"@[0-9a-f]{40}(?=/|$)", "", url.replace("://", "/").replace("::", "/")))


def _folder_name(path: Path) -> str:
    """Return the name that the user wrote (for a link, its own). For `.` it is the folder's name."""
    return hub_name(path) or (path.name if path.name not in ("", "..") else path.resolve().name)
