"""Test unseen models: how much of them do the mean and the directions of other models contain?

In-sample, cross-validated and leave-one-out shares all follow from the Gram. Chance is stated twice. A held-out model about the
fitted models' mean (`captured`, the user's case) is compared with unrelated models of the same norms. Held-out models about their
own mean (`contrast`) have no mean in common with the fitted ones, so that their chance is exact. These are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from eigenzoo.linalg.gram import scale_models
from eigenzoo.linalg.heldout import NUM_FOLDS, HeldOut, contrast, hold_out, leave_one_out, make_folds, others, up_to
from eigenzoo.subspace.moments.layer_moments import LayerMoments

MIN_MODELS = 4
"""Least number of models: two to hold out and two to fit."""

TESTED_RANK = 16
"""Largest number of tested directions. It defines "low-dimensional" here and is the hypothesis' own number."""

DISPERSION = 2.0
"""Folds have models in common, so the measured variance of captures is 1.3 to 1.9 times that of independent folds.
"""

LEFT_OUT_RANK = 16
LEFT_OUT_RANK_LARGE = 4
LARGE_ZOO = 200


@dataclass(frozen=True)
class Capture:
    """Sums over folds by rank, for a layer's held-out figures and its verdict.

    Attributes:
        rank: the ranks.
        in_sample, fitted: captured energy of the fitted models at each rank, and their whole energy.
        captured, energy: the same of held-out models about the fitted mean.
        null: `captured` for unrelated models of the same norms.
        contrast, contrast_energy: the same for held-out models about their own mean, with all models at one norm.
        cloud: energy of the contrasts along an average direction of the fitted models.
        freedom: degrees of freedom of the contrasts, per direction.
        dimensions: effective dimension of unrelated models with such entries; D if all entries have equal variance.
        num_values, num_models: D and N.
    """

    rank: tuple[int, ...]
    in_sample: tuple[float, ...]
    fitted: float
    captured: tuple[float, ...]
    energy: float
    null: tuple[float, ...]
    contrast: tuple[float, ...]
    contrast_energy: float
    cloud: float
    freedom: float
    dimensions: float
    num_values: int
    num_models: int

    @property
    def contrast_null(self) -> tuple[float, ...]:
        """The energy of unrelated models' contrasts in any k directions, k / D of the whole in D dimensions, by rank."""
        return tuple(min(rank / self.dimensions, 1.0) * self.contrast_energy for rank in self.rank)

    @property
    def ratio(self) -> tuple[float, ...]:
        """Captured energy of the contrasts over that of as many average directions, by rank."""
        return tuple(
            captured / (rank * self.cloud) if self.cloud > 0 else 0.0
            for rank, captured in zip(self.rank, self.contrast, strict=True)
        )

    @property
    def over_chance(self) -> tuple[float, ...]:
        """Captured energy of the contrasts over that of unrelated models in any k directions, by rank."""
        return tuple(
            captured / null if null > 0 else 0.0
            for captured, null in zip(self.contrast, self.contrast_null, strict=True)
        )


@dataclass(frozen=True)
class Unseen:
    """Shares of the variance in the top k directions, in-sample and for models left out of the fit.

    Attributes:
        rank: the ranks: powers of two and the largest that the smallest fold spans.
        in_sample, captured: shares of the fitted and of the held-out models' energy about the fitted mean, five folds.
        null: `captured` for unrelated models of the same norms.
        left_out_rank, left_out: ranks and shares with every model left out once.
    """

    rank: tuple[int, ...]
    in_sample: tuple[float, ...]
    captured: tuple[float, ...]
    null: tuple[float, ...]
    left_out_rank: tuple[int, ...]
    left_out: tuple[float, ...]


def ranks_up_to(largest: int) -> tuple[int, ...]:
    """Powers of two below `largest`, and `largest`.

    >>> ranks_up_to(9)
    (1, 2, 4, 8, 9)
    """
    if largest < 1:
        return ()
    return (*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest)


