"""What a parser may take for an input of a few kilobytes: memory and processor time."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = 2**30
"""Address space beyond what the process has already: buffers of the code itself, and no size out of a file."""


@contextmanager
def limited_memory(num_bytes: int = MEMORY) -> Iterator[None]:
    """Let the process take no more address space than so much beyond what it has: more is a MemoryError or RuntimeError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds of the process's own time, which others cannot lengthen."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
