"""Ranges of remote files, many at once, straight into the caller's memory."""

from __future__ import annotations

from collections.abc import Sequence

from eigenzoo.errors import EigenzooError
from eigenzoo.formats.remote.retrying import Job, run_jobs
from eigenzoo.formats.remote.source import Answer, RemoteFile, read_range

PIECE_BYTES = 16 * 2**20
"""A longer range is read in pieces: several at once, and less to read again."""

Request = tuple[RemoteFile, int, memoryview]
"""A file, the first byte that is read, and writable memory of as many bytes as are read."""


class _Piece(Job):
    def __init__(self, number: int, file: RemoteFile, start: int, view: memoryview) -> None:
        self.number, self.url = number, file.url
        self._answer = Answer(file, start, view)

    def run(self) -> bool:
        read_range(self._answer)
        return self._answer.left == 0

    def size(self) -> int:
        return self._answer.left


def fetch(requests: Sequence[Request]) -> None:
    """Fill every request's memory, or raise the first one's FormatError.

    At most 32 requests and 64 MB are under way at a time. A broken connection is taken up where it broke, after a delay
    of its own that grows from 0.1 s to 10 s; a piece is given up after eight attempts in a row that bring nothing.
    """
    for error in fetch_each(requests):
        if error is not None:
            raise error


def fetch_each(requests: Sequence[Request]) -> list[EigenzooError | None]:
    """Fill every request's memory where that can be done; returns each one's error or None."""
    pieces = [
        _Piece(number, file, start + first, view[first : first + PIECE_BYTES])
        for number, (file, start, view) in enumerate(requests)
        for first in range(0, len(view), PIECE_BYTES)
    ]
    errors: list[EigenzooError | None] = [None] * len(requests)
    for piece, error in zip(pieces, run_jobs(pieces), strict=True):
        errors[piece.number] = errors[piece.number] or error
    return errors


def fetch_whole(file: RemoteFile) -> bytes:
    """Read a whole file; its size is the caller's to check."""
    data = bytearray(file.size)
    fetch([(file, 0, memoryview(data))])
    return bytes(data)
