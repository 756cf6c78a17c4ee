"""The mean: how much of the models is what all have in common, before any direction is spent?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from eigenzoo.linalg.heldout import others
from eigenzoo.subspace.moments.layer_moments import LayerMoments


@dataclass(frozen=True)
class MeanShare:
    """What the mean holds.

    Attributes:
        share: of the stack's energy, N·‖mean‖² / Σ‖X_n‖², in-sample: 1/N even where models share nothing.
        common: the same without that bias: the mean inner product of two models over the mean energy of one.
        heldout: share of a held-out model's energy that subtracting the others' mean removes; below zero where it adds.
        null: `heldout` of models that share nothing.
        deviations: how many standard deviations of chance `common` lies above zero.
    """

    share: float
    common: float
    heldout: float
    null: float
    deviations: float


NOTHING = MeanShare(0.0, 0.0, 0.0, 0.0, 0.0)


def mean_share(moments: LayerMoments, folds: Sequence[Tensor], cloud_share: float) -> MeanShare:
    """Measure the mean on models held out of it, a fold at a time; from the Gram alone.

    Args:
        moments: of one layer.
        folds: the models that are held out together; whole lineages, where the question is what lineages share.
        cloud_share: share of a model's variance along another's direction: its inverse is the number of dimensions in
            which chance has room, and so says how large inner products of unrelated models are.
    """
    raw_NN = moments.raw_NN
    energies_N = moments.energies_N
    total = float(energies_N.sum())
    if total <= 0 or len(folds) < 2:
        return NOTHING
    removed = null = common = spread = pairs = 0.0
    for held in folds:
        fitted = others(moments.num_models, held)
        block = raw_NN[held][:, fitted]
        mean_energy = float(raw_NN[fitted][:, fitted].mean())
        removed += 2 * float(block.mean(1).sum()) - len(held) * mean_energy
        null -= len(held) * float(energies_N[fitted].sum()) / len(fitted) ** 2
        common += float(block.sum())
        pairs += block.numel()
        spread += float(energies_N[held].sum() * energies_N[fitted].sum())
    # Each pair is met twice, once from either side.
    deviation = sqrt(2 * spread * max(cloud_share, 1 / moments.num_values))
    return MeanShare(
        moments.mean_share,
        common / pairs / (total / moments.num_models),
        removed / total,
        null / total,
        common / deviation if deviation > 0 else 0.0,
    )
