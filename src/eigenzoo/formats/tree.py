"""Folders of this machine, of a store or of a repository as one kind of tree, and the models that are found in it by names.

A folder is whatever has `entries`: its names, each with the folder or the file that has it. Only folders of this machine may be
links, and are listed when they are looked into.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Protocol, Self, TypeGuard

from eigenzoo.display import natural_order
from eigenzoo.errors import FormatError, ZooError
from eigenzoo.formats.kinds import BUNDLE_FILES, FILE_SUFFIXES, kind_of_folder
from eigenzoo.formats.side_files import MODULES, is_module

MAX_LOOKED_AT = 200_000
"""Names that a glob looks at where it has `**`, or is a line of a list."""

MAX_IN_LISTS = 1_000_000
"""Names that all lines of lists look at together: a model in each of 100,000 lines may have ten files."""

MAX_PARTS, MAX_PART = 16, 1000
"""Parts of a glob, and characters of each: time and memory go with their product, and a line of a list may have megabytes."""

HIDDEN = (".", "_")
"""What a name begins with that is passed over in folders and globs."""

Entry = Any
"""A folder, or what its tree says of a file."""


class Folder(Protocol):
    """A folder of a tree."""

    @property
    def is_link(self) -> bool:
        """Whether it is a link, which is not gone through."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is in it, by name."""


@dataclass(frozen=True)
class Listed:
    """A folder of a tree that was listed whole; `name` leads to it from the root."""

    name: str = ""
    entries: dict[str, Entry] = field(default_factory=dict)
    is_link = False

    def put(self, name: str, file: Entry) -> None:
        """Put a file at a place below; where a file and a folder have one name, the folder wins."""
        folder = self
        *above, last = name.split("/")
        for part in above:
            if not is_folder(folder.entries.get(part)):
                folder.entries[part] = replace(folder, name=f"{folder.name}/{part}".lstrip("/"), entries={})
            folder = folder.entries[part]
        folder.entries.setdefault(last, file)

    def find(self, name: str) -> Self | None:
        """Return the folder of a name from here; None where there is none."""
        folder = self
        for part in filter(None, name.split("/")):
            if not is_folder(folder.entries.get(part)):
                return None
            folder = folder.entries[part]
        return folder


@dataclass
class Budget:
    """How many names may yet be looked at."""

    left: int

    def take(self, num_names: int, where: str) -> None:
        """Take some; raises ZooError where there are not so many."""
        self.left -= num_names
        if self.left < 0:
            raise ZooError(
                "the list looks at too many names",
                where=where,
                rule=f"all its folders and globs together look at {MAX_IN_LISTS:,}",
                next_step="name a smaller folder",
            )


@dataclass(frozen=True)
class Disk:
    """A folder of this machine; its files are paths. With a budget, its names are taken from that."""

    path: str
    is_link: bool = False
    budget: Budget | None = None

    @cached_property
    def entries(self) -> dict[str, Disk | str]:
        """Its names, listed once; raises FormatError where it cannot be listed."""
        try:
            with os.scandir(self.path) as entries:
                found = {entry.name: _on_disk(entry, self.budget) for entry in entries}
        except OSError as error:
            raise FormatError(f"cannot be listed ({error.strerror})", where=self.path) from error
        if self.budget is not None:
            self.budget.take(len(found), self.path)
        return found


def _on_disk(entry: os.DirEntry[str], budget: Budget | None) -> Disk | str:
    # Of a link that leads round in a circle an entry's own is_dir raises.
    is_link = entry.is_symlink()
    is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
    return Disk(entry.path, is_link, budget) if is_folder else entry.path


def is_folder(entry: Entry) -> TypeGuard[Folder]:
    """Tell a folder of a tree from a file."""
    return hasattr(entry, "entries")


def file_names(folder: Folder) -> set[str]:
    """Return the names of the files in a folder."""
    return {name for name, entry in folder.entries.items() if not is_folder(entry)}


def is_bundle(entry: Entry) -> bool:
    """Tell by names alone whether a folder is meant to be a bundle."""
    return is_folder(entry) and file_names(entry).issuperset(BUNDLE_FILES)


def is_model(entry: Entry, name: str) -> bool:
    """Tell by names alone whether a folder, or a file of this name, is meant to be one model, readable or not."""
    return kind_of_folder(set(entry.entries)) is not None if is_folder(entry) else name.endswith(FILE_SUFFIXES)


def _ignore(entry: Entry) -> None:
    """Do nothing with what is passed over."""


