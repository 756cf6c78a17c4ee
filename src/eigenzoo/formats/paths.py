"""Which files belong to a model's folder. Names come out of indexes and bundles that others wrote."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath

from eigenzoo.errors import FormatError, UnsafePathError
from eigenzoo.weights.renames import nearest

MAX_SIDE_BYTES = 64 * 2**20  # of a tokenizer; the largest in use are half of it
NEAR = 0.75
"""How like a mistyped name is to what was meant, by difflib's ratio: one letter of four may be another or in another place."""

MAX_NAMES = 10_000  # of a folder, that a mistyped name is compared with
_MAX_NAME, _MAX_PART = 1024, 255
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_PLAIN = re.compile(r"(?:[\w%+-][\w%+.-]*/)*[\w%+-][\w%+.-]*", re.ASCII)
"""Names that need no second look, which nearly all are: letters, digits and little else, no part beginning with a dot."""

_HASH = re.compile(r"[0-9a-f]{64}")

RECORD_FILE = ".eigenzoo-remote.json"
"""In a mirror of a remote model, what its files are stubs of; no file of the model."""

OUTPUT_RECORD = ".eigenzoo-output.json"
"""In a folder that eigenzoo wrote, which files it wrote; no file of the model."""


def relative_name(file: str) -> str:
    """Return `file` if it is a relative name that stays below its folder on every system, else raise UnsafePathError.

    >>> relative_name("model-00001-of-00002.safetensors")
    'model-00001-of-00002.safetensors'
    """
    fault = _name_fault(file)
    if fault:
        raise UnsafePathError(
            f"the file name {file[:100]!r} {fault}", rule="files of a model are named relative to its own folder"
        )
    return file


def _name_fault(file: str) -> str:
    """Say what is wrong with a name; empty when nothing is."""
    if len(file) <= _MAX_PART and _PLAIN.fullmatch(file):
        return ""
    if not file or len(file) > _MAX_NAME:
        return "is empty" if not file else f"is longer than {_MAX_NAME} characters"
    if _CONTROL.search(file):
        return "holds control characters"
    if PurePosixPath(file).is_absolute() or PureWindowsPath(file).anchor:
        return "is absolute"
    if any(part in ("", ".", "..") for part in file.replace("\\", "/").split("/")):
        return "holds '..', '.' or an empty part"
    if any(len(os.fsencode(part)) > _MAX_PART for part in file.split("/")):
        return f"holds a part of more than {_MAX_PART} bytes, which no file system accepts"
    return "holds a backslash" if "\\" in file else ""


def inside(root: Path, file: str) -> Path:
    """Resolve the file named `file` of the model in folder `root`; links may not lead out of the folder.

    One exception: the Hugging Face cache keeps `snapshots/<revision>/x` as a link to `../../blobs/<hash>` of the same
    repository, or that as a link to the store that all its repositories share, which is accepted. The file need not exist.
    """
    relative_name(file)
    try:
        folder = os.path.realpath(root)
        plain = os.path.join(folder, file)
        # What is no link in a folder without links is where its name says: one look instead of one for each folder above it.
        target = plain if "/" not in file and not os.path.islink(plain) else str(Path(plain).resolve())
    except (RuntimeError, OSError) as error:  # a loop of links: RuntimeError before Python 3.13, OSError since
        raise UnsafePathError(f"{file!r} cannot be followed ({error})", where=str(root)) from error
    if target == plain or Path(target).is_relative_to(folder) or _is_cache_blob(Path(folder), Path(target)):
        return Path(target)
    raise UnsafePathError(
        f"{file!r} is a link that leads out of the folder, to {target!r}",
        where=str(root),
        rule="a model's files lie in its own folder",
        next_step="if you trust it, replace the link with the file itself",
    )


def relative_to(path: Path, root: Path) -> str:
    """Return the name of a file from a folder that it lies below by its own path."""
    return path.name if path.parent == root else path.relative_to(root).as_posix()


def final_name(path: Path) -> str:
    """Return the name of a folder, of a link's target where it is one.

    >>> final_name(Path("/models/m1"))
    'm1'
    """
    return path.resolve().name if path.name in ("", "..") or os.path.islink(path) else path.name


def _is_cache_blob(folder: Path, target: Path) -> bool:
    for snapshots in (folder, *folder.parents):
        if snapshots.name == "snapshots" and snapshots != folder:
            repository = snapshots.parent
            return target.parent == repository / "blobs" or (
                repository.name.startswith("models--")
                and target.parent == repository.parent / "blobs" / target.name[:2]
                and _HASH.fullmatch(target.name) is not None
            )
    return False


def is_regular(path: Path) -> bool:
    """Tell whether `path` is a plain file: opening a pipe or a device would block or never end."""
    return os.path.isfile(path)


def read_bounded(path: Path, max_bytes: int, *, where: str) -> bytes:
    """Read a small file whole, refusing what is not a regular file or larger than `max_bytes` before any of it is read."""
    if not is_regular(path):
        raise FormatError("not a regular file" if path.exists() else "the file is missing", where=where)
    try:
        with open(path, "rb", buffering=0) as file:
            # No more than there is, since Python takes the memory that is asked for; more than that only if the file grows.
            step, data = os.fstat(file.fileno()).st_size + 1, b""
            while len(data) <= max_bytes and (more := file.read(min(step, max_bytes + 1 - len(data)))):
                data += more
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=where) from error
    if len(data) > max_bytes:
        raise FormatError(
            f"the file has {path.stat().st_size} bytes",
            where=where,
            rule=f"a file of this kind has at most {max_bytes} bytes",
        )
    return data


def nearest_path(path: str, folder: Path) -> str | None:
    """Return the existing path that a mistyped one is like, from `folder`: each part as it is, or else the nearest name there.

    It ends at the first part that is like nothing; None where that is the first of all. Only folders hold further parts; hidden
    names are not looked at. Cost: one listing of each folder in which a part is missing.
    """
    near_parts: list[str] = []
    parts = Path(path).parts
    for number, part in enumerate(parts):
        folder_so_far, inner = Path(folder, *near_parts), number + 1 < len(parts)
        is_there = os.path.isdir(folder_so_far / part) if inner else os.path.lexists(folder_so_far / part)
        near = part if is_there else nearest(part, _names(folder_so_far, inner), NEAR)
        if near is None:
            break
        near_parts.append(near)
    return str(Path(*near_parts)) if near_parts else None


def did_you_mean(path: str | os.PathLike[str], folder: Path = Path()) -> str:
    """Ask for the existing path that a mistyped one is like in all its parts; "" where there is none. See `nearest_path`."""
    text = os.fspath(path)
    near = nearest_path(text, folder)
    return f"did you mean {near!r}?" if near is not None and len(Path(near).parts) == len(Path(text).parts) else ""


def _names(folder: Path, folders_only: bool) -> list[str]:
    """List some of the names that a mistyped one could mean."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry.name
                for entry in islice(entries, MAX_NAMES)
                if not entry.name.startswith(".") and (entry.is_dir() or not folders_only)
            ]
    except (OSError, ValueError):  # a NUL is in no path
        return []


def read_start(path: Path, num_bytes: int) -> bytes:
    """Read the first bytes of a plain file."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(num_bytes)
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path)) from error


def list_folder(folder: Path) -> list[str]:
    """List the names in a folder, sorted."""
    try:
        return sorted(name for name in os.listdir(folder) if name not in (RECORD_FILE, OUTPUT_RECORD))
    except OSError as error:
        raise FormatError(f"cannot be listed ({error.strerror})", where=str(folder)) from error
