"""Describe the files that models were read from. A bundle stores these records, and their paths change when it moves."""

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
    """Describe a model's files, with its path relative to `root`.

    Checksums are added when the bundle is saved, unless the hub's cache has them.
    """
    files = {}
    for path in model.weight_files():
        status = path.stat()
        key = path.relative_to(model.folder).as_posix() if path.is_relative_to(model.folder) else path.name
        files[key] = SourceFile(bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=stored_sha256(path))
    return SourceRecord(path=source_url(model.path) or _relative(model.path, root), files=files)


class Relocation:
    """Changes records of a bundle in one folder to those of the same bundle in another folder.

    Paths are relative to the folder after its links are followed, because below a link `..` leads elsewhere.
    """

    def __init__(self, old_root: Path, new_root: Path) -> None:
        self._old, self._new = os.path.abspath(old_root), os.path.realpath(new_root)
        self._parents: dict[str, str] = {}

    def moved(self, record: SourceRecord) -> SourceRecord:
        """Return a record with its path relative to the new folder."""
        if is_url(record.path):
            return record
        path = os.path.join(self._old, record.path)
        return record.model_copy(update={"path": self._relative(path)})

    def with_checksums(self, record: SourceRecord) -> SourceRecord:
        """Return a moved record with checksums of the files that still exist."""
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
        """Return a path relative to the new folder. The links of each parent folder are followed once."""
        parent, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            return os.path.relpath(followed(path), self._new)
        if parent not in self._parents:
            self._parents[parent] = os.path.relpath(os.path.realpath(parent), self._new)
        return os.path.normpath(os.path.join(self._parents[parent], name))


def _sha256(path: Path, recorded: SourceFile) -> str | None:
    """Return the checksum of a source file, or None if it is gone or has changed since it was read."""
    try:
        status = path.stat()
    except OSError:
        return None
    if (status.st_size, status.st_mtime_ns) != (recorded.bytes, recorded.mtime_ns):
        return None
    return file_sha256(path)


class Fault(NamedTuple):
    """Why a model's files are not available.

    Attributes:
        kind: `missing`, `changed`, `unreadable`, `remote` or `unnamed`.
        detail: a sentence with paths.
    """

    kind: str
    detail: str


def is_at_hand(record: SourceRecord, root: Path) -> bool:
    """Tell whether a model's files are still in place and unchanged."""
    return source_fault(record, root) is None


def source_fault(record: SourceRecord, root: Path) -> Fault | None:
    """Return why a model's files are not in place or have changed, or None. Files are unchanged by size and time, else by checksum.

    Files of a store count as not available, unless `old` names them. Files of the hub are available if its cache has their commit.
    If a path does not exist, either the bundle or the files may have moved.
    """
    if not record.files:
        return Fault("unnamed", "the bundle names no files")
    path = source_path(record, root)
    if path is None:
        return Fault("remote", f"{record.path} is not on this machine, and not asked for again")
    if not os.path.exists(path):
        return Fault("missing", f"{os.path.realpath(path)} is not there")
    folder = path if path.is_dir() else path.parent
    for name, recorded in record.files.items():
        if (fault := _file_fault(Path(os.path.realpath(folder / name)), recorded)) is not None:
            return fault
    return None


def _file_fault(path: Path, recorded: SourceFile) -> Fault | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Fault("missing", f"{path} is not there")
    except OSError as error:
        return Fault("unreadable", f"{path} cannot be read ({error.strerror})")
    if status.st_size != recorded.bytes:
        return Fault("changed", f"{path} has {status.st_size} bytes, and had {recorded.bytes} when it was read")
    if status.st_mtime_ns == recorded.mtime_ns:
        return None
    if recorded.sha256 is None:
        return Fault("changed", f"{path} was written to since it was read, and its checksum is not known")
    same = file_sha256(path) == recorded.sha256
    return None if same else Fault("changed", f"{path} has other contents than when it was read")


def source_path(record: SourceRecord, root: Path) -> Path | None:
    """Return the local path of a model's files, whether it exists or not, or None for files of a store. Makes no request."""
    return cached_path(record.path) if is_url(record.path) else root / record.path


def followed(path: str | os.PathLike[str]) -> str:
    """Follow the links of a path's folders, but not of the file: the hub's cache names files by hash, without a suffix."""
    parent, name = os.path.split(path)
    return os.path.join(os.path.realpath(parent), name) if os.path.isfile(path) else os.path.realpath(path)


def _relative(path: Path, root: Path) -> str:
    return os.path.relpath(followed(path), os.path.realpath(root))
