"""Tensors as raw bytes: reading from and writing to a place in a file, with conversion through a bounded scratch."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from io import FileIO

import torch
from torch import Tensor

from eigenzoo.errors import FormatError, UnsupportedError, UsageError

# Small enough to stay in the second-level cache of a core while it is converted.
_SCRATCH_BYTES = 2**20
# More at once is no faster, and where the system then takes larger pages for its cache up to six times as slow.
_WRITE_BYTES = 2**18
MOST_VIEWS = 512
"""Views that one call fills: half of what Linux takes."""

_thread = threading.local()
# Several threads may read and write one open file by position; where a system lacks it, they must take turns.
_POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwrite")


def as_bytes(tensor: Tensor) -> memoryview:
    """View a contiguous CPU tensor's memory as bytes, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_values(file: FileIO, position: int, dtype: torch.dtype, out: Tensor, where: str) -> None:
    """Fill `out` with the values of `dtype` that lie at byte `position`: straight into its memory if dtypes agree."""
    out = out.detach()
    if out.dtype == dtype:
        read_into(file, position, as_bytes(out), where)
        return
    if dtype.is_complex and not out.dtype.is_complex:
        raise UnsupportedError(f"complex values cannot be read as {out.dtype}", where=where)
    scratch = _scratch()
    step = _SCRATCH_BYTES // dtype.itemsize
    for start in range(0, out.numel(), step):
        part = out[start : start + step]
        raw = scratch[: part.numel() * dtype.itemsize]
        read_into(file, position + start * dtype.itemsize, as_bytes(raw), where)
        part.copy_(raw.view(dtype))


def value_bytes(values: Tensor) -> memoryview:
    """Return a tensor's values, row-major, as bytes; without a copy where they lie like that in main memory."""
    return as_bytes(values.detach().resolve_conj().to("cpu").contiguous())


def write_values(file: FileIO, position: int, values: Tensor) -> None:
    """Write a tensor's values, row-major, at byte `position`."""
    write_bytes(file, position, value_bytes(values))


def write_bytes(file: FileIO, position: int, data: bytearray | memoryview) -> int:
    """Write bytes at a position, however many calls that takes; returns the position after them."""
    view = memoryview(data)
    while view:
        count = (
            os.pwrite(file.fileno(), view[:_WRITE_BYTES], position) if _POSITIONAL else _at(file, position).write(view)
        )
        view, position = view[count:], position + count
    return position


def check_out(out: Tensor, count: int) -> None:
    """Check that `out` can take `count` values in place."""
    if out.dim() != 1 or out.numel() != count or not out.is_contiguous() or out.device.type != "cpu":
        raise UsageError(
            f"out has shape {tuple(out.shape)} on {out.device}",
            rule=f"a contiguous tensor of {count} values in main memory is needed",
        )


def _scratch() -> Tensor:
    """One scratch buffer per thread: fresh memory costs more than the read itself."""
    buffer: Tensor | None = getattr(_thread, "buffer", None)
    if buffer is None:
        buffer = _thread.buffer = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8)
    return buffer


def read_into(file: FileIO, position: int, view: memoryview, where: str) -> None:
    """Fill a view with the bytes at a position."""
    while view:
        count = os.preadv(file.fileno(), [view], position) if _POSITIONAL else _at(file, position).readinto(view)
        if not count:
            raise FormatError("the file ended before its tensor did", where=where)
        view, position = view[count:], position + count


def scatter(file: FileIO, position: int, views: Sequence[memoryview]) -> bool:
    """Fill views, `MOST_VIEWS` at most, with the bytes that follow one another from a position; tells whether one call did."""
    return _POSITIONAL and os.preadv(file.fileno(), views, position) == sum(map(len, views))


def _at(file: FileIO, position: int) -> FileIO:
    file.seek(position)
    return file
