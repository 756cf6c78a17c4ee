"""Files that stand where others should: Git LFS pointers, and pages that a server sent in a file's place."""

from __future__ import annotations

import re

from eigenzoo.errors import FormatError

POINTER_BYTES = 200
"""A pointer names a hash and a size: some 130 bytes."""

START_BYTES = 1000
"""By so many first bytes a page is known."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)
_PAGE = re.compile(
    rb"\s*(?:<!--.{0,500}?-->\s*)?<(?:!doctype\s+html|html|head|body|\?xml|error)\b", re.IGNORECASE | re.DOTALL
)
_ANSWERS = (
    b"Entry not found",
    b"Repository not found",
    b"Invalid username or password",
    b"Access to model",
    b'{"error":',
)
"""What the hub answers in the place of a file."""


def stand_in(start: bytes) -> FormatError | None:
    """Return what a file is that stands for another, by its first bytes and without its place; None for any other file.

    >>> stand_in(b"<!DOCTYPE html><html>").what
    'an HTML page with the name of a model file'
    """
    start = start.removeprefix(b"\xef\xbb\xbf")
    if start.startswith(_POINTER):
        size = _SIZE.search(start)
        return FormatError(
            "a Git LFS pointer, not the file itself" + (f" of {int(size[1]):,} bytes" if size else ""),
            rule="git without git-lfs leaves such a pointer instead of each large file",
            next_step="run `git lfs pull` in the repository, or download the file with `hf download`",
        )
    if _PAGE.match(start):
        return FormatError(
            "an HTML page with the name of a model file",
            rule="a server sends such a page if a file needs a login or does not exist",
            next_step="download the file itself, from the hub with `hf download`, after `hf auth login` if it is not public",
        )
    if start.startswith(_ANSWERS):
        return FormatError(
            "an answer of the hub instead of a file",
            rule=f"it says {start[:60].decode('ascii', 'replace').strip()!r}",
            next_step="download the file with `hf download`, after `hf auth login` if it is not public",
        )
    return None


def refuse_stand_in(start: bytes, where: str) -> None:
    """Raise FormatError where a file's first bytes say that it stands for another."""
    kind = stand_in(start)
    if kind is not None:
        raise FormatError(f"this is {kind.what}", where=where, rule=kind.rule, next_step=kind.next_step)
