"""What lies below a URL: one request to the store, and a tree of the names that matter to models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from eigenzoo.formats.tree import Listed

ATTEMPTS = 3
"""Attempts to reach a store at first: a name that is mistyped should be told soon."""

# Stores that keep names and no folders: all names below a prefix are one listing, whatever their depth.
_FLAT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf"})


@dataclass(frozen=True, kw_only=True)
class Folder(Listed):
    """A remote folder, and where it is."""

    address: Address

    @property
    def url(self) -> str:
        """What is shown of it."""
        return below(self.address.shown, self.name)

    @property
    def last_name(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2] or self.address.name


Entry = Folder | RemoteFile


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
    entries = cast(Mapping[str, Mapping[str, Any]], system.find(address.path, detail=True, **options))
    return _tree(address, entries, depth)


def _tree(address: Address, entries: Mapping[str, Mapping[str, Any]], depth: int) -> Folder:
    """Put listed names into a tree; a name that could lead elsewhere once it is a path here is refused."""
    root = Folder(address=address)
    prefix = address.path.strip("/") + "/" if address.path.strip("/") else ""
    for path, info in entries.items():
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
        root.put(name, _file(address, name, {**info, "name": path}))
    return root


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
