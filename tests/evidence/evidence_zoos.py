"""Zoos of which it is known what they share, and the same figures by brute force: on the weights, one SVD per fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, seeded, write_adapter, write_model, write_stacks

SHAPE = (16, 18)
ROUND_OFF = 1e-7
"""Eigenvalues below this share of the largest are none: the floor of what energies are divided by."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def noise(num_models: int, shape: Sequence[int] = SHAPE, seed: int = 0, spread: float = 0.0) -> Tensor:
    """Unrelated models, the logarithm of their norms of standard deviation `spread`."""
    rows = normal(num_models, *shape, seed=seed)
    norms_N = torch.exp(spread * normal(num_models, seed=seed + 5000))
    return rows * norms_N.view(-1, *(1,) * len(shape))


def planted(
    num_models: int, num_directions: int, strength: float, shape: Sequence[int] = SHAPE, seed: int = 0
) -> Tensor:
    """Noise and directions, each of `strength` times the variance of all of a model's noise."""
    num_values = math.prod(shape)
    directions_DK = torch.linalg.qr(normal(num_values, num_directions, seed=seed + 6000))[0]
    weights_NK = normal(num_models, num_directions, seed=seed + 7000)
    # Shapes of the weights' cloud: even, so that every direction is as strong as the others.
    weights_NK = torch.linalg.qr(weights_NK - weights_NK.mean(0))[0] * math.sqrt(num_models)
    rows_ND = math.sqrt(strength * num_values) * weights_NK @ directions_DK.T
    return rows_ND.view(num_models, *shape) + noise(num_models, shape, seed)


def families(sizes: Sequence[int], distance: float = 3.0, shape: Sequence[int] = SHAPE, seed: int = 0) -> Tensor:
    """Families of models, each around a parent of its own; models of one family differ by noise."""
    parents = [
        distance * normal(1, *shape, seed=seed + 8000 + place).expand(size, *shape) for place, size in enumerate(sizes)
    ]
    return torch.cat(parents) + noise(sum(sizes), shape, seed)


def layers(make: Any, num_layers: int = 3) -> dict[str, Tensor]:
    """Several layers by make(seed)."""
    return {f"block.{place}.weight": make(100 * place) for place in range(num_layers)}


def find(root: Path, stacks: Mapping[str, Tensor], **options: Any) -> ez.Evidence:
    """Write a zoo in float64, so that files round nothing, and collect its evidence."""
    return ez.evidence(write_stacks(root / "zoo", stacks, torch.float64), **options)


@dataclass(frozen=True)
class Measured:
    """A zoo's evidence, and its weights: per layer the dense rows (N, D) that the evidence is of."""

    view: str
    seed: int
    found: ez.Evidence
    document: dict[str, Any]
    rows: dict[str, Tensor]


NUM_MODELS = 16
STACKS = {
    "even": lambda seed: noise(NUM_MODELS, (7, 9), seed),
    "uneven": lambda seed: (
        noise(NUM_MODELS, (8, 6), seed + 1) * torch.logspace(-1, 1, NUM_MODELS).double().view(-1, 1, 1)
    ),
    "large_mean": lambda seed: noise(NUM_MODELS, (6, 8), seed + 2) + 300 * normal(1, 6, 8, seed=seed + 3),
    "low_rank": lambda seed: planted(NUM_MODELS, 4, 1.0, (9, 8), seed + 4) - noise(NUM_MODELS, (9, 8), seed + 4),
    "few_values": lambda seed: noise(NUM_MODELS, (3, 3), seed + 5),
    "copies": lambda seed: noise(NUM_MODELS - 4, (7, 7), seed + 6)[[*range(NUM_MODELS - 4), 0, 0, 1, 2]],
}
MODULES = {"block.0.q": (9, 8), "block.1.v": (7, 10)}


def measure(root: Path, view: str, seed: int) -> Measured:
    """Layers of every kind in one zoo, written in `view`; its base or parent is larger than what differs."""
    if view == "update":
        paths, rows = write_updates(root, seed)
        found = ez.evidence(paths, seed=seed)
    else:
        rows = {name: make(seed).flatten(1) for name, make in STACKS.items()}
        shapes = {name: make(seed).shape[1:] for name, make in STACKS.items()}
        base = {name: 2.0**3 * normal(*shape, seed=seed + 9).round() for name, shape in shapes.items()}
        if view == "weight":
            base = {name: torch.zeros(*shape, dtype=torch.float64) for name, shape in shapes.items()}
        stacks = {name: rows[name].view(-1, *shapes[name]) + base[name] for name in rows}
        rows = {name: stacks[name].flatten(1) - base[name].flatten() for name in rows}
        paths = write_stacks(root / "zoo", stacks, torch.float64)
        where = write_model(root / "base", base) if view == "delta" else None
        found = ez.evidence(paths, base=where, view=view, seed=seed)
    return Measured(view, seed, found, found.to_dict(), rows)


