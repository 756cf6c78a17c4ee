"""What a pass may use: memory for blocks, and the device that products run on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from eigenzoo.errors import UsageError

SPAN_BYTES = 128 * 2**20
"""Bytes of one span: a layer is cut into spans by its shape and its number of models alone, so that sums over them are the same to
the last bit however many workers there are."""

LEAST_MEMORY = 16 * 2**20
"""The least `max_memory`: with less, a block would be a few rows."""

SHARE_OF_RAM = 4
"""Blocks take a quarter of the machine's memory at most, unless asked otherwise."""

MOST_KEPT = 3 * SPAN_BYTES
"""A layer whose rows take more is read again for its basis, from the page cache as a rule, and not kept: so memory stays flat."""


@dataclass(frozen=True)
class Resources:
    """Bounds of one task.

    Attributes:
        block_bytes: of one block of weights.
        kept_bytes: of a layer that stays in memory from its moments to its basis.
        device: where products run: `cpu`, `cuda`, `cuda:1`.
    """

    block_bytes: int = SPAN_BYTES
    kept_bytes: int = MOST_KEPT
    device: str = "cpu"


def resources_for(num_workers: int, max_memory: int | None = None, device: str = "cpu") -> Resources:
    """Divide the memory (a quarter of the machine's by default) among the tasks that run at once.

    Raises UsageError for less than `LEAST_MEMORY`, and for a device that is not there.
    """
    check_device(device)
    if max_memory is None:
        max_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // SHARE_OF_RAM
    elif max_memory < LEAST_MEMORY:
        raise UsageError(f"{max_memory:,} bytes of memory", rule=f"blocks take at least {LEAST_MEMORY:,} bytes")
    # A task holds its rows and, for a moment, what it makes of them.
    share = max(2**20, max_memory // (2 * max(num_workers, 1)))
    return Resources(min(SPAN_BYTES, share), min(MOST_KEPT, share), device)


def check_device(device: str) -> None:
    """Raise UsageError for a device that torch does not have here."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if device != "cpu" and (found is None or found.type != "cuda"):
        raise UsageError(f"device {device!r}", rule="devices are cpu, cuda and cuda:<number>")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found is not None and found.type == "cuda" and (found.index or 0) >= count:
        raise UsageError(
            f"device {device!r}, but torch sees {count or 'no'} GPU{'s' if count > 1 else ''}",
            rule="cuda needs a GPU and a torch build that knows it",
            next_step="use --device cpu",
        )
