"""Memory and cores that this process may use: those of the machine, or fewer if a container limits them.

Limits are those of control groups, version 1 and 2 (Docker, Kubernetes, Slurm and systemd set them), of `ulimit -v`, and of
`taskset`. A limit of an outer group holds for its inner groups too, so all groups up to the root are read.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from math import ceil
from pathlib import Path

import torch

MOST_CHARACTERS = 4096
"""Of a group's name, which is a path, and of a file with a limit: a container's own file system may hold anything there."""

ROOT = Path("/")
"""Where `proc` and `sys` are."""


def machine_memory() -> int:
    """Return the bytes of memory that this process may use at most, whatever others use of it now."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    for folder in _groups("memory"):
        for file in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limits += [int(word) for word in _words(folder / file) if _is_number(word)]
    return min(limits)


def num_cores() -> int:
    """Return how many threads of this process can run at once: one at least."""
    # macOS has no affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu"):
        quota = _words(folder / "cpu.max") or [
            word for name in ("quota", "period") for word in _words(folder / f"cpu.cfs_{name}_us")
        ]
        # Without a limit the quota is "max", in version 1 it is -1.
        if len(quota) == 2 and all(_is_number(word) and int(word) for word in quota):
            cores = min(cores, ceil(int(quota[0]) / int(quota[1])))
    return max(cores, 1)


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups that may limit memory or cores, from its own to the root."""
    lines = list[str]()
    with suppress(OSError, UnicodeDecodeError):
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        controllers, _, group = line.partition(":")[2].partition(":")
        if len(group) > MOST_CHARACTERS or (controllers and controller not in controllers.split(",")):
            continue
        # Version 2 has one tree and names no controller. A container may see its own group as the root of the tree.
        top = ROOT / "sys/fs/cgroup" / (controller if controllers else "")
        folder = top / group.lstrip("/")
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


def _words(path: Path) -> list[str]:
    with suppress(OSError, UnicodeDecodeError), path.open() as file:
        return file.read(MOST_CHARACTERS).split()
    return []


def _is_number(word: str) -> bool:
    # No kernel writes a longer one, and Python refuses to read some of them.
    return word.isdecimal() and len(word) <= 20


def gpu_memory(device: str) -> int:
    """Return the bytes of a GPU's memory that are free, or that torch holds and does not use."""
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    # macOS counts bytes, Linux kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