def write_updates(root: Path, seed: int, num_models: int = NUM_MODELS) -> tuple[list[Path], dict[str, Tensor]]:
    """Adapters of mixed ranks and scales; returns their folders and the dense rows of ΔW."""
    paths: list[Path] = []
    rows: dict[str, list[Tensor]] = {module: [] for module in MODULES}
    for place in range(num_models):
        rank, alpha = (2, 3, 1)[place % 3], 1 + place % 4
        factors = random_factors(MODULES, rank, 100 * seed + place)
        paths.append(write_adapter(root / "zoo" / f"m{place}", factors, lora_alpha=alpha))
        for module, (b_OR, a_RI) in factors.items():
            rows[module].append((alpha / rank * b_OR.double() @ a_RI.double()).flatten())
    return paths, {module: torch.stack(each) for module, each in rows.items()}


def directions(rows_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and directions (K, D) of rows about their mean, without those that are round-off."""
    _, values, vectors_KD = np.linalg.svd(rows_TD - rows_TD.mean(0), full_matrices=False)
    kept = values**2 > ROUND_OFF * max(values[0] ** 2, 1e-300)
    return values[kept] ** 2, vectors_KD[kept]


def hold_out(
    rows_ND: Tensor, fitted: Sequence[int] | Tensor, held: Sequence[int] | Tensor
) -> tuple[np.ndarray, float, np.ndarray, float]:
    """Cumulative energies in 1, 2, … directions and all of it: of the fitted rows, then of the held-out ones about their mean."""
    fit, away = rows_ND[fitted].numpy(), rows_ND[held].numpy()
    values, vectors_KD = directions(fit)
    away = away - fit.mean(0)
    captured = ((away @ vectors_KD.T) ** 2).sum(0)
    return np.cumsum(values), float(((fit - fit.mean(0)) ** 2).sum()), np.cumsum(captured), float((away**2).sum())


def up_to(cumulative: np.ndarray, rank: int) -> float:
    return float(cumulative[min(rank, len(cumulative)) - 1]) if len(cumulative) and rank else 0.0


def without(num_models: int, held: Sequence[int] | Tensor) -> list[int]:
    gone = {int(place) for place in held}
    return [place for place in range(num_models) if place not in gone]


def folds_of(num_models: int, seed: int, num_folds: int = 5) -> list[Tensor]:
    """How models are dealt: a seeded permutation, cut in nearly equal parts."""
    return list(torch.randperm(num_models, generator=seeded(seed)).tensor_split(min(num_folds, num_models // 2)))


def slack(rows_ND: Tensor) -> float:
    """How many times round-off may grow: by how far the common part outweighs the rest, and by the least eigenvalue divided by."""
    values, _ = directions(rows_ND.numpy())
    away = float((rows_ND - rows_ND.mean(0)).square().sum())
    return float(values[0] / values[-1]) * (1 + math.sqrt(float(rows_ND.square().sum()) / away))


def assert_alike(first: Any, second: Any, rel: float = 1e-9, at: str = "") -> None:
    """Two documents of one structure, their numbers equal to `rel` of the larger, or of one where they are shares near zero."""
    assert type(first) is type(second) or {type(first), type(second)} <= {int, float}, (at, first, second)
    if isinstance(first, dict):
        assert list(first) == list(second), at
        for key in first:
            assert_alike(first[key], second[key], rel, f"{at}/{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), at
        for place, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_alike(one, other, rel, f"{at}/{place}")
    elif isinstance(first, float):
        assert first == pytest.approx(second, rel=rel, abs=rel), at
    else:
        assert first == second, at


def dimensions(rows_ND: Tensor) -> float:
    """In how many dimensions unrelated models of such entries lie: (Σ v)² / Σ v² of the entries' variances, chance taken out."""
    v_D = (rows_ND - rows_ND.mean(0)).square().sum(0)
    count = len(rows_ND)
    found = float(v_D.sum() ** 2 / v_D.square().sum()) * (count + 1) / (count - 1)
    return max(1.0, min(found, rows_ND.shape[1]))


def unrelated_share(
    rows_ND: Tensor, fitted: Sequence[int] | Tensor, held: Sequence[int] | Tensor, rank: int, size: float
) -> float:
    """Share of orthogonal models of the same norms about the mean, fitted and held out, and chance in `size` dimensions on top."""
    norms_N = (rows_ND - rows_ND.mean(0)).norm(dim=1)
    fold = hold_out(torch.diag(norms_N), torch.as_tensor(fitted), torch.as_tensor(held))
    limit = up_to(fold[2], rank) / fold[3]
    return min(1.0, limit + (1 - limit) * min(rank / size, 1.0))