def num_folds(num_models: int) -> int:
    """Return the number of folds: five, or fewer if a fold would have less than two models; 0 for fewer than four models.

    >>> num_folds(100), num_folds(6), num_folds(3)
    (5, 3, 0)
    """
    return min(NUM_FOLDS, num_models // 2) if num_models >= MIN_MODELS else 0


def capture(
    moments: LayerMoments,
    folds: Sequence[Tensor] | None = None,
    seed: int = 0,
    scaled: tuple[Tensor, Tensor] | None = None,
) -> Capture | None:
    """Hold out each fold in turn and sum over the folds. None for fewer than `MIN_MODELS` models and without variance.

    `scaled` is the result of `scale_models` on the Gram, if it is already known. Cost folds · N³.
    """
    num_models, gram_NN = moments.num_models, moments.gram_NN
    if num_models < MIN_MODELS or moments.variance == 0:
        return None
    folds_held_out = list(folds) if folds is not None else make_folds(num_models, num_folds(num_models), seed)
    scaled_NN, level_N = scale_models(gram_NN) if scaled is None else scaled
    captures = [hold_out(gram_NN, others(num_models, left_out), left_out) for left_out in folds_held_out]
    contrasts = [contrast(scaled_NN, level_N, others(num_models, left_out), left_out) for left_out in folds_held_out]
    rank = ranks_up_to(min(num_models - max(map(len, folds_held_out)) - 1, moments.num_values))
    energy = sum(fold.energy for fold in captures)
    return Capture(
        rank=rank,
        in_sample=_summed([fold.in_sample_K for fold in captures], rank),
        fitted=sum(fold.fitted_energy for fold in captures),
        captured=_summed([fold.captured_K for fold in captures], rank),
        energy=energy,
        null=tuple(share * energy for share in _null_shares(moments, folds_held_out, rank)),
        contrast=_summed([fold.captured_K for fold in contrasts], rank),
        contrast_energy=sum(fold.energy for fold in contrasts),
        cloud=sum(fold.cloud for fold in contrasts),
        freedom=sum(fold.freedom for fold in contrasts) / DISPERSION,
        dimensions=dimensions(moments),
        num_values=moments.num_values,
        num_models=num_models,
    )


def dimensions(moments: LayerMoments) -> float:
    """Return the effective dimension of unrelated models with independent entries of the same variances; D if it is not known."""
    known = moments.entries if moments.entries else moments.num_values
    return float(max(1.0, min(known, moments.num_values)))


def _summed(cumulative: Sequence[Tensor], rank: Sequence[int]) -> tuple[float, ...]:
    """Sum cumulative energies of several folds at each rank."""
    return tuple(sum(up_to(fold_K, k) for fold_K in cumulative) for k in rank)


def _null_shares(moments: LayerMoments, folds: Sequence[Tensor], rank: Sequence[int]) -> list[float]:
    """Return captured shares of unrelated models at each rank, averaged over the folds. For a large zoo one fold is enough."""
    few = folds if moments.num_models <= LARGE_ZOO else folds[:1]
    unrelated = [_unrelated(moments, others(moments.num_models, left_out), left_out) for left_out in few]
    total = sum(fold.energy for fold in unrelated)
    limits = _summed([fold.captured_K for fold in unrelated], rank)
    return [
        _with_chance(limit / total if total > 0 else 0.0, k, moments) for k, limit in zip(rank, limits, strict=True)
    ]


def unrelated_share(moments: LayerMoments, fitted: Tensor, left_out: Tensor, rank: int) -> float:
    """Return the share of unrelated models in the top `rank` directions of others with the same norms, about their mean."""
    unrelated = _unrelated(moments, fitted, left_out)
    return _with_chance(
        up_to(unrelated.captured_K, rank) / unrelated.energy if unrelated.energy > 0 else 0.0, rank, moments
    )


def _unrelated(moments: LayerMoments, fitted: Tensor, left_out: Tensor) -> HeldOut:
    """Hold out orthogonal models of the same norms. If these are uneven, mean and first direction lean to the largest one."""
    return hold_out(torch.diag(moments.gram_NN.diagonal().clamp_min(0)), fitted, left_out)


def _with_chance(limit: float, rank: int, moments: LayerMoments) -> float:
    """Add the share by chance in finite dimensions."""
    return min(1.0, limit + (1 - limit) * min(rank / dimensions(moments), 1.0))


def unseen(sums: Capture | None, values_K: Tensor, vectors_NK: Tensor) -> Unseen | None:
    """Convert the sums over folds to shares, and add leave-one-out from the centred Gram's eigenpairs."""
    if sums is None:
        return None
    largest = LEFT_OUT_RANK if vectors_NK.shape[0] <= LARGE_ZOO else LEFT_OUT_RANK_LARGE
    left_out_K, energy = leave_one_out(values_K, vectors_NK, largest)
    ranks = ranks_up_to(left_out_K.numel())
    return Unseen(
        sums.rank,
        tuple(value / sums.fitted if sums.fitted > 0 else 0.0 for value in sums.in_sample),
        tuple(value / sums.energy for value in sums.captured),
        tuple(value / sums.energy for value in sums.null),
        ranks,
        tuple(up_to(left_out_K, rank) / energy for rank in ranks),
    )


@dataclass(frozen=True)
class MeanShare:
    """How much of the models is their common mean, without any direction.

    Attributes:
        share: share of the stack's energy, N·‖mean‖² / Σ‖X_n‖², in-sample; 1/N even if models share nothing.
        common: the share without this bias: mean inner product of two models over the mean energy of one.
        heldout: share of a held-out model's energy that subtracting the others' mean removes; negative if it adds energy.
        null: `heldout` for models that share nothing.
        deviations: `common` in standard deviations of chance.
    """

    share: float
    common: float
    heldout: float
    null: float
    deviations: float


NO_SHARE = MeanShare(0.0, 0.0, 0.0, 0.0, 0.0)


def mean_share(moments: LayerMoments, folds: Sequence[Tensor], cloud_share: float) -> MeanShare:
    """Measure the mean on held-out models, one fold at a time, from the Gram alone.

    Args:
        moments: moments of one layer.
        folds: models that are held out together; whole lineages for the mean across lineages.
        cloud_share: share of a model's variance along another's direction. Its inverse is the effective dimension, which gives the
            size of inner products of unrelated models.
    """
    raw_NN = moments.raw_NN
    energies_N = moments.energies_N
    total = float(energies_N.sum())
    if total <= 0 or len(folds) < 2:
        return NO_SHARE
    removed = null = common = spread = pairs = 0.0
    for left_out in folds:
        fitted = others(moments.num_models, left_out)
        block = raw_NN[left_out][:, fitted]
        mean_energy = float(raw_NN[fitted][:, fitted].mean())
        removed += 2 * float(block.mean(1).sum()) - len(left_out) * mean_energy
        null -= len(left_out) * float(energies_N[fitted].sum()) / len(fitted) ** 2
        common += float(block.sum())
        pairs += block.numel()
        spread += float(energies_N[left_out].sum() * energies_N[fitted].sum())
    # Each pair occurs twice, once from either side.
    deviation = sqrt(2 * spread * max(cloud_share, 1 / moments.num_values))
    return MeanShare(
        moments.mean_share,
        common / pairs / (total / moments.num_models),
        removed / total,
        null / total,
        common / deviation if deviation > 0 else 0.0,
    )


@dataclass(frozen=True)
class Secondary:
    """Whether anything is shared outside the top k directions: figures of the directions from k + 1 to `upto`.

    Attributes:
        rank: k.
        upto: the last direction: 2k, or the largest rank that the folds span.
        in_sample, captured, null: shares of the variance of fitted, held-out and unrelated models in these directions.
        ratio: captured energy of held-out models over that of as many average directions.
    """

    rank: int
    upto: int
    in_sample: float
    captured: float
    null: float
    ratio: float


def secondary(sums: Capture | None, rank: int) -> Secondary | None:
    """Measure the directions after the top `rank`, from the sums over folds. None if the folds do not span more.

    `rank` is rounded down to a rank of the folds' grid.
    """
    if sums is None:
        return None
    indices = [index for index, known in enumerate(sums.rank) if known <= max(rank, 1)]
    top = indices[-1]
    if top + 1 >= len(sums.rank):
        return None
    between = sums.rank[top + 1] - sums.rank[top]
    chance = between * sums.cloud
    return Secondary(
        sums.rank[top],
        sums.rank[top + 1],
        (sums.in_sample[top + 1] - sums.in_sample[top]) / sums.fitted,
        (sums.captured[top + 1] - sums.captured[top]) / sums.energy,
        (sums.null[top + 1] - sums.null[top]) / sums.energy,
        (sums.contrast[top + 1] - sums.contrast[top]) / chance if chance > 0 else 0.0,
    )
