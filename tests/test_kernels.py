"""The kernels that `kernels.py` asks for are those that run; how they are chosen, and when they are left out."""

from __future__ import annotations

import os

import numpy as np
import pytest
import scipy.linalg
import torch
from threadpoolctl import threadpool_info

from kernels import KERNELS, share_of, shares_of, why_not

ASKED = os.environ.get("OPENBLAS_CORETYPE")


@pytest.mark.numerical
@pytest.mark.skipif(ASKED is None, reason="no kernel is asked for: `make test-kernels` asks for several")
def test_the_kernels_that_were_asked_for_run() -> None:
    np.ones((2, 2)) @ scipy.linalg.inv(np.eye(2))
    running = {library["architecture"] for library in threadpool_info() if library["internal_api"] == "openblas"}
    assert running == {ASKED}, "OpenBLAS runs another kernel than was asked for, or numpy runs another library"
    if "ATEN_CPU_CAPABILITY" in os.environ:
        assert torch.backends.cpu.get_cpu_capability() == os.environ["ATEN_CPU_CAPABILITY"].upper()


@pytest.mark.parametrize(
    ("machine", "here", "left_out"),
    [
        ("x86_64", "AVX512", set()),
        ("x86_64", "AVX2", {"SkylakeX"}),
        ("x86_64", "DEFAULT", {"SkylakeX", "Haswell"}),
        ("arm64", "DEFAULT", {"SkylakeX", "Haswell", "Nehalem"}),
    ],
)
def test_a_kernel_that_the_processor_cannot_execute_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, machine: str, here: str, left_out: set[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: here)
    reasons = {kernel.openblas: why_not(kernel) for kernel in KERNELS}
    assert {name for name, reason in reasons.items() if reason} == left_out
    assert all(machine in reason or here in reason for reason in reasons.values() if reason)


@pytest.mark.parametrize("num_kernels", [1, 2, 3])
def test_every_further_row_is_run_by_one_kernel(num_kernels: int) -> None:
    shares = [share_of(f"tests/test_x.py::test_y[{row}]") for row in range(600)]
    runs = [sum(shares.count(share) for share in shares_of(place, num_kernels)) for place in range(num_kernels)]
    assert sum(runs) == len(shares)
    assert min(runs) > 0.8 * len(shares) / num_kernels
