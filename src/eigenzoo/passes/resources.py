"""Resources of a pass: memory for blocks, and the device that products run on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from eigenzoo.errors import ResourceError, UsageError
from eigenzoo.passes.machine import gpu_memory, machine_memory

SPAN_BYTES = 128 * 2**20
"""Bytes of one span: a layer is cut into spans by its shape and its number of models alone, so that sums over them are the same to
the last bit however many workers there are."""

LEAST_MEMORY = 16 * 2**20
"""The least `max_memory`: with less, a block would be a few rows."""

SHARE_OF_RAM = 4
"""Blocks take a quarter of the memory of the machine, or of the container, at most, unless asked otherwise."""

SHARE_OF_GPU = 2
"""Blocks take at most half of a GPU's free memory, because products and bases need memory there too."""

MOST_ON_A_GPU = 8
"""Tasks that share a GPU: enough to keep it busy with reads, and few enough that each has a useful share of its memory."""

MAX_LAYER_BYTES = 3 * SPAN_BYTES
"""A layer whose rows take more bytes is read again for its basis (usually from the page cache), so that memory stays bounded."""


@dataclass(frozen=True)
class Resources:
    """Bounds of one task.

    Attributes:
        block_bytes: of one block of weights.
        layer_bytes: of a layer that stays in memory from its moments to its basis.
        device: where products run: `cpu`, `cuda`, `cuda:1`.
    """

    block_bytes: int = SPAN_BYTES
    layer_bytes: int = MAX_LAYER_BYTES
    device: str = "cpu"


def resources_for(num_workers: int, max_memory: int | None = None, device: str = "cpu") -> Resources:
    """Divide the memory (a quarter of the machine's by default; on a GPU half of what is free there at most) among tasks.

    Raises UsageError for less than `LEAST_MEMORY`, and for a device that is not there.
    """
    check_device(device)
    check_memory(max_memory)
    if max_memory is None:
        max_memory = machine_memory() // SHARE_OF_RAM
    if device != "cpu":
        # A new thread starts with the first GPU, whichever GPU the caller has chosen.
        device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        free = gpu_memory(device) // SHARE_OF_GPU
        # A power of two, because a fit resumes only under the same bounds, while free memory changes a little.
        max_memory = min(max_memory, 1 << max(free.bit_length() - 1, 0))
    # A task holds its rows and, briefly, the results computed from them.
    share = max(2**20, max_memory // (2 * max(num_workers, 1)))
    return Resources(min(SPAN_BYTES, share), min(MAX_LAYER_BYTES, share), device)


def most_workers(num_workers: int, device: str) -> int:
    """Return how many of so many workers may run at once on a device."""
    return num_workers if device == "cpu" else min(num_workers, MOST_ON_A_GPU)


def check_memory(max_memory: int | None) -> None:
    """Raise UsageError for less than `LEAST_MEMORY`."""
    if max_memory is not None and max_memory < LEAST_MEMORY:
        raise UsageError(
            f"{max_memory:,} bytes of memory are too few", rule=f"blocks need at least {LEAST_MEMORY:,} bytes"
        )


def check_agrees(resources: Resources, max_memory: int | None, device: str) -> None:
    """Raise UsageError for a device or memory that workers, which are open already, do not have."""
    check_name(device)
    if max_memory is not None:
        raise UsageError(
            f"max_memory {max_memory:,} does not apply to open workers",
            rule="workers have their own memory limits",
            next_step="pass max_memory to local_workers or cluster_workers",
        )
    # The default is not a choice: "cpu" is also used if no device is named. "cuda" means any GPU.
    if device not in ("cpu", resources.device, resources.device.partition(":")[0]):
        raise UsageError(
            f"device {device!r} does not apply to workers on {resources.device!r}",
            rule="products run on the device of the workers",
            next_step="pass the device to local_workers or cluster_workers",
        )


def check_name(device: str) -> None:
    """Raise UsageError for what is not the name of a device."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", str(device)):
        raise UsageError(f"unknown device {device!r}", rule="devices are cpu, cuda and cuda:<number>")


def check_device(device: str) -> None:
    """Raise UsageError for a device that torch does not have here."""
    check_name(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and int(device.partition(":")[2] or 0) >= count:
        raise UsageError(
            f"device {device!r}, but torch sees {count or 'no'} GPU{'s' if count > 1 else ''}",
            rule="cuda needs a GPU and a torch build with CUDA",
            next_step="use --device cpu",
        )


# Texts of torch's and CUDA's RuntimeErrors for too little memory. All other errors are passed on unchanged.
_SHORT = re.compile(r"can't allocate memory|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
_ASKED = re.compile(r"allocate:? ([\d.,]+ ?\w*B\b|\d+ bytes)", re.I)


@contextmanager
def enough_memory(where: str, device: str) -> Iterator[None]:
    """Raise ResourceError, which names the place, the device and the bytes, where memory was short inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and not _SHORT.search(str(error)):
            raise
        asked = _ASKED.search(str(error))
        on_gpu = device != "cpu"
        raise ResourceError(
            f"out of memory on device {device!r}" + (f": {asked[1]} were requested" if asked else ""),
            where=where,
            rule="blocks of weights and their products must fit into memory",
            next_step=f"use a smaller --max-memory, or {'--device cpu' if on_gpu else '--exclude the layer'}",
        ) from error
