"""Files that stay open while a pass over a zoo lasts: hundreds of models are read in tens of thousands of short reads."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from eigenzoo.errors import FormatError

OPEN_AGAIN = "open the zoo again"

Identity = tuple[int, int]
"""Size and time of change: by them a file is known to be the one whose header was read."""

_lock = threading.Lock()
_open: dict[Path, tuple[FileIO, Identity]] = {}
_inside = set[object]()


@contextmanager
def keep_files_open() -> Iterator[None]:
    """Keep the files that are read while inside open, half as many as the system allows; any thread may read them.

    Raises FormatError at the end where a file was written to meanwhile.
    """
    entry = object()
    try:
        with _lock:
            _inside.add(entry)
        yield
        check_all()
    finally:
        try:
            _leave(entry)
        except KeyboardInterrupt:
            _leave(entry)
            raise


def _leave(entry: object) -> None:
    with _lock:
        _inside.discard(entry)
        closed = [] if _inside else list(_open.values())
        if not _inside:
            _open.clear()
    for file, _ in closed:
        file.close()


def check_all() -> None:
    """Raise FormatError where a file that is kept open is no longer what it was; what has taken its name meanwhile is another."""
    with _lock:
        opened = list(_open.items())
    for path, (file, identity) in opened:
        check_identity(file, identity, path)


def check_identity(file: FileIO, identity: Identity, path: Path) -> None:
    """Raise FormatError unless an open file has this size and time."""
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != identity:
        raise FormatError(
            "the file changed since its header was read",
            where=str(path),
            rule="a model must not change while it is read",
            next_step=OPEN_AGAIN,
        )


def find(path: Path, identity: Identity) -> FileIO | None:
    """Return a file that is kept open, if it is the one whose header was read."""
    entry = _open.get(path)
    return entry[0] if entry is not None and entry[1] == identity else None


def keep(path: Path, file: FileIO, identity: Identity) -> bool:
    """Take a file over, if files are being kept and there is room for one more; tells whether it did."""
    with _lock:
        if not _inside or path in _open or len(_open) >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            return False
        _open[path] = file, identity
        return True
