"""What a parser may take for an input of a few kilobytes: memory and time."""

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
def limited_time(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds: for what would hang, not for what is slow."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
