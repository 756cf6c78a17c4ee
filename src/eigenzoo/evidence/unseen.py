"""Unseen models: does what is found on some models, their mean and their directions, hold the others?

In-sample beside held out, cross-validated and leave-one-out, all from the Gram. Chance is stated twice. A held-out model seen
from the fitted models' mean (`captured`, what a user meets) is compared with unrelated models of the same norms. Held-out
models seen from their own mean (`contrast`) share nothing with the fitted ones, so that chance is exact there; that is what
is tested.
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
"""Fewer leave no two models to hold out and two to fit on."""

TESTED_RANK = 16
"""The most directions that are tested: what "low-dimensional" means here, the hypothesis' own number."""

DISPERSION = 2.0
"""Folds share models, so their captures vary together: measured variance over that of independent folds is 1.3 to 1.9."""

LEFT_OUT_RANK = 16
LEFT_OUT_RANK_LARGE = 4
LARGE_ZOO = 200


@dataclass(frozen=True)
class Capture:
    """Sums over folds, per rank: what is said of a layer's held-out models, and what verdicts are made of.

    Attributes:
        rank: the ranks.
        in_sample, fitted: energy captured of the fitted models at each rank, and all of it.
        captured, energy: the same of held-out models about the fitted mean.
        null: energy that unrelated models of the same norms would have captured of them (`captured`).
        contrast, contrast_energy: of held-out models about their own mean, every model at one norm.
        cloud: energy of the contrasts along a direction of no distinction: the fitted models' average one.
        freedom: degrees of freedom of the contrasts, per direction.
        dimensions: in how many dimensions unrelated models of such entries lie: D where all entries vary alike.
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
        """The energy that any k directions hold of unrelated models' contrasts, k / D in as many dimensions, per rank."""
        return tuple(min(rank / self.dimensions, 1.0) * self.contrast_energy for rank in self.rank)

    @property
    def ratio(self) -> tuple[float, ...]:
        """Captured of the contrasts over what as many directions of no distinction hold, per rank."""
        return tuple(
            found / (rank * self.cloud) if self.cloud > 0 else 0.0
            for rank, found in zip(self.rank, self.contrast, strict=True)
        )

    @property
    def over_chance(self) -> tuple[float, ...]:
        """Captured of the contrasts over what any k directions hold of unrelated models, per rank."""
        return tuple(
            found / null if null > 0 else 0.0 for found, null in zip(self.contrast, self.contrast_null, strict=True)
        )


@dataclass(frozen=True)
class Unseen:
    """Shares of the variance that the top k directions hold, in-sample and of models left out of the fit.

    Attributes:
        rank: the ranks: powers of two and the largest that the smallest fold spans.
        in_sample, captured: shares of the fitted and of the held-out models' energy about the fitted mean, five folds.
        null: `captured` of unrelated models of the same norms.
        left_out_rank, left_out: the same with every model left out once.
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
    """How many folds are held out in turn: five, and fewer where a fold would have less than two models; none below four.

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
    """Hold out each fold in turn, and add up; None for fewer than `MIN_MODELS` models and without variance. Cost folds · N³.

    `scaled` is what `scale_models` makes of the Gram, where it is known already.
    """
    num_models, gram_NN = moments.num_models, moments.gram_NN
    if num_models < MIN_MODELS or moments.variance == 0:
        return None
    dealt = list(folds) if folds is not None else make_folds(num_models, num_folds(num_models), seed)
    scaled_NN, level_N = scale_models(gram_NN) if scaled is None else scaled
    found = [hold_out(gram_NN, others(num_models, held), held) for held in dealt]
    contrasts = [contrast(scaled_NN, level_N, others(num_models, held), held) for held in dealt]
    rank = ranks_up_to(min(num_models - max(map(len, dealt)) - 1, moments.num_values))
    energy = sum(fold.energy for fold in found)
    return Capture(
        rank=rank,
        in_sample=_summed([fold.in_sample_K for fold in found], rank),
        fitted=sum(fold.fitted_energy for fold in found),
        captured=_summed([fold.captured_K for fold in found], rank),
        energy=energy,
        null=tuple(share * energy for share in _null_shares(moments, dealt, rank)),
        contrast=_summed([fold.captured_K for fold in contrasts], rank),
        contrast_energy=sum(fold.energy for fold in contrasts),
        cloud=sum(fold.cloud for fold in contrasts),
        freedom=sum(fold.freedom for fold in contrasts) / DISPERSION,
        dimensions=dimensions(moments),
        num_values=moments.num_values,
        num_models=num_models,
    )


