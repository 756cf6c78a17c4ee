"""Plain adapters for engines that know nothing of subspaces: rebuilt from a bundle on demand, kept in a cache folder.

    <cache>/handed-out/<model>-<hash of the basis and of the model's coefficients>/

Engines read an adapter's files again after they have evicted it, and some keep results by its name and path. So a folder never
changes, its name says which numbers are in it, and no folder is deleted while a process that hands out adapters lives.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import uuid
from pathlib import Path

from eigenzoo.errors import MismatchError, ResourceError, UnsupportedError
from eigenzoo.formats.cache_folder import cache_folder
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.adapter_verifying import verify_adapter
from eigenzoo.zoo.verification import LOADING

FOLDER, LOCK = "handed-out", ".lock"

MAX_BYTES = 20 * 10**9
"""Default bound of the folder's size."""


class HandedOut:
    """A folder of rebuilt adapters. Its methods may be called by several threads, and several processes may share it.

    Args:
        space: a bundle of LoRA updates.
        base: the model that the adapters change, as a local checkpoint. An adapter that does not fit it is not handed out.
        folder: where the adapters are kept. Default: in eigenzoo's cache folder.
        max_bytes: bound of the folder's size. Old adapters are deleted only when no process uses the folder.

    Raises UnsupportedError for a bundle of other models than LoRA adapters.
    """

    def __init__(
        self, space: Subspace, base: Path | None = None, folder: Path | None = None, max_bytes: int = MAX_BYTES
    ) -> None:
        if space.view != "update":
            raise UnsupportedError(
                f"the bundle has view {space.view!r}",
                where=str(space.path),
                rule="engines load LoRA adapters, which are models of view 'update'",
                next_step="serve it with eigenzoo serve, or rebuild whole models",
            )
        self.space, self.base, self.max_bytes = space, base, max_bytes
        self.folder = (cache_folder() / FOLDER if folder is None else folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._each: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._checked: set[str] = set()
        self._lock = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process hands out adapters
            pass
        else:
            self._prune()
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def path(self, name: str) -> Path:
        """Return the folder of a model's adapter, which is rebuilt if it is not there yet.

        Raises UsageError for a model that the bundle does not have, MismatchError for one that does not fit the base, and
        ResourceError if the folder would grow beyond its bound.
        """
        target = self.folder / self._folder_of(name)
        with self._guard:
            lock = self._each.setdefault(target.name, threading.Lock())
        with lock:
            if not target.exists():
                self._make(name, target)
            if target.name not in self._checked:
                self._check(name, target)
            self._checked.add(target.name)
            os.utime(target)
        return target

    @property
    def max_rank(self) -> int:
        """The largest rank of an update that is handed out."""
        return max(self.space.largest_ranks.values())

    def close(self) -> None:
        """Let other processes delete old adapters."""
        os.close(self._lock)

    def _folder_of(self, name: str) -> str:
        """Return the folder's name. The model's own name is only for people, and has no part of a path in it."""
        coefficients = self.space.coefficients(name)
        digest = hashlib.sha256(f"{self.space.manifest.basis_id}\n{name}\n".encode())
        for layer, values in sorted(coefficients.values.items()):
            digest.update(layer.encode())
            digest.update(values.contiguous().numpy().tobytes())
        shown = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:60]
        return f"{shown}-{digest.hexdigest()[:24]}"

    def _make(self, name: str, target: Path) -> None:
        size = _size(self.folder)
        if size > self.max_bytes:
            raise ResourceError(
                f"{size / 1e9:.1f} GB of adapters are kept",
                where=str(self.folder),
                rule=f"at most {self.max_bytes / 1e9:.1f} GB may be, and none is deleted while a server lives",
                next_step="stop the servers that use this folder: the next one deletes the oldest adapters",
            )
        made = self.folder / f".{target.name}-{uuid.uuid4().hex}"
        try:
            self.space.rebuild(name).save(made)
            self._check(name, made)
            self._checked.add(target.name)
            made.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, and has written the same
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _check(self, name: str, adapter: Path) -> None:
        """Raise MismatchError unless an adapter takes effect on the base."""
        found = verify_adapter(adapter, self.base)
        # Without an attempt to load it, shapes that differ are only notes of a check that could not be made.
        wrong = [check for check in found.checks if check.faults or (not check.done and check.name != LOADING)]
        if wrong:
            raise MismatchError(
                f"its adapter does not fit the base: {wrong[0].name}: {[*wrong[0].faults, *wrong[0].notes][0]}",
                where=f"model '{name}'",
                rule=f"the base is {self.base}",
                next_step="serve the base that the zoo's adapters were trained on",
            )

    def _prune(self) -> None:
        """Delete the adapters that were used longest ago, until the folder has half of its bound."""
        kept = sorted(
            (entry for entry in self.folder.iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime
        )
        sizes = [_size(entry) for entry in kept]
        total = sum(sizes)
        for entry, size in zip(kept, sizes, strict=True):
            if total <= self.max_bytes // 2:
                return
            shutil.rmtree(entry)
            total -= size


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
