"""Measure the loss of models with sides and low-rank cores, at every rank of the sides and of the cores: exactly, without a fit.

A core at smaller ranks is a corner of the core at larger ones. For updates B·A, the corner's singular values are those of a small
matrix: (UᵀB)[:P] = Q₁R₁ and ((AV)[:, :Q])ᵀ = Q₂R₂ give the values of R₁R₂ᵀ.

Legend: N models, O outputs, I inputs, P and Q kept directions, R rank of an update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.linalg import low_rank
from eigenzoo.subspace.bases.tucker import stack_mean
from eigenzoo.subspace.fitting.heldout_sides import Fold, ranks_up_to
from eigenzoo.subspace.fitting.tucker_fit import LARGEST_HELD_OUT, centered_energy
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.stack import Stack, UpdateStack

Tails = tuple[Tensor, ...]
"""For each rank of the sides: the energy of all cores that is lost if they are cut to 0, 1, 2, … singular values."""

Pair = tuple[Tensor, Tensor]
"""An update, or a core, as its factors (O, R) and (R, I)."""


@dataclass(frozen=True)
class FoldTails:
    """Tails between the directions of a fold's fitted models: of these, and of the models held out; and Σ‖X − mean‖² of both.

    The mean is that of the fitted models. Their mean error does not count as lost variance, as by a fit.
    """

    fitted: Tails
    heldout: Tails
    variances: tuple[float, float]


@dataclass(frozen=True)
class CoreLosses:
    """Energies that a layer's models lose with axes outputs and inputs.

    Attributes:
        directions: of each side above round-off.
        energy: of what is projected: updates, or the deviations of full weights.
        sides: the ranks of both sides that are known: powers of two below the largest, and that one.
        tails: of all models, between the directions of all.
        fold: of one fold of five; None for full weights, and where none is held out.
    """

    directions: tuple[int, int]
    energy: float
    sides: tuple[int, ...]
    tails: Tails
    fold: FoldTails | None = None

    def lost(self, rank: int, core_rank: int | None) -> float:
        """Return what a fit with these ranks loses; None for whole cores."""
        tails = self.tails[self._index(rank)]
        return max(self.energy - float(tails[0]), 0.0) + self._cut(tails, rank, core_rank)

    def cut_shares(self, rank: int, core_rank: int) -> tuple[float, float] | None:
        """Return the shares of a fold's variance that the cut loses, of fitted and of held-out models; None without a fold."""
        if self.fold is None:
            return None
        index, (fitted, heldout) = self._index(rank), self.fold.variances
        return (
            self._cut(self.fold.fitted[index], rank, core_rank) / fitted,
            self._cut(self.fold.heldout[index], rank, core_rank) / heldout,
        )

    def cuts(self, rank: int, core_rank: int) -> bool:
        """Tell whether factors of this rank take fewer numbers than whole cores: elsewhere a fit leaves them whole."""
        return low_rank.pays((min(rank, self.directions[0]), min(rank, self.directions[1])), core_rank)

    def _cut(self, tails: Tensor, rank: int, core_rank: int | None) -> float:
        if core_rank is None or not self.cuts(rank, core_rank):
            return 0.0
        return float(tails[min(core_rank, len(tails) - 1)])

    def _index(self, rank: int) -> int:
        return max(index for index, known in enumerate(self.sides) if known <= rank)


