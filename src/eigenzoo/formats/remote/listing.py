"""What lies below a URL: one request to the store, and a tree of the names that matter to models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

from eigenzoo.errors import EigenzooError, UnsafePathError
from eigenzoo.formats.kinds import BUNDLE_FILES, FILE_SUFFIXES, INDEXES
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.paths import relative_name
from eigenzoo.formats.refused import FOREIGN_NAMES
from eigenzoo.formats.remote.address import Address, below, connect, find_address, protocol_of, shown_url
from eigenzoo.formats.remote.retrying import Call, run_jobs
from eigenzoo.formats.remote.source import UNKNOWN, RemoteFile, tag_of
from eigenzoo.formats.side_files import SIDE_FILES

ATTEMPTS = 3
"""Attempts to reach a store at first: a name that is mistyped should be told soon."""

# Stores that keep names and no folders: all names below a prefix are one listing, whatever their depth.
_FLAT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf"})


@dataclass(frozen=True)
class Folder:
    """A remote folder: what is below it by name, and where it is."""

    address: Address
    name: str
    entries: dict[str, Folder | RemoteFile]

    @property
    def url(self) -> str:
        """What is shown of it."""
        return below(self.address.shown, self.name)

    @property
    def last_name(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2] or self.address.name


Entry = Folder | RemoteFile


def is_bundle(entry: Entry) -> bool:
    """Tell by names alone whether a remote folder is meant to be a bundle."""
    return isinstance(entry, Folder) and entry.entries.keys() >= set(BUNDLE_FILES)


def list_urls(urls: Sequence[str], depths: Sequence[int]) -> list[Entry | EigenzooError]:
    """List what lies at URLs, several at once, down to so many folders; a file is itself, nothing an empty folder."""
    calls = [Call(shown_url(url), partial(list_url, url, depth)) for url, depth in zip(urls, depths, strict=True)]
    errors = run_jobs(calls, attempts=ATTEMPTS)
    return [error or call.value for call, error in zip(calls, errors, strict=True)]


def list_url(url: str, depth: int) -> Entry:
    """List what lies at a URL, down to `depth` folders; raises what the driver raises."""
    address = find_address(url)
    system = connect(url)
    if address.name.endswith(FILE_SUFFIXES):
        system.invalidate_cache(address.path)
        info = system.info(address.path)
        if info.get("type") != "directory":
            return _file(address, "", info)
    if protocol_of(address.shown) != "hf":  # a commit of the hub is listed once and for all
        system.invalidate_cache(address.path)
    options = {} if protocol_of(address.shown) in _FLAT else {"maxdepth": depth}
    found = cast(Mapping[str, Mapping[str, Any]], system.find(address.path, detail=True, **options))
    return _tree(address, found, depth)


def _tree(address: Address, found: Mapping[str, Mapping[str, Any]], depth: int) -> Folder:
    """Put listed names into a tree; a name that could lead elsewhere once it is a path here is refused."""
    root = Folder(address, "", {})
    prefix = address.path.strip("/") + "/" if address.path.strip("/") else ""
    for path, info in found.items():
        name = path.lstrip("/")
        if not name.startswith(prefix) or info.get("type") == "directory":
            continue
        name = name[len(prefix) :]
        last = name.rpartition("/")[2]
        if name.count("/") >= depth or not _matters(last):
            continue
        try:
            relative_name(name)
        except UnsafePathError as error:
            raise error.at(address.shown) from error.__cause__
        folder = root
        for part in name.split("/")[:-1]:
            folder = _child(folder, part)
        folder.entries.setdefault(last, _file(address, name, {**info, "name": path}))
    return root


def _child(folder: Folder, name: str) -> Folder:
    """Return the folder of a name, made where it is new; where a file has the name too, the folder wins."""
    known = folder.entries.get(name)
    if not isinstance(known, Folder):
        known = Folder(folder.address, f"{folder.name}/{name}".lstrip("/"), {})
        folder.entries[name] = known
    return known


def _matters(name: str) -> bool:
    return (
        name.endswith((*FILE_SUFFIXES, *(f"{suffix}.index.json" for suffix in FILE_SUFFIXES)))
        or name in SIDE_FILES
        or name in FOREIGN_NAMES
        or name in (CONFIG_FILE, *BUNDLE_FILES, *INDEXES)
    )


def _file(address: Address, name: str, info: Mapping[str, Any]) -> RemoteFile:
    size = info.get("size")
    path = address.path if not name else str(info["name"])
    return RemoteFile(
        address.source, path, below(address.shown, name), UNKNOWN if size is None else int(size), tag_of(info)
    )


def entries_matching(folder: Folder, parts: Sequence[str]) -> Iterator[Entry]:
    """Give what matches the parts of a glob, as `glob` would: `**` is any number of folders, `.` hides a name."""
    if not parts:
        yield folder
        return
    head, rest = parts[0], parts[1:]
    if head == "**":
        yield from entries_matching(folder, rest)
    for name, entry in folder.entries.items():
        if name.startswith(".") and not head.startswith("."):
            continue
        if head == "**":
            if isinstance(entry, Folder):
                yield from entries_matching(entry, parts)
            elif not rest:
                yield entry
        elif fnmatchcase(name, head):
            if isinstance(entry, Folder):
                yield from entries_matching(entry, rest)
            elif not rest:
                yield entry
