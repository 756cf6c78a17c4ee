"""Borders: the moments of a stack that has grown, from those of its first models and one read of it.

Legend: N old models, M new ones, A all of them, R the reference (see `moments`), P the old model that lies nearest to it, C
values of one run, L left rows of its products, G models that are read at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eigenzoo.errors import DataError
from eigenzoo.linalg import kernels
from eigenzoo.linalg.block_sums import sample
from eigenzoo.linalg.kernels import PRODUCT_COLUMNS
from eigenzoo.passes.buffers import borrow
from eigenzoo.passes.resources import Resources
from eigenzoo.subspace.moments.layer_moments import LayerMoments, entry_dimensions, from_raw_gram, round_off
from eigenzoo.subspace.moments.update_moments import update_grams
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack

RUN_VALUES = 2**16
"""Values of a model in one run: a read of 256 kB takes longer than what Python does around it."""

GROUP_VALUES = 2**20
"""Values of a group of models: few enough to stay in a core's caches while all sums are taken of them."""

LEFT_VALUES = 2**22
"""Values of the new models in one run: every group is multiplied by all of them."""


def extend(moments: LayerMoments, stack: Stack) -> LayerMoments:
    """Extend the moments of a stack's first models to all of it: exact, one read and M·(N + M)·D products."""
    if isinstance(stack, UpdateStack):
        return _extend_updates(moments, stack)
    return _extend_dense(moments, stack)


def _extend_dense(moments: LayerMoments, stack: DenseStack) -> LayerMoments:
    """The border of full weights from products about P, which the read need not know R for.

    With Y' = X − P and Y = X − R, ⟨Y_m, Y_n⟩ = ⟨Y'_m, Y'_n⟩ + ⟨Y'_m, P − R⟩ + ⟨P − R, Y_n⟩: the last is known of old models, and
    ⟨Y'_m, R − P⟩ is the mean of ⟨Y'_m, Y'_k⟩ over the models that R is the mean of. No row of an old model is longer about P
    than twice what it is about R, so that nothing large cancels however far from zero all models lie.
    """
    num_old, first = moments.num_models, moments.num_reference
    nearest = int(moments.gram_NN.diagonal().argmin())
    sums = _read_border(stack, num_old, nearest, moments.removed)
    _require_finite(stack, sums.products_MA)
    towards_M = sums.products_MA[:, :first].mean(1)
    from_point_A = torch.cat([moments.gram_NN[nearest], moments.gram_NN[nearest, nearest] - towards_M])
    cross_M = sums.along_M + towards_M + moments.cross_N[nearest]
    shift_M = None
    if moments.shift_N is not None:
        shift_M = cross_M - sums.removed_M - moments.cross_N[nearest] + moments.shift_N[nearest]
    grown = bordered(moments, sums.products_MA - towards_M[:, None] + from_point_A, cross_M, shift_M)
    return replace(
        grown,
        round_off=max(moments.round_off, round_off(stack)),
        sums_N=None if moments.sums_N is None else torch.cat([moments.sums_N, sums.entries_M]),
        entries=entry_dimensions(_centered_diagonal(grown.gram_NN), sums.squares),
    )


def _centered_diagonal(gram_AA: Tensor) -> Tensor:
    """A matrix with the diagonal of `center_gram`, and nothing else of it, which costs several of such matrices."""
    means_A = gram_AA.mean(1)
    return (gram_AA.diagonal() - 2 * means_A + means_A.mean())[:, None].expand_as(gram_AA)


@dataclass
class _BorderSums:
    """What one read of a stack sums, in float64.

    Attributes:
        products_MA: ⟨Y'_m, Y'_n⟩.
        along_M: ⟨P, Y'_m⟩, removed_M: ⟨center, Y'_m⟩, and entries_M: ⟨1, X_m⟩.
        squares: Σ v² over the entries, v an entry's sum of squares over the models of `sample` about the mean of all.
    """

    products_MA: Tensor
    along_M: Tensor
    removed_M: Tensor
    entries_M: Tensor
    squares: float = 0.0


