"""Run the numerical tests by other kernels than this processor's own: `python tests/kernels.py`, all kernels at once.

Products and decompositions round otherwise on other processors: OpenBLAS (numpy, scipy), MKL (torch's) and torch itself choose
their code when they are loaded. A bound that holds by one kernel alone is no bound.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from zlib import crc32

import torch

ROOT = Path(__file__).parent.parent
NUMERICAL = (
    *("linalg", "reference", "evidence", "growth", "merge"),
    *(f"adapt/test_{name}.py" for name in ("attach", "augment", "calibrate", "continual", "lora_init", "maps")),
    *(f"scale/test_scale_{name}.py" for name in ("precision", "spans")),
    "roundtrip/test_gauge.py",
)
"""Folders and files whose statements are about products, decompositions and what is made of them."""

NUM_SHARES = 6
"""Of further rows, for one, two or three kernels."""

LEVELS = ("DEFAULT", "AVX2", "AVX512")
"""What a processor may execute, by torch's names, each with all before it."""


@dataclass(frozen=True)
class Kernel:
    """What is set before the libraries are loaded.

    Attributes:
        openblas: OPENBLAS_CORETYPE.
        torch: ATEN_CPU_CAPABILITY.
        mkl: MKL_CBWR.
        level: what the processor must execute, of `LEVELS`.
    """

    openblas: str
    torch: str
    mkl: str
    level: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that choose it."""
        return {"OPENBLAS_CORETYPE": self.openblas, "ATEN_CPU_CAPABILITY": self.torch, "MKL_CBWR": self.mkl}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.environment.items())


KERNELS = (
    Kernel("SkylakeX", "avx512", "AVX512", "AVX512"),
    Kernel("Haswell", "avx2", "AVX2", "AVX2"),
    Kernel("Nehalem", "default", "COMPATIBLE", "DEFAULT"),
)
"""With AVX-512, with AVX2 and with SSE. Wheels of numpy hold no code of Zen's own: they run Haswell's on it."""


def why_not(kernel: Kernel) -> str:
    """Why this processor cannot execute a kernel; empty where it can."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"a kernel of x86-64, and this is {platform.machine()}"
    here = torch.backends.cpu.get_cpu_capability()
    if here not in LEVELS or LEVELS.index(here) < LEVELS.index(kernel.level):
        return f"it needs {kernel.level}, and this processor has {here}"
    return ""


def share_of(nodeid: str) -> int:
    """Which share of all further rows a row is in; it shows the same as other rows of its test, and one kernel runs it."""
    return crc32(nodeid[::-1].encode()) % NUM_SHARES


def shares_of(place: int, num_kernels: int) -> range:
    """Shares that one kernel of several runs."""
    return range(place, NUM_SHARES, num_kernels)


def chosen(place: int, num_kernels: int) -> str:
    """Select the tests of one kernel of several: every test, but of its further rows an equal part.

    >>> chosen(0, 2)
    'numerical and not slow and (not further or further(share=0) or further(share=2) or further(share=4))'
    """
    rows = " or ".join(f"further(share={share})" for share in shares_of(place, num_kernels))
    return f"numerical and not slow and (not further or {rows})"


def main() -> int:
    """Run pytest once per kernel, with this program's arguments; returns how many runs failed."""
    usable = []
    for kernel in KERNELS:
        if reason := why_not(kernel):
            print(f"skipped: {kernel}: {reason}", flush=True)
        else:
            usable.append(kernel)
    paths = [f"tests/{name}" for name in ("test_kernels.py", *NUMERICAL)]
    # A process of its own per kernel imports and collects once; more only where there are processors for them.
    workers = (os.cpu_count() or 1) // max(len(usable), 1)
    spread = ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    failed, running = 0, []
    with ExitStack() as outputs:
        for place, kernel in enumerate(usable):
            print(f"numerical tests with {kernel}", flush=True)
            rows = chosen(place, len(usable))
            command = [sys.executable, "-m", "pytest", "-q", "-m", rows, *spread, *sys.argv[1:], *paths]
            # Their output waits in files: nobody could read the lines of several runs among each other.
            output = outputs.enter_context(TemporaryFile())
            environment = {**os.environ, **kernel.environment}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            running.append((kernel, process, output))
        for kernel, process, output in running:
            failed += process.wait() != 0
            print(f"with {kernel}:", flush=True)
            output.seek(0)
            shutil.copyfileobj(output, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main())