def models_at(folder: Folder, depth: int, passed: Callable[[Entry], object] = _ignore) -> Iterator[Entry]:
    """Give a folder that is a model, else the models in it by name; a bundle holds none, and a link is not looked into.

    Args:
        folder: where models are looked for.
        depth: how many folders deep they are: 0 is the folder itself, 1 what has its names.
        passed: is told of each name that begins with `.` or `_`.
    """
    if is_model(folder, ""):
        yield folder
        return
    for name in sorted(folder.entries, key=natural_order) if depth else ():
        entry = folder.entries[name]
        # What follows the first module is no model of its own: a layer, or nothing.
        if MODULES in folder.entries and is_module(name) and not name.startswith("0_"):
            continue
        if name.startswith(HIDDEN):
            passed(entry)
        elif is_folder(entry):
            if not is_bundle(entry):
                yield from models_at(entry, 0 if entry.is_link else depth - 1, passed)
        elif is_model(entry, name):
            yield entry


def models_matching(
    folder: Folder, parts: Sequence[str], passed: Callable[[Entry], object] = _ignore, *, follow: bool = True
) -> Iterator[Entry]:
    """Give the models whose names from a folder match the parts of a glob, in no order.

    `**` is any number of folders and goes through no link: two links to their own folder hold 2^40 paths. With `follow`, a part
    before it does. Raises ZooError where `**`, or any glob without `follow`, looks at more than MAX_LOOKED_AT names, and
    for globs of more than MAX_PARTS parts or MAX_PART characters in one.
    """
    # `**` behind `**` adds nothing, but one more place of the pattern at every name.
    parts = [part for part, before in zip(parts, ["", *parts], strict=False) if (part, before) != ("**", "**")]
    if len(parts) > MAX_PARTS or max(map(len, parts), default=0) > MAX_PART:
        raise ZooError(
            "the glob is too long", rule=f"globs have up to {MAX_PARTS} parts of up to {MAX_PART} characters each"
        )
    for name, entry in _matching(folder, parts, follow):
        if name.startswith(HIDDEN):
            passed(entry)
        elif is_model(entry, name) and not is_bundle(entry):
            yield entry


def _matching(folder: Folder, parts: Sequence[str], follow: bool) -> Iterator[tuple[str, Entry]]:
    """Walk a tree once, with all places of the pattern that a path from its root has come to."""
    deep = parts.index("**") if "**" in parts else len(parts)
    bounded, looked_at = deep < len(parts) or not follow, 0
    ahead = [(folder, _after({0}, parts))]
    while ahead:
        above, positions = ahead.pop()
        inside = {position for position in positions if position < len(parts) and parts[position] == "**"}
        steps = [(position, parts[position]) for position in positions - inside if position < len(parts)]
        for name, entry in _names(above):
            looked_at += 1
            if bounded and looked_at > MAX_LOOKED_AT:
                raise ZooError(
                    f"the folder contains more than {MAX_LOOKED_AT} names", next_step="name a smaller folder"
                )
            stepped = {position + 1 for position, part in steps if _fits(name, part)}
            deeper = set() if name.startswith(".") else inside
            # `**` also matches no folder at all, but only behind a folder: `*/**` names no file beside the folders.
            reached = _after(deeper, parts) | (_after(stepped, parts) if is_folder(entry) else stepped)
            if len(parts) in reached:
                yield name, entry
            if is_folder(entry) and entry.is_link:
                reached = _after({position for position in stepped if position <= deep and follow}, parts)
            if is_folder(entry) and reached - {len(parts)}:
                ahead.append((entry, reached))


def _names(folder: Folder) -> list[tuple[str, Entry]]:
    """List a folder; one that cannot be listed has no names that match."""
    try:
        return list(folder.entries.items())
    except FormatError:
        return []


def _fits(name: str, part: str) -> bool:
    return (part.startswith(".") or not name.startswith(".")) and fnmatchcase(name, part)


def _after(positions: set[int], parts: Sequence[str]) -> set[int]:
    """Add the places behind each `**`, which may be no folder at all."""
    return positions | {position + 1 for position in positions if position < len(parts) and parts[position] == "**"}


def split_pattern(pattern: str) -> tuple[str, list[str]]:
    """Split a glob of this machine into the folder that holds no wildcard and the parts below it.

    >>> split_pattern("zoo/run-*/adapter"), split_pattern("/*")
    (('zoo', ['run-*', 'adapter']), ('/', ['*']))
    """
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:first]) or ("/" if first else ".")
    return root, [part for part in parts[first:] if part]