def core_losses(stack: Stack, moments: LayerMoments, fold: Fold | None) -> CoreLosses | None:
    """Measure a layer, in one more pass over its weights (two for full weights about their mean).

    Return None without moments of both sides, and for sides above `LARGEST_HELD_OUT`. Cost for updates: N·O·I·R products. Cost for
    full weights: N·O·I·(O + I), and the SVD of every model and of its corners. Memory: all models' rotated factors, or one model.
    """
    if moments.outputs is None or moments.inputs is None or max(stack.layer.shape) > LARGEST_HELD_OUT:
        return None
    outputs, inputs = moments.outputs.eigenvectors(), moments.inputs.eigenvectors()
    directions = outputs.values_K.numel(), inputs.values_K.numel()
    left_OP, right_IQ = outputs.basis(directions[0]), inputs.basis(directions[1])
    sides = ranks_up_to(max(*directions, 1))
    if isinstance(stack, UpdateStack):
        pairs = [(b.double(), a.double()) for b, a in (stack.factors(index) for index in range(len(stack)))]
        energy = float(moments.energies_N.sum())
        tails = _update_tails([(left_OP.T @ b, a @ right_IQ) for b, a in pairs], sides)
        if fold is None or fold.outputs_OO is None or fold.inputs_II is None:
            return CoreLosses(directions, energy, sides, tails)
        rotated = [(fold.outputs_OO.T @ b, a @ fold.inputs_II) for b, a in pairs]
        fitted, heldout = torch.tensor(fold.fitted), torch.tensor(fold.heldout)
        errors = _update_errors(rotated, sides, (fold.fitted, fold.heldout))
        mean_errors = [sums_KPQ / len(fold.fitted) for _, sums_KPQ in errors[0]]
        fitted_tails, heldout_tails = (
            tuple(
                tails_K + ((len(part) * mean_KPQ - 2 * sums_KPQ) * mean_KPQ).flatten(1).sum(1)
                for (tails_K, sums_KPQ), mean_KPQ in zip(of_part, mean_errors, strict=True)
            )
            for of_part, part in zip(errors, (fold.fitted, fold.heldout), strict=True)
        )
        variances = (float(centered_energy(moments.centered_NN, fitted, part)) for part in (fitted, heldout))
        of_fold = FoldTails(fitted_tails, heldout_tails, (next(variances), next(variances)))
        return CoreLosses(directions, energy, sides, tails, of_fold)
    removed = stack_mean(stack) if moments.removed is None else moments.removed
    cores = (left_OP.T @ (stack.matrix(index).double() - removed) @ right_IQ for index in range(len(stack)))
    return CoreLosses(directions, moments.variance, sides, _dense_tails(cores, sides))


def _update_tails(pairs: Sequence[Pair], sides: Sequence[int]) -> Tails:
    left_NPR, right_NQR = _stacked(pairs)
    tails = []
    for side in sides:
        left, right = (torch.linalg.qr(part[:, :side], mode="r")[1] for part in (left_NPR, right_NQR))
        tails.append(low_rank.tails(left @ right.mT))
    return tuple(tails)


def _update_errors(
    pairs: Sequence[Pair], sides: Sequence[int], parts: Sequence[Sequence[int]]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Return for each part of the models, by rank of the sides, Σ‖E‖² (K + 1,) and ΣE (K + 1, P, Q) of the errors E of the cut."""
    left_NPR, right_NQR = _stacked(pairs)
    errors: list[list[tuple[Tensor, Tensor]]] = [[] for _ in parts]
    for side in sides:
        (left_NPK, left_NKR), (right_NQK, right_NKR) = (
            torch.linalg.qr(part[:, :side]) for part in (left_NPR, right_NQR)
        )
        u_NKK, values_NK, vt_NKK = torch.linalg.svd(left_NKR @ right_NKR.mT, full_matrices=False)
        left_NPK, right_NQK = left_NPK @ u_NKK * values_NK[:, None], right_NQK @ vt_NKK.mT
        for of_part, part in zip(errors, parts, strict=True):
            terms_KPQ = torch.einsum("npk,nqk->kpq", left_NPK[part], right_NQK[part])
            of_part.append((_from_the_last(values_NK[part].square().sum(0)), _from_the_last(terms_KPQ)))
    return errors


def _from_the_last(terms: Tensor) -> Tensor:
    """Return the sums of all terms from the first, second, … on, and a zero for none."""
    return torch.cat([terms.flip(0).cumsum(0).flip(0), torch.zeros_like(terms[:1])])


def _stacked(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Stack factors as (N, P, R) and (N, Q, R). Smaller ranks are padded with zeros."""
    rank = max(left.shape[1] for left, _ in pairs)
    left_NPR = torch.stack([torch.nn.functional.pad(left, (0, rank - left.shape[1])) for left, _ in pairs])
    right_NQR = torch.stack([torch.nn.functional.pad(right.T, (0, rank - right.shape[0])) for _, right in pairs])
    return left_NPR, right_NQR


def _dense_tails(cores: Iterable[Tensor], sides: Sequence[int]) -> Tails:
    sums: list[Tensor] = []
    for core_PQ in cores:
        each = [low_rank.tails(core_PQ[None, :side, :side]) for side in sides]
        sums = [known + more for known, more in zip(sums, each, strict=True)] if sums else each
    return tuple(sums)
