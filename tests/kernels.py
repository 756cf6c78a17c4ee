"""Run the numerical tests by other kernels than this processor's own: `python tests/kernels.py`, each in a process of its own.

Products and decompositions round otherwise on other processors: OpenBLAS (numpy, scipy), MKL (torch's) and torch itself choose
their code when they are loaded. A bound that holds by one kernel alone is no bound.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
NUMERICAL = (
    *("linalg", "reference", "evidence", "growth"),
    *(f"adapt/test_{name}.py" for name in ("attach", "augment", "calibrate", "continual", "lora_init", "maps")),
    *(f"scale/test_scale_{name}.py" for name in ("precision", "spans")),
    "roundtrip/test_gauge.py",
)
"""Folders and files whose statements are about products, decompositions and what is made of them."""

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


def main() -> int:
    """Run pytest once per kernel, with this program's arguments; returns how many runs failed."""
    failed, paths = 0, [f"tests/{name}" for name in ("test_kernels.py", *NUMERICAL)]
    for kernel in KERNELS:
        named = " ".join(f"{name}={value}" for name, value in kernel.environment.items())
        if reason := why_not(kernel):
            print(f"skipped: {named}: {reason}", flush=True)
            continue
        print(f"numerical tests with {named}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "numerical and not slow", *sys.argv[1:], *paths]
        failed += (
            subprocess.run(command, cwd=ROOT, env={**os.environ, **kernel.environment}, check=False).returncode != 0
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