def _read_border(stack: DenseStack, num_old: int, nearest: int, removed: Tensor | None) -> _BorderSums:
    """Read a stack run by run, and in each run the new models and then the old ones, a group at a time."""
    num_all, num_new, num_values = len(stack), len(stack) - num_old, stack.layer.num_values
    sums = _BorderSums(
        torch.zeros(num_new, num_all, dtype=torch.float64), *torch.zeros(3, num_new, dtype=torch.float64)
    )
    width = _run_values(stack, num_new)
    point, new = _part(stack, [nearest]), _part(stack, range(num_old, num_all))
    sampled = range(num_all)[sample(num_all)]
    chosen = [place - num_old for place in sampled if place >= num_old]
    groups = _groups(stack, num_old, max(1, GROUP_VALUES // width))
    size = max(len(group.places) for group in groups)
    num_left = max(_padded(num_new), num_new + 2)
    with borrow(size, width, stack.dtype) as memory_GC, borrow(num_left, width, stack.dtype) as memory_LC:
        for start in range(0, num_values, width):
            stop = min(start + width, num_values)
            left_LC = _first(memory_LC, num_left, stop - start)
            point.read(start, stop, left_LC[num_new : num_new + 1])
            new.read(start, stop, left_LC[:num_new])
            kernels.subtract(left_LC[:num_new], left_LC[num_new])
            left_LC[num_new + 1 :] = 1
            _add_new(sums, left_LC, num_old, removed, range(start, stop))
            products, entries = _Products(left_LC, num_new, num_old), _Entries(left_LC[:num_new], chosen)
            place = 0
            for group in groups:
                rows_GC = _first(memory_GC, len(group.places), stop - start)
                group.stack.read(start, stop, rows_GC)
                kernels.subtract(rows_GC, left_LC[num_new])
                products.add(place, rows_GC)
                entries.add(rows_GC, group.is_sampled)
                place += len(rows_GC)
            order = [place for group in groups for place in group.places]
            sums.products_MA[:, order] += products.total()
            sums.squares += entries.squares(num_all, len(sampled))
    return sums


def _add_new(sums: _BorderSums, left_LC: Tensor, num_old: int, removed: Tensor | None, run: range) -> None:
    """Add what a run tells of the new models alone, from their rows about P, P itself and ones."""
    num_new = len(sums.along_M)
    own_LL = kernels.long_product(left_LC, left_LC)
    sums.products_MA[:, num_old:] += own_LL[:num_new, :num_new]
    sums.along_M += own_LL[num_new, :num_new]
    sums.entries_M += own_LL[num_new + 1, :num_new] + own_LL[num_new, num_new + 1]
    if removed is not None and bool(removed.any()):
        flat = removed.flatten().double()
        sums.removed_M += left_LC[:num_new].double() @ flat[torch.arange(run.start, run.stop) % len(flat)]


@dataclass(frozen=True)
class _Group:
    """Old models that are read at once: all of `sample`, or none of them."""

    places: Sequence[int]
    stack: DenseStack
    is_sampled: bool


def _groups(stack: DenseStack, num_old: int, size: int) -> list[_Group]:
    sampled = range(num_old)[sample(len(stack))]
    others = [place for place in range(num_old) if place not in sampled]
    return [
        _Group(places[first : first + size], _part(stack, places[first : first + size]), places is sampled)
        for places in (sampled, others)
        for first in range(0, len(places), size)
    ]


class _Products:
    """Products of a run's new rows with all others, `kernels.PRODUCT_COLUMNS` columns at a time, and their sum in float64.

    A group is one call of numpy for all its products, since threads wait for each other at each of Python's steps.
    """

    def __init__(self, left_LC: Tensor, num_new: int, num_old: int) -> None:
        left = left_LC[: _padded(num_new)].numpy()
        self._num_new, self._whole = num_new, left.shape[1] // PRODUCT_COLUMNS * PRODUCT_COLUMNS
        self._left_BLC = left[:, : self._whole].reshape(len(left), -1, PRODUCT_COLUMNS).transpose(1, 0, 2)
        self._rest_LC = left[:, self._whole :]
        self._found_BLN = np.empty((len(self._left_BLC), len(left), num_old), left.dtype)
        self._rest_LN = np.zeros((len(left), num_old), left.dtype)

    @np.errstate(invalid="ignore", over="ignore")
    def add(self, place: int, rows_GC: Tensor) -> None:
        """Add a group's rows, which become the columns from `place` on."""
        rows, columns = rows_GC.numpy(), slice(place, place + len(rows_GC))
        rows_BCG = rows[:, : self._whole].reshape(len(rows), -1, PRODUCT_COLUMNS).transpose(1, 2, 0)
        if self._whole:
            np.matmul(self._left_BLC, rows_BCG, out=self._found_BLN[:, :, columns])
        if self._whole < rows.shape[1]:
            np.matmul(self._rest_LC, rows[:, self._whole :].T, out=self._rest_LN[:, columns])

    def total(self) -> Tensor:
        """Return the products of the new models with all rows, in the order in which they came."""
        return torch.from_numpy(self._found_BLN.sum(0, dtype=np.float64) + self._rest_LN)[: self._num_new]


class _Entries:
    """Sums over the models of each entry of a run, about P: of all models, of those of `sample`, and of their squares."""

    def __init__(self, new_MC: Tensor, chosen: Sequence[int]) -> None:
        self._all_C, self._sampled_C, self._squares_C, self._found_C = new_MC.new_zeros(4, new_MC.shape[1])
        self.add(new_MC, False)
        if chosen:
            rows_GC = new_MC[list(chosen)]
            self._add_sampled(rows_GC, len(chosen) * kernels.mean_rows(rows_GC))

    def add(self, rows_GC: Tensor, is_sampled: bool) -> None:
        """Add the rows of some models."""
        kernels.mean_rows(rows_GC, self._found_C)
        self._all_C.add_(self._found_C, alpha=len(rows_GC))
        if is_sampled:
            self._add_sampled(rows_GC, len(rows_GC) * self._found_C)

    def _add_sampled(self, rows_GC: Tensor, sum_C: Tensor) -> None:
        self._sampled_C += sum_C
        self._squares_C += kernels.column_energies(rows_GC)

    def squares(self, num_all: int, num_sampled: int) -> float:
        """Return Σ v² over the entries."""
        mean_C = self._all_C.double() / num_all
        variances_C = self._squares_C - mean_C * (2 * self._sampled_C.double() - num_sampled * mean_C)
        return float(variances_C @ variances_C)


def _run_values(stack: DenseStack, num_new: int) -> int:
    """Give C: as many whole products as the new models' rows leave room for."""
    width = min(RUN_VALUES, max(1, LEFT_VALUES // (num_new + 2) // PRODUCT_COLUMNS) * PRODUCT_COLUMNS)
    return min(width, stack.layer.num_values)


def _padded(num_new: int) -> int:
    """Give the rows of a product: it runs in tiles of four, and three rows take longer than four; one is a sum of its own."""
    return 1 if num_new == 1 else -(-num_new // 4) * 4


def _part(stack: DenseStack, places: Sequence[int]) -> DenseStack:
    """Return some of a stack's models, read as all of them are: alone they may be few enough to be read as float64."""
    part = stack.subset(places)
    part.dtype = stack.dtype
    return part


def _first(memory: Tensor, rows: int, columns: int) -> Tensor:
    """The beginning of some memory as contiguous rows."""
    return memory.view(-1)[: rows * columns].view(rows, columns)


def _require_finite(stack: DenseStack, products_MA: Tensor) -> None:
    """Raise DataError, naming the model, where a value was not finite or a product overflowed: each reaches the products."""
    if bool(torch.isfinite(products_MA).all()):
        return
    for start, stop in stack.spans():
        stack.check_finite(start, stop)
    raise DataError(
        "the products of its values overflow",
        where=f"layer '{stack.layer.name}'",
        rule="squares of weights are finite in the precision of the products",
        next_step="use precision 'high', or --exclude the layer so that it is carried unchanged",
    )


def _extend_updates(moments: LayerMoments, stack: UpdateStack) -> LayerMoments:
    """The borders of both Grams of the updates, from factors; their traits, which cost little, anew."""
    num_old = moments.num_models
    # A new model of lower rank leaves fewer leading rows that all have: the old models' products are of too many.
    starts_NN, singular_NR, sums_N = moments.starts_NN, moments.singular_NR, moments.sums_N
    if starts_NN is None or singular_NR is None or sums_N is None or min(stack.ranks[:num_old]) != min(stack.ranks):
        grams = update_grams(stack, Resources())
    else:
        grams = update_grams(stack, Resources(), num_old)
        grams.raw_NN[:num_old, :num_old] = moments.raw_NN
        grams.starts_NN[:num_old, :num_old] = starts_NN
        grams.singular_NR[:num_old, : singular_NR.shape[1]] = singular_NR
        grams.sums_N[:num_old] = sums_N
    if moments.shift_N is None:
        grown = from_raw_gram(grams.raw_NN, moments.num_values, max(moments.round_off, round_off(stack)))
    else:
        grown = replace(moments, **_zero_centered(grams.raw_NN), num_reference=len(stack))
    return replace(grown, starts_NN=grams.starts_NN, singular_NR=grams.singular_NR, sums_N=grams.sums_N)


def _zero_centered(raw_NN: Tensor) -> dict[str, Any]:
    about_mean = from_raw_gram(raw_NN, 0)
    return {
        "gram_NN": about_mean.gram_NN,
        "cross_N": about_mean.cross_N,
        "reference_energy": about_mean.reference_energy,
        "shift_N": about_mean.cross_N,
        "shift_energy": about_mean.reference_energy,
    }


def bordered(moments: LayerMoments, border: Tensor, cross: Tensor, shift: Tensor | None) -> LayerMoments:
    """Put a border (M, N + M) around the Gram; what the border does not tell of the new models is dropped."""
    num_old = moments.num_models
    gram_NN = border.new_empty(border.shape[1], border.shape[1])
    gram_NN[:num_old, :num_old] = moments.gram_NN
    gram_NN[num_old:, :num_old] = border[:, :num_old]
    gram_NN[:num_old, num_old:] = border[:, :num_old].T
    gram_NN[num_old:, num_old:] = (border[:, num_old:] + border[:, num_old:].T) / 2
    shift_N = torch.cat([moments.shift_N, shift]) if moments.shift_N is not None and shift is not None else None
    return replace(
        moments,
        gram_NN=gram_NN,
        cross_N=torch.cat([moments.cross_N, cross]),
        shift_N=shift_N,
        entries=None,
        sums_N=None,
        singular_NR=None,
        starts_NN=None,
    )


def extended_inside(
    moments: LayerMoments, coefficients_NK: Tensor, energies_M: Tensor, outside_M: Tensor
) -> LayerMoments:
    """Extend the moments of the first models to all, the last M of which are known by these energies ‖X‖² and ‖X − X̂‖².

    So a bundle alone tells of models that were added when the old models' files were gone. Inside the kept subspace, inner products
    are those of coefficients (N, K). What two models have in common outside of it is not known, and counts as nothing.
    """
    num_known, num_new = moments.num_models, energies_M.numel()
    inside = coefficients_NK[num_known:].double()
    border = inside @ coefficients_NK.double().T
    places = torch.arange(num_new)
    border[places, num_known + places] += outside_M.double()
    cross = (energies_M - border[places, num_known + places] - moments.reference_energy) / 2
    return bordered(moments, border, cross, None)
