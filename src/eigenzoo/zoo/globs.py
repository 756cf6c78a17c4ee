"""Globs as Python's `glob` understands them, but `**` follows no links: two links to their own folder hold 2^40 paths."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from eigenzoo.errors import ZooError

MAX_LOOKED_AT = 200_000
"""Names that `**` looks at, and every glob of a list."""


def find_names(pattern: str, *, follow: bool = True) -> list[str]:
    """Return the paths that a glob names, in no order; without `follow`, `*` follows no links either, and its looks are bounded."""
    parts = pattern.split("/")
    if follow and "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**") if follow else next(place for place, part in enumerate(parts) if glob.has_magic(part))
    above = "/".join(parts[:place]) or ("/" if pattern.startswith("/") else "")
    folders = glob.glob(above) if glob.has_magic(above) else [above]
    rest = [part for part in parts[place:] if part]
    return [name for folder in folders for name in _below(folder, rest, pattern)]


def _below(folder: str, parts: Sequence[str], pattern: str) -> Iterator[str]:
    looked_at = 0
    for above, folders, files in os.walk(folder or "."):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(above, folder or ".")
        within = [] if relative == "." else relative.split("/")
        if "**" not in parts and len(within) + 1 > len(parts):
            folders.clear()
            continue
        for name in [*folders, *files]:
            looked_at += 1
            if looked_at > MAX_LOOKED_AT:
                raise ZooError(
                    f"more than {MAX_LOOKED_AT} names lie below", where=pattern, next_step="name a smaller folder"
                )
            if _matches([*within, name], parts):
                yield str(Path(above, name))


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Tell whether the names of a path below a folder are what the parts of a pattern say."""
    if not parts:
        return not names
    if parts[0] == "**":
        return any(_matches(names[start:], parts[1:]) for start in range(len(names) + 1))
    if not names or (names[0].startswith(".") and not parts[0].startswith(".")):
        return False
    return fnmatch(names[0], parts[0]) and _matches(names[1:], parts[1:])
