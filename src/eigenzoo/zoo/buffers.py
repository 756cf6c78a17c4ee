"""Memory that blocks of weights are read into, lent and taken back: fresh pages cost more than reading into used ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_lock = threading.Lock()
_free: list[Tensor] = []


@contextmanager
def borrow(rows: int, columns: int, dtype: torch.dtype, *, pinned: bool = False) -> Iterator[Tensor]:
    """Lend a (rows, columns) tensor of unspecified values; its memory goes back when the context is left.

    Pinned memory is what a GPU copies from while it computes; it is not kept.
    """
    num_bytes = rows * columns * dtype.itemsize
    if pinned:
        yield torch.empty(rows, columns, dtype=dtype, pin_memory=True)
        return
    memory = _take(num_bytes)
    try:
        yield memory[:num_bytes].view(dtype).view(rows, columns)
    finally:
        with _lock:
            _free.append(memory)


def _take(num_bytes: int) -> Tensor:
    """Take the smallest free memory that is large enough, else let go of a smaller one for a new one."""
    with _lock:
        _free.sort(key=len)
        for place, memory in enumerate(_free):
            if len(memory) >= num_bytes:
                return _free.pop(place)
        if _free:
            _free.pop()
    # By numpy, which asks for large pages: they are cleared and found in a fraction of the time.
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))


def release() -> None:
    """Let go of all memory that is not lent."""
    with _lock:
        _free.clear()
