"""Compare parts of the zoo: subspaces of disjoint halves, and the dimension for growing numbers of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.evidence.unseen import LARGE_ZOO, unrelated_share
from eigenzoo.linalg.angles import half_cosines, random_cosines
from eigenzoo.linalg.heldout import hold_out, up_to
from eigenzoo.subspace.moments.layer_moments import LayerMoments

NUM_SPLITS = 20
NUM_SPLITS_LARGE = 4
LARGEST_RANK = 32


@dataclass(frozen=True)
class Halves:
    """Cosines of the principal angles between the top `rank` directions of two disjoint halves, descending.

    Attributes:
        rank: number of compared directions.
        cosines: mean over splits; `low`, `high`: their 5 % and 95 % quantiles.
        null_cosines: mean cosines of unrelated subspaces of that rank in D dimensions, and `null_high`, their 95 % quantile.
        num_splits: number of random splits.
    """

    rank: int
    cosines: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    null_cosines: tuple[float, ...]
    null_high: tuple[float, ...]
    num_splits: int


def halves(moments: LayerMoments, rank: int, seed: int = 0) -> Halves | None:
    """Split the zoo in random halves many times, from the Gram alone. Cost N³ / 4 per split. None if a half spans nothing."""
    num_models = moments.num_models
    rank = min(max(rank, 1), LARGEST_RANK, num_models // 2 - 1, moments.num_values)
    if rank < 1 or moments.variance == 0:
        return None
    splits = NUM_SPLITS if num_models <= LARGE_ZOO else NUM_SPLITS_LARGE
    generator = torch.Generator().manual_seed(seed)
    cosines_SK = torch.zeros(splits, rank, dtype=torch.float64)
    for split in range(splits):
        order = torch.randperm(num_models, generator=generator)
        cosines = half_cosines(moments.gram_NN, order[: num_models // 2], order[num_models // 2 :], rank)
        cosines_SK[split, : cosines.numel()] = cosines
    null = random_cosines(rank, moments.num_values, seed=seed)
    return Halves(
        rank,
        tuple(cosines_SK.mean(0).tolist()),
        tuple(cosines_SK.quantile(0.05, dim=0).tolist()),
        tuple(cosines_SK.quantile(0.95, dim=0).tolist()),
        tuple(null.mean(0).tolist()),
        tuple(null.quantile(0.95, dim=0).tolist()),
        splits,
    )


RANK = 16
"""Number of directions at each size, or all that a small size spans."""

SIZES = (0.125, 0.25, 0.5, 0.75, 1.0)
SIZES_LARGE = (0.125, 0.25, 0.5, 1.0)
NUM_DRAWS = 4
NUM_DRAWS_LARGE = 2
HELD_OUT = 5
"""One of this many models is held out of all sizes."""


@dataclass(frozen=True)
class Growth:
    """The zoo at growing sizes: averages over layers, weighted by their number of values.

    Attributes:
        num_models: sizes of the fitted part.
        var90_rank: least k at which the top k directions of each layer hold 90 % of the fitted models' variance on average.
        in_sample, captured: share of the variance in the top `rank` of the fitted models, and of held-out models, always the same.
        null: the same share of unrelated models with the same norms.
        spread: standard deviation of `captured` over the draws.
        rank: number of directions, or all that a size spans.
        num_draws: number of random orders of the models.
    """

    num_models: tuple[int, ...]
    var90_rank: tuple[float, ...]
    in_sample: tuple[float, ...]
    captured: tuple[float, ...]
    null: tuple[float, ...]
    spread: tuple[float, ...]
    rank: int
    num_draws: int


@dataclass(frozen=True)
class LayerGrowth:
    """One layer's shares: (draws, sizes, ranks) cumulative in-sample, and (draws, sizes) of the others."""

    in_sample: Tensor
    captured: Tensor
    null: Tensor


def sizes(num_models: int) -> tuple[int, ...]:
    """Return the sizes for growth; none for fewer than five models, of which one is held out."""
    most = num_models - max(1, num_models // HELD_OUT)
    shares = SIZES if num_models <= LARGE_ZOO else SIZES_LARGE
    return tuple(sorted({max(3, round(share * most)) for share in shares})) if num_models >= HELD_OUT else ()


def layer_growth(moments: LayerMoments, seed: int = 0) -> LayerGrowth | None:
    """Fit directions to nested parts of the zoo and measure the same held-out models, from the Gram. Cost about N³ per draw."""
    num_models, looked = moments.num_models, sizes(moments.num_models)
    if not looked or moments.variance == 0:
        return None
    draws = NUM_DRAWS if num_models <= LARGE_ZOO else NUM_DRAWS_LARGE
    generator = torch.Generator().manual_seed(seed)
    in_sample = torch.ones(draws, len(looked), num_models, dtype=torch.float64)
    captured, null = torch.zeros(2, draws, len(looked), dtype=torch.float64)
    for draw in range(draws):
        order = torch.randperm(num_models, generator=generator)
        left_out, rest = order[looked[-1] :], order[: looked[-1]]
        for index, size in enumerate(looked):
            capture = hold_out(moments.gram_NN, rest[:size], left_out)
            rank = min(RANK, size - 1)
            if capture.fitted_energy > 0:
                in_sample[draw, index, : capture.in_sample_K.numel()] = capture.in_sample_K / capture.fitted_energy
            captured[draw, index] = up_to(capture.captured_K, rank) / capture.energy if capture.energy > 0 else 0.0
            null[draw, index] = unrelated_share(moments, rest[:size], left_out, rank)
    return LayerGrowth(in_sample, captured, null)


def growth(layers: Sequence[tuple[LayerGrowth, float]], num_models: int) -> Growth | None:
    """Average the layers' growth by weight."""
    if not layers:
        return None
    total = sum(weight for _, weight in layers)
    in_sample, captured, null = (
        torch.stack([getattr(layer, part) * weight for layer, weight in layers]).sum(0) / total
        for part in ("in_sample", "captured", "null")
    )
    looked = sizes(num_models)
    at_rank = torch.stack([in_sample[:, index, min(RANK, size - 1) - 1] for index, size in enumerate(looked)], 1)
    return Growth(
        looked,
        tuple(((in_sample < 0.9).sum(-1) + 1).double().mean(0).tolist()),
        tuple(at_rank.mean(0).tolist()),
        tuple(captured.mean(0).tolist()),
        tuple(null.mean(0).tolist()),
        tuple(captured.std(0).tolist()),
        RANK,
        in_sample.shape[0],
    )
