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
from collections.abc import Sequence
from dataclasses import dataclass
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
RUN, CORRELATION = 8, 0.3
"""Entries that vary together, as those of a trained kernel do: every eighth of the eigenvalues is three times the mean."""
NUM_LAYERS = 8
BEYOND_THRESHOLD = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoos", type=int, default=200)
    num_zoos = parser.parse_args().zoos
    sizes = f"{NUM_LAYERS} layers, models and side {NOISE}"
    _print(f"pure noise, {sizes}, spread of norms {SPREADS}", num_zoos, _settings(NOISE, SPREADS, 0.0, 0))
    related = f"noise whose entries vary together in runs of {RUN} (correlation {CORRELATION})"
    _print(f"{related}, {sizes}", num_zoos, _settings(NOISE, (0.0,), CORRELATION, 0))
    for num_planted in (4, 1):
        title = f"{num_planted} planted in each of {NUM_LAYERS} layers at {BEYOND_THRESHOLD} times the threshold"
        for size in PLANTED:
            settings = _settings((size,), (0.0,), 0.0, num_planted)
            _print(f"{title}, {size[0]} models, side {size[1]}", num_zoos // len(PLANTED), settings)


@dataclass(frozen=True)
class Setting:
    """What a zoo is drawn from."""

    num_models: int
    side: int
    spread: float
    correlation: float
    num_planted: int


def _settings(
    sizes: Sequence[tuple[int, int]], spreads: Sequence[float], correlation: float, num_planted: int
) -> list[Setting]:
    return [Setting(*size, spread, correlation, num_planted) for size, spread in itertools.product(sizes, spreads)]


def _print(title: str, num_zoos: int, settings: Sequence[Setting]) -> None:
    chosen = itertools.islice(itertools.cycle(settings), num_zoos)
    found = Counter(_verdict(setting, seed) for seed, setting in enumerate(chosen))
    print(f"{title}: {num_zoos} zoos")
    for code, count in found.most_common():
        print(f"  {code:22} {count:4}  {100 * count / num_zoos:5.1f} %", flush=True)


def _verdict(setting: Setting, seed: int) -> str:
    draw = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        stacks = {f"layer.{place}": _stack(setting, draw) for place in range(NUM_LAYERS)}
        for model in range(setting.num_models):
            layers = {name: stack[model].clone() for name, stack in stacks.items()}
            save_file(layers, Path(folder) / f"m{model:03}.safetensors")
        return str(ez.evidence(folder, seed=seed).verdict.code)


def _stack(setting: Setting, draw: torch.Generator) -> Tensor:
    num_models, size = setting.num_models, setting.side**2
    rows = torch.randn(num_models, size, generator=draw)
    if setting.correlation:
        together = torch.randn(num_models, size // RUN, generator=draw).repeat_interleave(RUN, 1)
        rows = math.sqrt(1 - setting.correlation) * rows + math.sqrt(setting.correlation) * together
    if setting.num_planted:
        strength = BEYOND_THRESHOLD * math.sqrt(size / num_models)
        directions = torch.linalg.qr(torch.randn(size, setting.num_planted, generator=draw))[0].T
        rows += math.sqrt(strength) * torch.randn(num_models, setting.num_planted, generator=draw) @ directions
    rows *= torch.exp(setting.spread * torch.randn(num_models, 1, generator=draw))
    return rows.view(num_models, setting.side, setting.side)


if __name__ == "__main__":
    main()
