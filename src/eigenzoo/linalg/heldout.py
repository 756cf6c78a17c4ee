"""Measure from the Gram how much the directions of some models capture of other models.

Legend: N models, T fitted ones, H held-out ones, K directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from eigenzoo.linalg.gram import project_out, unit
from eigenzoo.linalg.spectrum import NO_VARIANCE, eigenpairs

FLOOR = 1e-7
"""Eigenvalues below this share of the largest are left out: they may be a float32 product's round-off, and are divided by."""

FLOAT32_FROM = 256
"""Contrasts with more fitted models than this are taken along directions from a float32 eigendecomposition."""

FLOAT32_FLOOR = 1e-5
"""The same floor there."""

NUM_FOLDS = 5
"""Folds that models are dealt to unless asked otherwise."""

MIN_HELD_OUT = 40
"""Held-out models after which no further fold is held out: of zoos of up to forty models every model is."""

SECULAR_STEPS = 8
"""Steps of the secular equation; convergence is quadratic, and a test compares with leaving out one by one."""

LEAST_SQUARE, DISTINCT = 1e-32, 1e-15
"""Squared scores, and distances of eigenvalues, relative: below, float64 cannot tell them from zero, which the roots need."""


@dataclass(frozen=True)
class HeldOut:
    """Energies along the fitted models' leading directions, about the fitted models' mean.

    Attributes:
        in_sample_K, fitted_energy: cumulative energy of the fitted models in 1, 2, … directions, and all of it.
        captured_K, energy: the same of the held-out models.
    """

    in_sample_K: Tensor
    fitted_energy: float
    captured_K: Tensor
    energy: float


def hold_out(gram_NN: Tensor, fitted: Tensor, held_out: Tensor, num: int | None = None) -> HeldOut:
    """Fit directions to some models and measure others along them: ‖Pₖ(x_h − mean)‖² = Σ_{j≤k} (u_jᵀ k_h)² / λ_j.

    u, λ are of the fitted models' centred Gram; with `num`, the leading so many, of many models in float32. Exact otherwise; no
    weight is read. Cost T³.
    """
    # In numpy: this runs for each fold of each layer, and starting a torch call takes longer than these small sums.
    gram, rows, columns = gram_NN.numpy(), fitted.numpy(), held_out.numpy()
    seen = gram.take(rows, 0)
    block, cross = seen.take(rows, 1), seen.take(columns, 1)
    means, mean_cross = block.mean(0), cross.mean(0)
    mean = means.mean()
    energies_H = torch.from_numpy(gram.diagonal()[columns] - 2 * mean_cross + mean)
    cross_TH = torch.from_numpy(cross - (means - mean)[:, None] - mean_cross)
    centered_TT = _above_round_off(torch.from_numpy(block - means - (means - mean)[:, None]), torch.from_numpy(block))
    floor = FLOOR
    if num is not None and len(fitted) > FLOAT32_FROM:
        # float32 takes half the time, and only the first digits of these shares are used.
        centered_TT, cross_TH, floor = centered_TT.float(), cross_TH.float(), FLOAT32_FLOOR
    values_K, vectors_TK = eigenpairs(centered_TT, floor, num)
    return HeldOut(
        values_K.double().cumsum(0),
        float(centered_TT.trace()),
        ((vectors_TK.T @ cross_TH).square() / values_K[:, None]).double().sum(1).cumsum(0),
        float(energies_H.clamp_min(0).sum()),
    )


@dataclass(frozen=True)
class Contrast:
    """Energies of held-out models about their own mean, every model scaled to one norm: what chance can be stated of exactly.

    Attributes:
        captured_K, energy: cumulative energy along 1, 2, … of the fitted models' leading directions, and all of it.
        cloud: energy along the fitted models' average direction: what a direction of no distinction holds.
        freedom: independent contrasts: one less than the held-out models.
    """

    captured_K: Tensor
    energy: float
    cloud: float
    freedom: int


