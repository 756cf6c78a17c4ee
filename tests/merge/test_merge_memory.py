"""Memory of a merge above the imports, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merging_cases import ELEMENTS, GRAM, IN_CORE, PAIRS

from builders import random_factors, seeded, write_adapter, write_model

ROOT = Path(__file__).parent.parent.parent
MOST = 128_000_000
SIDE = 16_384

PROGRAM = """
import json, sys
import torch
import eigenzoo as ez
import eigenzoo.merge.merging
from bench import machine

paths, base, methods, out = json.loads(sys.argv[1])
torch.linalg.svd(torch.linalg.qr(torch.ones(9, 4, dtype=torch.float64))[0])  # loads LAPACK
imports, found = machine.rss(), {}
for method, count in methods:
    machine.reset_peak()
    ez.merge(paths[:count], method, base=base).save(out, force=True)
    found[method] = machine.peak() - imports
print(json.dumps(found))
"""


def peaks(root: Path, paths: list[Path], methods: list[tuple[str, int]], base: Path | None = None) -> dict[str, int]:
    words = json.dumps([list(map(str, paths)), base and str(base), methods, str(root / "out")])
    done = subprocess.run([sys.executable, "-c", PROGRAM, words], capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "methods",
    [
        ("tsv",),
        pytest.param(
            (*GRAM, *PAIRS, *IN_CORE, *(each for each in ELEMENTS if each != "knots_ties")), marks=pytest.mark.slow
        ),
    ],
    ids=["one", "all"],
)
def test_adapters_of_large_layers_take_little_memory(tmp_path: Path, methods: tuple[str, ...]) -> None:
    """Four of rank 8 on 16,384 × 16,384, one of which is 1 GB in float32. knots_ties works on columns, which are no core."""
    modules = {"layers.0.up": (SIDE, SIDE)}
    paths = [write_adapter(tmp_path / f"m{place}", random_factors(modules, 8, place)) for place in range(4)]
    found = peaks(tmp_path, paths, [(method, 2 if method in PAIRS else 4) for method in methods])
    assert max(found.values()) < MOST, found


@pytest.mark.slow
def test_checkpoints_take_the_memory_of_some_rows(tmp_path: Path) -> None:
    """Three layers of 4,096 × 4,096 in bfloat16, 32 MiB each: in float64 one layer of four models would be 537 MB.

    Two layers are merged at a time, and up to four that are merged wait to be written.
    """
    paths = []
    for place in range(5):
        draw = seeded(place)
        tensors = {f"layers.{n}.weight": torch.randn(4096, 4096, generator=draw).bfloat16() for n in range(3)}
        paths.append(write_model(tmp_path / f"m{place}", tensors))
    found = peaks(tmp_path, paths[1:], [("task_arithmetic", 4)], base=paths[0])
    assert max(found.values()) < 537_000_000 + 4 * 2**25, found
