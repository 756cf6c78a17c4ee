"""Where models were read: records that a bundle keeps of their files, and that move with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from eigenzoo.formats.bundle.folder import file_sha256
from eigenzoo.formats.bundle.manifest import SourceFile, SourceRecord
from eigenzoo.formats.model import Model
from eigenzoo.formats.remote import is_url, source_url
from eigenzoo.formats.remote.hub import stored_sha256
from eigenzoo.formats.remote.hub_id import cached_path


def source_record(model: Model, root: Path) -> SourceRecord:
    """Describe a model's files, with its path relative to `root`; checksums come when the bundle is saved, unless the hub's
    cache knows them."""
    files = {}
    for path in model.weight_files():
        status = path.stat()
        key = path.relative_to(model.folder).as_posix() if path.is_relative_to(model.folder) else path.name
        files[key] = SourceFile(bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=stored_sha256(path))
    return SourceRecord(path=source_url(model.path) or _relative(model.path, root), files=files)


class Relocation:
    """Moves records from a bundle in one folder to the same bundle in another.

    Paths are relative to the folder, their links followed: `..` leads elsewhere below a link.
    """

    def __init__(self, old_root: Path, new_root: Path) -> None:
        self._old, self._new = os.path.abspath(old_root), os.path.realpath(new_root)
        self._parents: dict[str, str] = {}

    def moved(self, record: SourceRecord) -> SourceRecord:
        """Return a record with its path from the new folder."""
        if is_url(record.path):
            return record
        path = os.path.join(self._old, record.path)
        return record.model_copy(update={"path": self._relative(path)})

    def with_checksums(self, record: SourceRecord) -> SourceRecord:
        """Return a moved record with checksums of the files that are still there."""
        if is_url(record.path):
            return record
        path = Path(self._old) / record.path
        folder = path if path.is_dir() else path.parent
        files = {
            name: file.model_copy(update={"sha256": file.sha256 or _sha256(folder / name, file)})
            for name, file in record.files.items()
        }
        return self.moved(record).model_copy(update={"files": files})

    def _relative(self, path: str) -> str:
        """Path from the new folder; the links of a folder are followed once for all that lies in it."""
        parent, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            return os.path.relpath(followed(path), self._new)
        if parent not in self._parents:
            self._parents[parent] = os.path.relpath(os.path.realpath(parent), self._new)
        return os.path.normpath(os.path.join(self._parents[parent], name))


def _sha256(path: Path, known: SourceFile) -> str | None:
    """Checksum of a source file, or None where it is gone or no longer what was read."""
    try:
        status = path.stat()
    except OSError:
        return None
    if (status.st_size, status.st_mtime_ns) != (known.bytes, known.mtime_ns):
        return None
    return file_sha256(path)


class Fault(NamedTuple):
    """Why a model's own files are not at hand.

    Attributes:
        kind: `missing`, `changed`, `unreadable`, `remote` or `unnamed`.
        detail: the same in words, with paths.
    """

    kind: str
    detail: str


def is_at_hand(record: SourceRecord, root: Path) -> bool:
    """Tell whether a model's own files are still where they were, unchanged."""
    return source_fault(record, root) is None


def source_fault(record: SourceRecord, root: Path) -> Fault | None:
    """Return why a model's own files are not where they were, unchanged by size and time, else by checksum; None if they are.

    Files of a store are not at hand: growing from them again is a choice that `old` makes. Those of the hub are where its
    cache has their commit. Of a path that leads to nothing nobody knows whether the bundle or the files have moved.
    """
    if not record.files:
        return Fault("unnamed", "the bundle names no files")
    path = source_path(record, root)
    if path is None:
        return Fault("remote", f"{record.path} is not on this machine, and not asked for again")
    if not os.path.exists(path):
        return Fault("missing", f"{os.path.realpath(path)} is not there")
    folder = path if path.is_dir() else path.parent
    for name, known in record.files.items():
        if (fault := _file_fault(Path(os.path.realpath(folder / name)), known)) is not None:
            return fault
    return None


def _file_fault(path: Path, known: SourceFile) -> Fault | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Fault("missing", f"{path} is not there")
    except OSError as error:
        return Fault("unreadable", f"{path} cannot be read ({error.strerror})")
    if status.st_size != known.bytes:
        return Fault("changed", f"{path} has {status.st_size} bytes, and had {known.bytes} when it was read")
    if status.st_mtime_ns == known.mtime_ns:
        return None
    if known.sha256 is None:
        return Fault("changed", f"{path} was written to since it was read, and its checksum is not known")
    same = file_sha256(path) == known.sha256
    return None if same else Fault("changed", f"{path} has other contents than when it was read")


def source_path(record: SourceRecord, root: Path) -> Path | None:
    """Return where a model's files are, or were, on this machine; None for those of a store. Asks no network."""
    return cached_path(record.path) if is_url(record.path) else root / record.path


def followed(path: str | os.PathLike[str]) -> str:
    """Follow the links of a path, but not that of a file: the hub's cache calls the target by its hash, without a suffix."""
    parent, name = os.path.split(path)
    return os.path.join(os.path.realpath(parent), name) if os.path.isfile(path) else os.path.realpath(path)


def _relative(path: Path, root: Path) -> str:
    return os.path.relpath(followed(path), os.path.realpath(root))
