"""Renames that Python's own cannot do: two folders exchanged at once, and a name taken only where it is free."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""How systems and file systems say that they lack it: FUSE, some network disks."""


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step, so that nobody ever finds either of them missing; False where the system cannot."""
    return _renameat2(first, second, _EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that nothing has; raises FileExistsError where something has it.

    Where the system cannot do that in one step, a plain rename follows a look: a folder that is not empty is safe even then.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    source.rename(target)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    function = _function()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), os.fspath(target))


def _function() -> Any:
    """Linux's renameat2, by the C library; None elsewhere."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function