def contrast(scaled_NN: Tensor, level_N: Tensor, fitted: Tensor, held_out: Tensor) -> Contrast:
    """Measure held-out models, seen from their own mean, along directions of the fitted ones.

    Args:
        scaled_NN, level_N: from `gram.scale_models`.
        fitted, held: places of the models.

    The two means share nothing, so that without shared directions each contrast has a χ² of one degree of freedom along every
    direction, in units of `cloud`.
    """
    left_T, right_H = unit(level_N[fitted]), unit(level_N[held_out])
    whole_TT = scaled_NN[fitted][:, fitted]
    block_TT = _above_round_off(project_out(whole_TT, left_T), whole_TT)
    cross_TH = scaled_NN[fitted][:, held_out]
    cross_TH = cross_TH - torch.outer(left_T, left_T @ cross_TH)
    cross_TH = cross_TH - torch.outer(cross_TH @ right_H, right_H)
    total = float(block_TT.diagonal().sum())
    floor = FLOOR
    if len(fitted) > FLOAT32_FROM:
        # float32 takes half the time. The directions are compared with chance, whose spread is thousands of times the error.
        block_TT, cross_TH, floor = block_TT.float(), cross_TH.float(), FLOAT32_FLOOR
    values_K, vectors_TK = eigenpairs(block_TT, floor)
    return Contrast(
        ((vectors_TK.T @ cross_TH).square() / values_K[:, None]).sum(1).cumsum(0).double(),
        float(project_out(scaled_NN[held_out][:, held_out], right_H).diagonal().sum().clamp_min(0)),
        float(cross_TH.square().sum()) / total if total > 0 else 0.0,
        len(held_out) - 1,
    )


def _above_round_off(part_TT: Tensor, whole_TT: Tensor) -> Tensor:
    """Return the remainder of a Gram, or zero if it is round-off: copies of one model have no directions."""
    return part_TT if float(part_TT.trace()) > NO_VARIANCE * float(whole_TT.trace()) else 0 * part_TT


def make_folds(num_models: int, folds: int, seed: int = 0) -> list[Tensor]:
    """Deal models to folds of nearly equal size by a seeded permutation."""
    order = torch.randperm(num_models, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(min(folds, num_models)))


def make_grouped_folds(groups: Sequence[Sequence[int]], folds: int) -> list[Tensor]:
    """Deal whole groups of models to folds: the largest first, always to the smallest fold."""
    dealt: list[list[int]] = [[] for _ in range(min(folds, len(groups)))]
    for group in sorted(groups, key=len, reverse=True):
        min(dealt, key=len).extend(group)
    return [torch.tensor(sorted(fold)) for fold in dealt]


def others(num_models: int, held_out: Tensor) -> Tensor:
    """Return the models that are not held out, ascending."""
    is_fitted = torch.ones(num_models, dtype=torch.bool)
    is_fitted[held_out] = False
    return is_fitted.nonzero().flatten()


def up_to(cumulative_K: Tensor, rank: int) -> float:
    """Return a cumulative energy at a rank; beyond what was spanned, all that was spanned."""
    return float(cumulative_K[min(rank, cumulative_K.numel()) - 1]) if rank > 0 and cumulative_K.numel() else 0.0


def cross_validated_capture(
    gram_NN: Tensor, ranks: Iterable[int], *, folds: int = NUM_FOLDS, seed: int = 0
) -> list[float] | None:
    """Share of held-out models' centred energy that the top k directions of the others capture, for each k of `ranks`.

    Models are dealt to `folds` folds by a seeded permutation, and held out fold by fold until at least `ENOUGH_HELD` have been: a
    share of so many models' energy is known well enough, and each fold costs an eigendecomposition. A k beyond what the fitted
    models span counts as all that they span. None for fewer than three models, which leave nothing to fit on, and without variance.
    """
    num_models, ranks = gram_NN.shape[0], list(ranks)
    if num_models < 3:
        return None
    most = max(ranks, default=0)
    # Shares do not depend on the unit, and squares of energies may overflow. A power of two causes no rounding.
    gram_NN = gram_NN * 2.0 ** -math.frexp(float(gram_NN.diagonal().max()))[1]
    results = [hold_out(gram_NN, fitted, held_out, most) for fitted, held_out in _folds_used(num_models, folds, seed)]
    total = sum(fold.energy for fold in results)
    return [sum(up_to(fold.captured_K, rank) for fold in results) / total for rank in ranks] if total > 0 else None


