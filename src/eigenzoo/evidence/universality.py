"""Universality: do disjoint halves of the zoo give the same subspace?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eigenzoo.evidence.unseen import LARGE_ZOO
from eigenzoo.linalg.angles import half_cosines, random_cosines
from eigenzoo.subspace.moments.layer_moments import LayerMoments

NUM_SPLITS = 20
NUM_SPLITS_LARGE = 4
LARGEST_RANK = 32


@dataclass(frozen=True)
class Halves:
    """Cosines of the principal angles between the top `rank` directions of two disjoint halves, descending.

    Attributes:
        rank: directions compared.
        cosines: mean over splits; `low`, `high`: their 5 % and 95 % quantiles.
        null_cosines: mean cosines of unrelated subspaces of that rank in D dimensions, and `null_high`, their 95 % quantile.
        num_splits: random splits.
    """

    rank: int
    cosines: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    null_cosines: tuple[float, ...]
    null_high: tuple[float, ...]
    num_splits: int


def halves(moments: LayerMoments, rank: int, seed: int = 0) -> Halves | None:
    """Split the zoo in random halves, many times; from the Gram alone. Cost N³ / 4 a split. None where a half spans nothing."""
    num_models = moments.num_models
    rank = min(max(rank, 1), LARGEST_RANK, num_models // 2 - 1, moments.num_values)
    if rank < 1 or moments.variance == 0:
        return None
    splits = NUM_SPLITS if num_models <= LARGE_ZOO else NUM_SPLITS_LARGE
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(splits, rank, dtype=torch.float64)
    for split in range(splits):
        order = torch.randperm(num_models, generator=generator)
        cosines = half_cosines(moments.gram_NN, order[: num_models // 2], order[num_models // 2 :], rank)
        found[split, : cosines.numel()] = cosines
    null = random_cosines(rank, moments.num_values, seed=seed)
    return Halves(
        rank,
        tuple(found.mean(0).tolist()),
        tuple(found.quantile(0.05, dim=0).tolist()),
        tuple(found.quantile(0.95, dim=0).tolist()),
        tuple(null.mean(0).tolist()),
        tuple(null.quantile(0.95, dim=0).tolist()),
        splits,
    )
