"""Unseen models: do directions found on some models hold the others?

In-sample beside held out, cross-validated and leave-one-out, all from the Gram. Chance is stated twice. A held-out model seen
from the fitted models' mean (`captured`, what a user meets) is compared with unrelated models of the same norms. Held-out
models seen from their own mean (`contrast`) share nothing with the fitted ones, so that chance is exact there; that is what
is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.linalg.gram import scale_models
from eigenzoo.linalg.heldout import NUM_FOLDS, HeldOut, contrast, deal, hold_out, leave_one_out, others, up_to
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
    dealt = list(folds) if folds is not None else deal(num_models, num_folds(num_models), seed)
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