@lru_cache(maxsize=64)
def _folds_used(num_models: int, folds: int, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the fitted and the held-out models of each fold in use. They are the same for every layer."""
    folds_made = make_folds(num_models, folds, seed)
    enough = -(-MIN_HELD_OUT // (num_models // len(folds_made)))
    return tuple((others(num_models, held_out), held_out) for held_out in folds_made[:enough])


def leave_one_out(values_K: Tensor, vectors_NK: Tensor, rank: int) -> tuple[Tensor, float]:
    """Energy that 1, 2, … `rank` directions of all other models capture of each model, summed; and all that there is.

    Leaving out y_h and its share of the mean takes ρ·y_h y_hᵀ from the covariance, ρ = N / (N − 1). In the eigenbasis of the
    whole, with a_j the model's scores and λ_j the eigenvalues, the new eigenvalues μ are roots of Σ a_j²/(λ_j − μ) = 1/ρ
    (Golub 1973), one between each two λ, and direction k captures 1 / Σ a_j²/(λ_j − μ_k)² of x_h − mean of the others.
    Exact; N·rank·N operations a step instead of N eigendecompositions. Takes the eigenpairs of the centred Gram.
    """
    num_models = vectors_NK.shape[0]
    num_values = int((values_K > FLOOR * values_K[:1]).sum())
    values_R = _distinct(values_K[:num_values])
    squares_NR = vectors_NK[:, :num_values].square().clamp_min(LEAST_SQUARE) * values_R
    factor = num_models / (num_models - 1)
    energy = factor**2 * float(values_K.sum())
    rank = max(0, min(rank, num_models - 2, values_R.numel() - 1))
    captured_K = torch.zeros(rank, dtype=torch.float64)
    for k in range(rank):
        gaps_NR = _secular_gaps(squares_NR, values_R, k, 1 / factor)
        captured_K[k] = (1 / (squares_NR / gaps_NR.square()).sum(1)).sum()
    return captured_K.cumsum(0), energy


def _distinct(values_R: Tensor) -> Tensor:
    """Lower each eigenvalue to at least round-off below the one before. Equal eigenvalues would leave no bracket for a root."""
    values = values_R.tolist()
    for index in range(1, len(values)):
        values[index] = min(values[index], values[index - 1] * (1 - DISTINCT))
    return torch.tensor(values, dtype=torch.float64)


def _secular_gaps(squares_NR: Tensor, values_R: Tensor, pole: int, level: float) -> Tensor:
    """λ_j − μ for the roots μ between λ_pole+1 and λ_pole of Σ a²/(λ − μ) = level, of all models at once.

    The poles above and the poles below are each replaced by one pole of the same value and slope ("the middle way", Li 1993).
    Convergence is quadratic, within the bracket that the signs leave. Roots are measured from the nearer of the two poles:
    for a model near the mean (a merged one, for example) the distance is smaller than the spacing of float64 at λ.
    """
    upper, lower = values_R[pole], values_R[pole + 1]
    width = upper - lower
    above = (squares_NR / (values_R - lower - width / 2)).sum(1) < level
    poles_NR = values_R - torch.where(above, upper, lower)[:, None]
    low_N, high_N = torch.where(above, -width / 2, 0.0), torch.where(above, 0.0, width / 2)
    root_N = (low_N + high_N) / 2
    for _ in range(SECULAR_STEPS):
        gaps_NR = poles_NR - root_N[:, None]
        inverse_NR = 1 / gaps_NR
        terms_NR = squares_NR * inverse_NR
        slopes_NR = terms_NR * inverse_NR
        whole_N = terms_NR.sum(1) - level
        low_N, high_N = torch.where(whole_N < 0, root_N, low_N), torch.where(whole_N < 0, high_N, root_N)
        above_N, below_N = slopes_NR[:, : pole + 1].sum(1), slopes_NR[:, pole + 1 :].sum(1)
        up_N, down_N = gaps_NR[:, pole], -gaps_NR[:, pole + 1]
        rest_N = (whole_N - up_N * above_N + down_N * below_N) * width
        top_N, bottom_N = up_N.square() * above_N, down_N.square() * below_N
        # rest + top/(1 - t) - bottom/t = 0, the root at t of the width from the lower pole, or at 1 - t from the upper one.
        guess_N = width * torch.where(above, -_part(top_N, bottom_N, -rest_N), _part(bottom_N, top_N, rest_N))
        root_N = torch.minimum(torch.maximum(guess_N, low_N), high_N)
    return poles_NR - root_N[:, None]


def _part(near_N: Tensor, far_N: Tensor, rest_N: Tensor) -> Tensor:
    """The t in (0, 1) with rest + far/(1 - t) - near/t = 0, by the form of the quadratic's root that does not cancel."""
    middle_N = near_N + far_N + rest_N
    root_N = (middle_N.square() - 4 * rest_N * near_N).clamp_min(0).sqrt()
    return torch.where(middle_N > 0, 2 * near_N / (middle_N + root_N), (middle_N - root_N) / (2 * rest_N))
