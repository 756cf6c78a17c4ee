"""Measure how much of held-out models the sides of the others keep, at every rank: of outputs, of inputs, and of both together.

The same fold is held out as by a fit (`tucker_fit.tucker_capture`), so that at a fit's ranks both give the same share.

Legend: N models, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.linalg.heldout import NUM_FOLDS, make_folds
from eigenzoo.linalg.side import SideMoment
from eigenzoo.passes.resources import Resources
from eigenzoo.subspace.fitting.tucker_fit import LARGEST_HELD_OUT
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.stack import Stack, UpdateStack

BOTH = "outputs,inputs"


@dataclass(frozen=True)
class SideShares:
    """Shares of the variance about the fitted models' mean that the leading directions of sides keep.

    Attributes:
        rank: directions per truncated side; a rank above a side's size keeps all of it.
        in_sample, captured: shares of the fitted and of the held-out models.
    """

    rank: tuple[int, ...]
    in_sample: tuple[float, ...]
    captured: tuple[float, ...]

    def at(self, part: str, rank: int) -> float:
        """Return a share at a rank: that of the largest known rank at or below it."""
        values: tuple[float, ...] = getattr(self, part)
        return [value for known, value in zip(self.rank, values, strict=True) if known <= rank][-1]


@dataclass(frozen=True)
class Fold:
    """One fold of five: the models fitted and held out, and complete bases of the fitted ones' sides (None: not asked)."""

    fitted: list[int]
    heldout: list[int]
    outputs_OO: Tensor | None
    inputs_II: Tensor | None


def hold_out_sides(
    stack: Stack, moments: LayerMoments, axes: Sequence[str], resources: Resources, seed: int = 0
) -> Fold | None:
    """Hold one fold of five out. Cost: one pass over the fitted models, O³ and I³ eigendecompositions.

    None for fewer than five models, for sides above `LARGEST_HELD_OUT`, and without variance.
    """
    sizes = dict(zip(("outputs", "inputs"), stack.layer.shape, strict=True))
    chosen = [axis for axis in sizes if axis in axes]
    num_models = len(stack)
    if not chosen or num_models < NUM_FOLDS or moments.variance == 0:
        return None
    if max(sizes[axis] for axis in chosen) > LARGEST_HELD_OUT:
        return None
    held, *rest = make_folds(num_models, NUM_FOLDS, seed)
    fitted = torch.cat(rest)
    part = collect(stack.subset(fitted.tolist()), tuple(chosen), "models", resources)
    outputs_OO = _complete(part.outputs) if "outputs" in chosen else None
    inputs_II = _complete(part.inputs) if "inputs" in chosen else None
    return Fold(fitted.tolist(), held.tolist(), outputs_OO, inputs_II)


def heldout_sides(stack: Stack, fold: Fold | None) -> dict[str, SideShares]:
    """Return the shares by axis, those of both sides under `outputs,inputs`; about the models' mean.

    Bases are complete, so that one rotation of each model gives the shares at every rank. Cost: a pass over the weights and
    N·O·I·(O + I) products (updates: N·O·I·R). Memory: four matrices of O × I.
    """
    if fold is None:
        return {}
    outputs_OO, inputs_II = fold.outputs_OO, fold.inputs_II
    chosen = [axis for axis, basis in (("outputs", outputs_OO), ("inputs", inputs_II)) if basis is not None]
    sum_OI, squares_OI = _sums(stack, fold.fitted, outputs_OO, inputs_II)
    mean_OI = sum_OI / len(fold.fitted)
    fitted_OI = squares_OI - sum_OI * mean_OI
    sum_OI, squares_OI = _sums(stack, fold.heldout, outputs_OO, inputs_II)
    held_OI = squares_OI - 2 * mean_OI * sum_OI + len(fold.heldout) * mean_OI.square()
    shares = {axis: _shares(fitted_OI, held_OI, (axis,)) for axis in chosen}
    return shares | ({BOTH: _shares(fitted_OI, held_OI, ("outputs", "inputs"))} if len(chosen) == 2 else {})


def _complete(side: SideMoment | None) -> Tensor:
    """All eigenvectors of a moment as columns, the leading ones first."""
    assert side is not None
    vectors: Tensor = torch.linalg.eigh(side.matrix_SS)[1].flip(1)
    return vectors


def _sums(
    stack: Stack, indices: Iterable[int], outputs_OO: Tensor | None, inputs_II: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Σ C and Σ C² of the models' rotated layers C = UᵀXV."""
    sum_OI, squares_OI = torch.zeros(2, *stack.layer.shape, dtype=torch.float64)
    for index in indices:
        if isinstance(stack, UpdateStack):
            left, right = (factor.double() for factor in stack.factors(index))
            left = left if outputs_OO is None else outputs_OO.T @ left
            core_OI = left @ (right if inputs_II is None else right @ inputs_II)
        else:
            core_OI = stack.matrix(index).double()
            core_OI = core_OI if outputs_OO is None else outputs_OO.T @ core_OI
            core_OI = core_OI if inputs_II is None else core_OI @ inputs_II
        sum_OI += core_OI
        squares_OI += core_OI.square()
    return sum_OI, squares_OI


def _shares(fitted_OI: Tensor, held_OI: Tensor, axes: Sequence[str]) -> SideShares:
    """Shares of the leading rows, columns, or corner."""
    outputs, inputs = fitted_OI.shape
    largest = max(size for axis, size in (("outputs", outputs), ("inputs", inputs)) if axis in axes)
    ranks = ranks_up_to(largest)
    found = []
    for energies_OI in (fitted_OI, held_OI):
        total = float(energies_OI.sum())
        corners = (
            energies_OI[: rank if "outputs" in axes else outputs, : rank if "inputs" in axes else inputs]
            for rank in ranks
        )
        found.append(tuple(float(corner.sum()) / total if total > 0 else 0.0 for corner in corners))
    return SideShares(ranks, *found)


def ranks_up_to(largest: int) -> tuple[int, ...]:
    """Return the powers of two below the largest rank, and that one."""
    return (*(2**power for power in range(32) if 2**power < largest), largest)


def pooled_sides(layers: Iterable[tuple[Mapping[str, SideShares], float]]) -> dict[str, SideShares]:
    """Average shares over layers, weighted by their variance; a smaller layer counts with all it has at larger ranks."""
    known = [(shares, variance) for shares, variance in layers if shares and variance > 0]
    pooled = {}
    for axes in dict.fromkeys(axes for shares, _ in known for axes in shares):
        having = [(shares[axes], variance) for shares, variance in known if axes in shares]
        ranks = ranks_up_to(max(shares.rank[-1] for shares, _ in having))
        total = sum(variance for _, variance in having)
        columns = [
            tuple(sum(weight * shares.at(part, rank) for shares, weight in having) / total for rank in ranks)
            for part in ("in_sample", "captured")
        ]
        pooled[axes] = SideShares(tuple(ranks), *columns)
    return pooled
