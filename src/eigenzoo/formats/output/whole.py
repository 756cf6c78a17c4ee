"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from eigenzoo.errors import OutputError
from eigenzoo.formats.output.held_folder import HeldFolder, locked, sweep
from eigenzoo.formats.output.own import Foreign, everything
from eigenzoo.formats.output.renaming import exchange, rename_new

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a disk answers that takes nothing more: not what is wrong with a file that is read."""


RULE = "--force (force=True) replaces only an output of the same kind that eigenzoo wrote"
NEXT_STEP = "choose another name, or move it away"

Own = Callable[[Path], bool]
"""Called with a file that is to be replaced; tells whether eigenzoo wrote it, as an output of the same kind."""


def nothing(path: Path) -> bool:
    """Know no file as an own output."""
    return False


def no_check() -> None:
    """Accept everything."""


@contextmanager
def new_folder(
    target: Path,
    *,
    force: bool = False,
    foreign: Foreign = everything,
    check: Callable[[], object] = no_check,
) -> Iterator[Path]:
    """Give a temporary folder beside `target` to fill; it takes the target's name at the end, or vanishes on any error.

    An existing target is refused; with `force` it is replaced in one step, but only where `foreign` finds nothing in it that
    eigenzoo did not write as an output of this kind (`own.recorded`): nobody's other file is ever removed. `check` is called last,
    when no other process can replace the target, and raises where it should stay. What killed processes have left beside the
    target is removed.
    """
    check_free(target, force=force, foreign=foreign)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore(target)
        staging = HeldFolder(target.parent, _prefix(target))
    except OSError as error:
        raise OutputError(f"cannot be created ({error.strerror})", where=str(target)) from error
    try:
        with clear_errors(target):
            yield staging.path
            _sync(staging.path)
            with _locked(target):
                check_free(target, force=force, foreign=foreign)
                check()
                _rename_to_target(staging.path, target)
    finally:
        staging.remove()


@contextmanager
def clear_errors(target: Path | None) -> Iterator[None]:
    """Turn what a full or failing disk answers into an OutputError that names the output."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = str(target) if target is not None else str(error.filename or "")
        raise OutputError(f"cannot be written ({error.strerror})", where=where) from error
    except SafetensorError as error:  # as the library's own writer says it, by which the nursery's models are saved
        number = int(found[1]) if (found := re.search(r"os error (\d{1,4})", str(error))) else 0
        if number not in _NO_ROOM:
            raise
        where = str(target) if target is not None else ""
        raise OutputError(f"cannot be written ({os.strerror(number)})", where=where) from error


def check_free(target: Path, *, force: bool = False, foreign: Foreign = everything) -> None:
    """Raise OutputError unless `target` is free, or may be replaced; call it before long work starts."""
    if not target.name:
        raise OutputError("is not a valid name for a new folder", where=str(target))
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(
            "exists already", where=str(target), next_step="choose another name, or --force (force=True) to replace it"
        )
    if target.is_symlink() or not target.is_dir():
        raise OutputError("is not a folder", where=str(target), rule=RULE)
    try:
        stranger = foreign(target) if any(target.iterdir()) else ""
    except OSError as error:
        stranger = f"cannot be listed ({error.strerror})"
    if stranger:
        raise OutputError(stranger, where=str(target), rule=RULE, next_step=NEXT_STEP)


def check_free_file(target: Path, *, force: bool = False, own: Own = nothing) -> None:
    """Raise OutputError unless a file can be written there.

    The name is free, or it is that of a plain file which `force` may replace: an empty one, or one that `own` knows as an output of
    this kind. Makes the folders above; call it before long work starts.
    """
    if not target.name:
        raise OutputError("is not a valid name for a file", where=str(target))
    if os.path.lexists(target):
        if target.is_symlink() or not target.is_file():
            raise OutputError("is not a regular file", where=str(target), next_step="choose another name")
        if not force:
            raise OutputError(
                "exists already",
                where=str(target),
                next_step="choose another name, or --force (force=True) to replace it",
            )
        if target.stat().st_size and not own(target):
            raise OutputError("is a file of another kind", where=str(target), rule=RULE, next_step=NEXT_STEP)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=str(target)) from error


def write_file(target: Path, text: str, *, force: bool = False, own: Own = nothing) -> Path:
    """Write a text file under a temporary name beside its own, flush it, and rename it; returns its path."""
    with new_file(target, force=force, own=own) as staging, staging.open("x", encoding="utf-8") as file:
        file.write(text)
    return target


@contextmanager
def new_file(target: Path, *, force: bool = False, own: Own = nothing) -> Iterator[Path]:
    """Give a name beside `target` for a file; flushed, it takes the target's name, or vanishes on any error.

    With `force` it replaces a file that `own` knows as an output of this kind.
    """
    check_free_file(target, force=force, own=own)
    try:
        folder = HeldFolder(target.parent, _prefix(target))
        try:
            staging = folder.path / target.name
            yield staging
            with staging.open("rb") as file:
                os.fsync(file.fileno())
            check_free_file(target, force=force, own=own)
            _name_file(staging, target, force=force)
        finally:
            folder.remove()
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=str(target)) from error


def remove_left(target: Path) -> None:
    """Remove what processes that were killed while they wrote `target` have left beside it."""
    sweep(target.parent, _prefix(target))


def _prefix(target: Path) -> str:
    return f".{target.name[:100]}.tmp-"


def _name_file(staging: Path, target: Path, *, force: bool) -> None:
    if force:
        staging.replace(target)
        return
    try:
        rename_new(staging, target)
    except FileExistsError:
        check_free_file(target)
        raise


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other processes from replacing an existing folder meanwhile; where folders cannot be locked, nothing does."""
    lock = _lock_target(target)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock_target(target: Path) -> int | None:
    while os.path.lexists(target):
        try:
            return locked(target, wait=True)
        except FileNotFoundError:  # who had it has put another folder there meanwhile
            continue
        except OSError:
            return None
    return None


def _rename_to_target(staging: Path, target: Path) -> None:
    """Give the folder its name; what had it before is in `staging` then, or gone."""
    if not os.path.lexists(target):
        try:
            rename_new(staging, target)
        except FileExistsError:
            check_free(target)
            raise
        _sync_names(target.parent)
        return
    if exchange(staging, target):
        _sync_names(target.parent)
        return
    old = target.parent / f".{target.name[:100]}.old-{secrets.token_hex(4)}"
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _sync_names(target.parent)
    shutil.rmtree(old)


def _restore(target: Path) -> None:
    """Give a folder its name back that a process had moved aside when it was killed: where no exchange is possible."""
    own = re.compile(re.escape(f".{target.name[:100]}.old-") + "[0-9a-f]{8}")
    for name in sorted(os.listdir(target.parent)):
        if own.fullmatch(name):
            if os.path.lexists(target):
                shutil.rmtree(target.parent / name, ignore_errors=True)
            else:
                (target.parent / name).rename(target)


def _sync(folder: Path) -> None:
    """Flush every file of the folder, then the folder, so that a rename never shows a name without its bytes."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Flush a folder's names: the old output is not removed before the new one has its name for good."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
