"""The machine: what it is, the processors and threads of a measurement, and a process's own time and memory."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from eigenzoo.passes.machine import peak_memory

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
PACKAGES = ("eigenzoo", "torch", "numpy", "scipy", "scikit-learn", "tensorly", "vlora-dev", "safetensors")


def describe() -> dict[str, Any]:
    """Processor, memory, versions, and how busy the machine is with other work just now."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "processors": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "busy": psutil.cpu_percent(interval=1.0) / 100,
        "system": platform.system(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def thread_environment(threads: int) -> dict[str, str]:
    """Environment in which every BLAS and OpenMP takes this many threads."""
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}


def pin(threads: int) -> None:
    """Keep this process to as many processors as it has threads, of unlike cores first: extra threads then gain nothing."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores: dict[str, list[int]] = {}
    for processor in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        core = str(processor)
        with suppress(OSError):
            core = siblings.read_text(encoding="ascii").strip()
        cores.setdefault(core, []).append(processor)
    ranked = sorted((place, processor) for group in cores.values() for place, processor in enumerate(group))
    os.sched_setaffinity(0, {processor for _, processor in ranked[:threads]})


def rss() -> int:
    """Resident memory of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Forget the peak so far, where the system can: importing has peaks of its own."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """Peak resident memory in bytes, of this process alone: `ru_maxrss` of a child begins at its parent's."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory()


def cpu_seconds() -> float:
    """Processor time of this process so far, all threads, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Watch:
    """Wall and processor time of named phases."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        cpu, wall = cpu_seconds(), time.perf_counter()
        yield
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu_seconds() - cpu
