"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eigenzoo.errors import OutputError


@contextmanager
def new_folder(
    target: Path, *, force: bool = False, replaceable: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Give a temporary folder beside `target` to fill; it takes the target's name at the end, or vanishes on any error.

    An existing target is refused; with `force` it is replaced, but only where `replaceable` says that it is an output of
    this kind: nobody's other folder is ever removed.
    """
    check_free(target, force=force, replaceable=replaceable)
    staging = target.parent / f".{target.name[:100]}.tmp-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", where=str(target)) from error
    try:
        yield staging
        _sync(staging)
        check_free(target, force=force, replaceable=replaceable)
        _put_in_place(staging, target)
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def check_free(target: Path, *, force: bool = False, replaceable: Callable[[Path], bool] | None = None) -> None:
    """Raise OutputError unless `target` is free, or may be replaced; call it before long work starts."""
    if not target.name:
        raise OutputError("is no name for a new folder", where=str(target))
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(
            "exists already", where=str(target), next_step="choose another name, or --force to replace it"
        )
    if target.is_symlink() or not target.is_dir():
        raise OutputError("is no folder", where=str(target), rule="--force replaces folders of the same kind only")
    if any(target.iterdir()) and not (replaceable and replaceable(target)):
        raise OutputError(
            "is a folder of another kind",
            where=str(target),
            rule="--force replaces folders of the same kind only",
            next_step="choose another name",
        )


def check_free_file(target: Path, *, force: bool = False) -> None:
    """Raise OutputError unless a file can be written there: the name free, or a plain file that `force` may replace.

    Makes the folders above; call it before long work starts.
    """
    if not target.name:
        raise OutputError("is no name for a file", where=str(target))
    if os.path.lexists(target):
        if target.is_symlink() or not target.is_file():
            raise OutputError("is no plain file", where=str(target), next_step="choose another name")
        if not force:
            raise OutputError(
                "exists already", where=str(target), next_step="choose another name, or --force to replace it"
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=str(target)) from error


def write_file(target: Path, text: str, *, force: bool = False) -> Path:
    """Write a text file under a temporary name beside its own, flush it, and rename it; returns its path."""
    with new_file(target, force=force) as staging:
        staging.write_text(text, encoding="utf-8")
    return target


@contextmanager
def new_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary name beside `target` for a file; flushed, it takes the target's name, or vanishes on any error."""
    check_free_file(target, force=force)
    staging = target.parent / f".{target.name[:100]}.tmp-{secrets.token_hex(4)}"
    try:
        yield staging
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        check_free_file(target, force=force)
        staging.rename(target)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=str(target)) from error
    finally:
        staging.unlink(missing_ok=True)


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = target.parent / f".{target.name}.old-{secrets.token_hex(4)}"
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _sync(folder: Path) -> None:
    """Flush every file of the folder, then the folder, so that a rename never shows a name without its bytes."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
