"""What of some files lies in the system's page cache, and bringing them there or out of it; needs no rights but to read them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WARM, COLD = 0.99, 0.01
"""Share of the pages from which, or up to which, files count as warm or cold."""
CHUNK = 2**21


def resident(files: Sequence[Path]) -> float | None:
    """Share of the files' pages that are in memory; None where the system cannot say."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "mincore"):
        return None
    found = total = 0
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            values = np.frombuffer(mapped, np.uint8)
            address = ctypes.c_void_p(values.ctypes.data)
            failed = library.mincore(address, ctypes.c_size_t(size), pages.ctypes.data_as(ctypes.c_void_p))
            del values
        if failed:
            return None
        found, total = found + int((pages & 1).sum()), total + pages.size
    return found / total


def warm(files: Sequence[Path]) -> None:
    """Read the files once, unless they are in memory."""
    share = resident(files)
    if share is not None and share >= WARM:
        return
    buffer = bytearray(CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def evict(files: Sequence[Path]) -> float | None:
    """Ask the system to drop the files' pages; returns the share that stayed, or None where it cannot be known."""
    if not hasattr(os, "posix_fadvise"):
        return None
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # Pages that are yet to be written cannot be dropped.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return resident(files)
