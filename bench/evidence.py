"""Full evidence from a bundle's stored moments, its weight files gone: seconds, and as a ratio to the eigendecompositions alone.

python -m bench.evidence [--models 500] [--layers 200]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import eigenzoo as ez
from eigenzoo.passes.machine import peak_memory

SIDE = 32
NUM_DIRECTIONS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--layers", type=int, default=200)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = _make(Path(folder), asked.models, asked.layers)
        started = time.perf_counter()
        found = ez.evidence(ez.load(bundle))
        seconds = time.perf_counter() - started
        page = time.perf_counter()
        size = len(str(found.to_dict()))
        peak = peak_memory() / 1e9
        print(f"{asked.models} models, {asked.layers} layers: {found.verdict.code}; evidence {seconds:.1f} s")
        print(f"as JSON {size / 1e6:.1f} MB in {time.perf_counter() - page:.1f} s; peak memory {peak:.2f} GB")
        one = _eigendecomposition(asked.models)
        per_layer = seconds / one / asked.layers
        print(
            f"one eigendecomposition of that size takes {one * 1e3:.0f} ms on one thread; a layer {per_layer:.0f} times that"
        )


def _make(folder: Path, num_models: int, num_layers: int) -> Path:
    """A bundle of a zoo with a few shared directions in every layer; the zoo itself is deleted."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(num_layers, NUM_DIRECTIONS, SIDE * SIDE, generator=draw)
    zoo = folder / "zoo"
    zoo.mkdir()
    for model in range(num_models):
        weights = torch.randn(num_layers, 1, NUM_DIRECTIONS, generator=draw) @ directions
        weights = weights[:, 0] + 3 * torch.randn(num_layers, SIDE * SIDE, generator=draw)
        layers = {f"layers.{place}.weight": weight.view(SIDE, SIDE) for place, weight in enumerate(weights)}
        save_file({name: layer.contiguous() for name, layer in layers.items()}, zoo / f"m{model:03}.safetensors")
    ez.fit(str(zoo), rank=1, workspace=folder).save(folder / "bundle")
    shutil.rmtree(zoo)
    return folder / "bundle"


def _eigendecomposition(num_models: int) -> float:
    gram_NN = torch.randn(num_models, num_models, dtype=torch.float64)
    gram_NN = gram_NN @ gram_NN.T
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.linalg.eigh(gram_NN)
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(threads)
    return best


if __name__ == "__main__":
    main()
