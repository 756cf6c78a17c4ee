"""Which files of a folder eigenzoo wrote: nothing else is ever removed with them.

A folder has a record beside its files, `.eigenzoo-output.json`: the kind of the output, and each file's SHA-256 by its path in the
folder. A bundle needs none, since its manifest lists its files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path

from eigenzoo.errors import FormatError
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.paths import OUTPUT_RECORD

OTHER_KIND = "is a folder of another kind"
NO_RECORD = f"has no record ({OUTPUT_RECORD}) of the files that eigenzoo wrote"

Foreign = Callable[[Path], str]
"""Called with a folder that is to be replaced; says what about it eigenzoo did not write, or nothing: ""."""


def everything(folder: Path) -> str:
    """Say that a folder is another kind of output, whatever it holds."""
    return OTHER_KIND


def write_record(folder: Path, kind: str) -> None:
    """Write down all files of a finished output. Cost: each file is read once."""
    files = {name: _sha256(folder / name) for name in list_files(folder)}
    text = json.dumps({"kind": kind, "files": files}, indent=1) + "\n"
    (folder / OUTPUT_RECORD).write_text(text, encoding="utf-8")


def recorded(kind: str) -> Foreign:
    """Return what finds the first file of a folder that its record does not have, or has with other contents.

    Files that are missing are no reason to keep the others. Cost: each file is read once; it is not read again by the same process
    while it stays as it is.
    """

    def foreign(folder: Path) -> str:
        if (folder / OUTPUT_RECORD).is_symlink():
            return OTHER_KIND
        if not (folder / OUTPUT_RECORD).is_file():
            return NO_RECORD
        try:
            record = read_json(folder / OUTPUT_RECORD, where=str(folder))
        except FormatError:
            record = {}
        files = record.get("files")
        if record.get("kind") != kind or not isinstance(files, dict):
            return OTHER_KIND
        stranger = find_stranger(folder, {*files, OUTPUT_RECORD})
        if stranger:
            return stranger
        changed = [name for name in list_files(folder) if name in files and not _holds(folder / name, files[name])]
        return f"holds {changed[0]!r}, which was changed since eigenzoo wrote it" if changed else ""

    return foreign


def find_stranger(folder: Path, own_files: Collection[str]) -> str:
    """Say which file of a folder is not among those that are known by their paths in it; "" where none is."""
    for name in list_files(folder):
        if name not in own_files:
            return f"holds {name!r}, which eigenzoo did not write"
    return ""


def list_files(folder: Path) -> list[str]:
    """List the paths in a folder of everything below it but folders, sorted; what cannot be listed is an OSError."""
    names: list[str] = []
    above = [""]
    while above:
        folder_name = above.pop()
        with os.scandir(folder / folder_name) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    above.append(f"{folder_name}{entry.name}/")
                else:
                    names.append(f"{folder_name}{entry.name}")
    return sorted(names)


def _holds(path: Path, recorded_hash: object) -> bool:
    """Tell whether a plain file has this hash; nothing else has one, whatever a record says."""
    return bool(actual_hash := _sha256(path)) and actual_hash == recorded_hash


def _sha256(path: Path) -> str:
    """Return the hash of a file; of anything that is not a regular file, what no file has."""
    if path.is_symlink() or not path.is_file():
        return ""
    status = path.stat()
    return _read(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _read(path: Path, *identity: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
