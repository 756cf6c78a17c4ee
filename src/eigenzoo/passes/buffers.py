"""Reusable memory for blocks of weights: fresh pages cost more than reading into pages that were used before."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

TOO_LARGE = 4
"""Times what is asked for that memory may have: a small tensor must not hold that of a large one."""

_lock = threading.Lock()
_free: list[Tensor] = []
_returned: SimpleQueue[Tensor] = SimpleQueue()


@contextmanager
def borrow(rows: int, columns: int, dtype: torch.dtype, *, pinned: bool = False) -> Iterator[Tensor]:
    """Lend a (rows, columns) tensor of unspecified values; its memory goes back when the context is left.

    Pinned memory is what a GPU copies from while it computes. Torch keeps it, and lends it again
    when the copies from it have ended.
    """
    num_bytes = rows * columns * dtype.itemsize
    if pinned:
        yield torch.empty(rows, columns, dtype=dtype, pin_memory=True)
        return
    memory = _take(num_bytes)
    try:
        yield memory[:num_bytes].view(dtype).view(rows, columns)
    finally:
        _give_back(memory)


def lend(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Lend a (rows, columns) tensor of unspecified values, whose memory goes back when nothing refers to it any more.

    For what is handed on: by the reference that a tensor made from an array has to it, and each view of that array to the array.
    """
    num_bytes = rows * columns * dtype.itemsize
    memory = _take(num_bytes)
    array = memory[:num_bytes].numpy()
    weakref.finalize(array, _give_back, memory).atexit = False
    return torch.from_numpy(array.view(str(dtype).removeprefix("torch.")).reshape(rows, columns))


def _give_back(memory: Tensor) -> None:
    # Python may call this anywhere, even between two steps of `_take` on the same thread. So it uses neither a lock nor that list.
    _returned.put(memory)


def _take(num_bytes: int) -> Tensor:
    """Take the smallest free memory that is large enough but not far too large. If there is none, replace one by a new one."""
    with _lock:
        while not _returned.empty():
            _free.append(_returned.get())
        _free.sort(key=len)
        for index, memory in enumerate(_free):
            if num_bytes <= len(memory) <= TOO_LARGE * num_bytes + 2**20:
                return _free.pop(index)
        if _free:
            _free.pop()
    # numpy requests large pages, which are cleared and mapped in a fraction of the time.
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))


def release() -> None:
    """Let go of all memory that is not lent."""
    with _lock:
        while not _returned.empty():
            _returned.get()
        _free.clear()
