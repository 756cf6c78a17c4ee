"""Run one measurement as a whole process of its own, with its threads set, and stop it where it takes too much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.machine import thread_environment

ROOT = Path(__file__).parent.parent
EVERY = 0.05
"""Seconds between two looks at a child: rare enough to cost it nothing; it cannot take the last fifth of the memory in between."""


@dataclass(frozen=True)
class Limits:
    """Seconds a child may take, and the share of the memory that is free when it starts."""

    seconds: float = 900.0
    memory: float = 0.8


NO_LIMITS = Limits(seconds=float("inf"))


def run(
    module: str, arguments: Sequence[str], threads: int, limits: Limits = NO_LIMITS, folder: Path | None = None
) -> dict[str, Any]:
    """Return the JSON line that `python -m module` prints, with its time from start to end; or `failed` and why.

    In `folder`, or where temporary files go, it has a cache of its own for what eigenzoo keeps.
    """
    allowed = limits.memory * psutil.virtual_memory().available
    environment = thread_environment(threads)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryDirectory(dir=folder) as cache,
    ):
        # eigenzoo keeps moments between runs: here every run begins with nothing kept, and its keeping counts.
        environment["EIGENZOO_CACHE"] = cache
        started = time.perf_counter()
        command = [sys.executable, "-m", module, *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        try:
            stopped = _watch(process, started, limits.seconds, allowed)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        took = time.perf_counter() - started
        output.seek(0)
        errors.seek(0)
        lines, said = output.read().decode().splitlines(), errors.read().decode()
    if stopped:
        return {"failed": stopped, "process": took}
    if process.returncode:
        last = said.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        return {"failed": last[0], "process": took, "stderr": said[-4000:]}
    return {**json.loads(lines[-1]), "process": took}


def _watch(process: subprocess.Popen[bytes], started: float, seconds: float, allowed: float) -> str | None:
    """Wait for a child; returns why it was stopped, or None where it came to its end."""
    seen = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            used = seen.memory_info().rss
        except psutil.NoSuchProcess:
            return None
        if used > allowed:
            return f"stopped at {used / 1e9:.1f} GB of memory"
        if time.perf_counter() - started > seconds:
            return f"stopped after {seconds:.0f} s"
        time.sleep(EVERY)
    return None
