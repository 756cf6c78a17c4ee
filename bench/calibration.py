"""How often the verdict is wrong: rates over zoos of pure noise and over zoos with planted directions.

    python -m bench.calibration [--zoos 200]

Planted directions have 1.5 times the variance at which a direction can be told from noise at all (Baik, Ben Arous and Péché
2005: in units of the noise's variance per entry, the square root of D/N).
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import eigenzoo as ez

NOISE = ((8, 16), (12, 24), (24, 32), (40, 48), (80, 40))
PLANTED = ((40, 48), (80, 40), (120, 32))
"""Models, and the side of each layer's square matrix."""
SPREADS = (0.0, 0.5, 1.2)
"""Standard deviation of the logarithm of the models' norms."""
NUM_LAYERS = 8
BEYOND_THRESHOLD = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoos", type=int, default=200)
    num_zoos = parser.parse_args().zoos
    settings = itertools.product(NOISE, SPREADS)
    _print(
        f"pure noise, {NUM_LAYERS} layers, models and side {NOISE}, spread of norms {SPREADS}", num_zoos, settings, 0
    )
    for num_planted in (4, 1):
        title = f"{num_planted} planted in each of {NUM_LAYERS} layers at {BEYOND_THRESHOLD} times the threshold"
        for size in PLANTED:
            _print(f"{title}, {size[0]} models, side {size[1]}", num_zoos // len(PLANTED), [(size, 0.0)], num_planted)


def _print(title: str, num_zoos: int, settings: Iterable[tuple[tuple[int, int], float]], num_planted: int) -> None:
    chosen = itertools.islice(itertools.cycle(settings), num_zoos)
    found = Counter(_verdict(*size, spread, num_planted, seed) for seed, (size, spread) in enumerate(chosen))
    print(f"{title}: {num_zoos} zoos")
    for code, count in found.most_common():
        print(f"  {code:22} {count:4}  {100 * count / num_zoos:5.1f} %", flush=True)


def _verdict(num_models: int, side: int, spread: float, num_planted: int, seed: int) -> str:
    draw = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        stacks = {f"layer.{place}": _stack(num_models, side, spread, num_planted, draw) for place in range(NUM_LAYERS)}
        for model in range(num_models):
            save_file(
                {name: stack[model].clone() for name, stack in stacks.items()},
                Path(folder) / f"m{model:03}.safetensors",
            )
        return str(ez.evidence(folder, seed=seed).verdict.code)


def _stack(num_models: int, side: int, spread: float, num_planted: int, draw: torch.Generator) -> Tensor:
    size = side * side
    rows = torch.randn(num_models, size, generator=draw)
    if num_planted:
        strength = BEYOND_THRESHOLD * math.sqrt(size / num_models)
        directions = torch.linalg.qr(torch.randn(size, num_planted, generator=draw))[0].T
        rows += math.sqrt(strength) * torch.randn(num_models, num_planted, generator=draw) @ directions
    rows *= torch.exp(spread * torch.randn(num_models, 1, generator=draw))
    return rows.view(num_models, side, side)


if __name__ == "__main__":
    main()