def dimensions(moments: LayerMoments) -> float:
    """Dimensions in which unrelated models lie whose entries vary independently, each as it does; D where that is not known."""
    known = moments.entries if moments.entries else moments.num_values
    return float(max(1.0, min(known, moments.num_values)))


def _summed(cumulative: Sequence[Tensor], rank: Sequence[int]) -> tuple[float, ...]:
    """Add up cumulative energies of several folds at each rank."""
    return tuple(sum(up_to(fold_K, k) for fold_K in cumulative) for k in rank)


def _null_shares(moments: LayerMoments, dealt: Sequence[Tensor], rank: Sequence[int]) -> list[float]:
    """Shares captured of unrelated models at each rank, on average over the folds; of a large zoo one fold tells enough."""
    few = dealt if moments.num_models <= LARGE_ZOO else dealt[:1]
    found = [_unrelated(moments, others(moments.num_models, held), held) for held in few]
    total = sum(fold.energy for fold in found)
    limits = _summed([fold.captured_K for fold in found], rank)
    return [
        _with_chance(limit / total if total > 0 else 0.0, k, moments) for k, limit in zip(rank, limits, strict=True)
    ]


def unrelated_share(moments: LayerMoments, fitted: Tensor, held: Tensor, rank: int) -> float:
    """Share of unrelated models of the same norms that the top `rank` directions of others of them hold, about their mean."""
    found = _unrelated(moments, fitted, held)
    return _with_chance(up_to(found.captured_K, rank) / found.energy if found.energy > 0 else 0.0, rank, moments)


def _unrelated(moments: LayerMoments, fitted: Tensor, held: Tensor) -> HeldOut:
    """Hold out orthogonal models of the same norms: the mean of uneven norms leans to the largest, as the first direction does."""
    return hold_out(torch.diag(moments.gram_NN.diagonal().clamp_min(0)), fitted, held)


def _with_chance(limit: float, rank: int, moments: LayerMoments) -> float:
    """Add what chance gives in finite dimensions."""
    return min(1.0, limit + (1 - limit) * min(rank / dimensions(moments), 1.0))


def unseen(sums: Capture | None, values_K: Tensor, vectors_NK: Tensor) -> Unseen | None:
    """Turn the sums over folds into shares, and add leave-one-out from the centred Gram's eigenpairs."""
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
    """How much of the models is what all have in common, before any direction is spent.

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


NO_SHARE = MeanShare(0.0, 0.0, 0.0, 0.0, 0.0)


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
        return NO_SHARE
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


@dataclass(frozen=True)
class Secondary:
    """Whether anything is shared outside the top k directions: those from k + 1 to `upto`, measured as the top ones are.

    Attributes:
        rank: k.
        upto: the last direction looked at: 2k, or the largest rank that the folds span.
        in_sample, captured, null: shares of the variance of the fitted models, of held-out models, and of unrelated ones, that
            these directions hold.
        ratio: captured of held-out models over what as many directions of no distinction hold.
    """

    rank: int
    upto: int
    in_sample: float
    captured: float
    null: float
    ratio: float


def secondary(sums: Capture | None, rank: int) -> Secondary | None:
    """Measure what is outside the top `rank`; from the sums over folds. None where the folds span no more than that.

    Ranks are looked at on the grid of the folds: `rank` counts as the largest one at or below it.
    """
    if sums is None:
        return None
    places = [place for place, known in enumerate(sums.rank) if known <= max(rank, 1)]
    top = places[-1]
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
