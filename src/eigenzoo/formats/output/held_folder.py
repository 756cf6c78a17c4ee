"""Hidden folders for what is not finished: locked while their process lives, removed by the next one when it has died.

A process that is killed removes nothing. So whoever makes such a folder first removes those of its kind that nobody holds. What
another machine may hold (a disk over the network, whose locks are its own) is left alone until it is a week old.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import weakref
from functools import cache
from pathlib import Path

from eigenzoo.errors import OutputError

PREFIX = ".eigenzoo-tmp-"
STALE_SECONDS = 7 * 24 * 3600
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class HeldFolder:
    """A new folder that takes an output's name later, or goes.

    Attributes:
        path: where it lies now.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        sweep(parent, prefix)
        lock = None
        while lock is None:
            self.path = parent / f"{prefix}{system_mark()}{secrets.token_hex(4)}"
            self.path.mkdir()
            lock = _hold(self.path)
        self._release = weakref.finalize(self, os.close, lock)

    def remove(self) -> None:
        """Remove what has the name still, and let go of the folder; what cannot be removed the next one of its kind removes."""
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()


class TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder in `parent` (None: the system's), which a kill leaves and the next one in the same place removes.

    Raises OutputError where no folder can be made.
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        parent_path = os.fspath(parent) if parent is not None else tempfile.gettempdir()
        sweep(Path(parent_path), PREFIX)
        lock = None
        while lock is None:
            try:
                super().__init__(prefix=f"{PREFIX}{system_mark()}", dir=parent)
            except OSError as error:
                raise OutputError(f"a folder cannot be created there ({error.strerror})", where=parent_path) from error
            lock = _hold(Path(self.name))
            if lock is None:
                super().cleanup()
        weakref.finalize(self, os.close, lock)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the folders of a kind that no living process holds; whatever stands in the way of that is no error."""
    # No other folder is taken for one of these: its name alone begins alike.
    made = re.compile(re.escape(prefix) + "[0-9a-f]{8}[0-9a-z_]{8}")
    try:
        names = [name for name in os.listdir(parent) if made.fullmatch(name)]
    except OSError:
        return
    for path in (parent / name for name in names):
        lock = None
        try:
            status = path.lstat()
            ours = path.name.startswith(f"{prefix}{system_mark()}") or time.time() - status.st_mtime > STALE_SECONDS
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and ours:
                lock = locked(path)
        except OSError:
            continue
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _hold(path: Path) -> int | None:
    """Lock a folder that was just made; None where a sweep was faster, and the folder is gone or going."""
    try:
        return locked(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        # Where folders cannot be locked no sweep removes any.
        return None if error.errno == errno.EWOULDBLOCK else os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def locked(path: Path, flags: int = os.O_RDONLY | os.O_DIRECTORY, *, wait: bool = False) -> int:
    """Open and lock what has a name, a folder unless `flags` say otherwise; returns the descriptor, whose closing lets go of it.

    Raises FileNotFoundError where what was locked has lost its name meanwhile, and OSError where another process holds it (with
    `wait` it waits instead) or nothing can be locked there.
    """
    lock = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not os.path.samestat(os.fstat(lock), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    except OSError:
        os.close(lock)
        raise
    return lock


@cache
def system_mark() -> str:
    """Eight characters that tell this running system from others, whose locks cannot be seen here."""
    return hashlib.sha256(running_system().encode()).hexdigest()[:8]


@cache
def running_system() -> str:
    """Return a name for the time since the system's last start; empty where the system does not tell."""
    try:
        if sys.platform == "darwin":
            words = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
            return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        return BOOT_ID.read_text().strip()
    except (OSError, subprocess.SubprocessError):
        return ""
