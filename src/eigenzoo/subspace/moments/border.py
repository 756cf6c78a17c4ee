"""Extend the moments of a stack's first models to a larger stack, with one read of it.

Legend: N old models, M new ones, A all of them, R the reference (see `moments`), P the old model nearest to it, C values of one
    block, L left rows of its products, G models that are read at once.
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

BLOCK_VALUES = 2**16
"""Values of a model in one block. A read of 256 kB takes longer than the Python code around it."""

GROUP_VALUES = 2**20
"""Values of a group of models, few enough to stay in a core's caches while they are summed."""

LEFT_VALUES = 2**22
"""Values of the new models in one block. Every group is multiplied by all of them."""


def extend(moments: LayerMoments, stack: Stack) -> LayerMoments:
    """Extend the moments of a stack's first models to the whole stack. Exact; one read and M·(N + M)·D products."""
    if isinstance(stack, UpdateStack):
        return _extend_updates(moments, stack)
    return _extend_dense(moments, stack)


def _extend_dense(moments: LayerMoments, stack: DenseStack) -> LayerMoments:
    """Compute the border of full weights from products about P, because R is not stored.

    With Y' = X − P and Y = X − R, ⟨Y_m, Y_n⟩ = ⟨Y'_m, Y'_n⟩ + ⟨Y'_m, P − R⟩ + ⟨P − R, Y_n⟩: the last term follows from the Gram,
    and ⟨Y'_m, R − P⟩ is the mean of ⟨Y'_m, Y'_k⟩ over the models whose mean is R. The norm of an old model about P is at most twice
    its norm about R. So no large terms cancel, even if all models are far from zero.
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
    """Return a matrix with the diagonal of `center_gram`, which itself would need memory for several such matrices."""
    means_A = gram_AA.mean(1)
    return (gram_AA.diagonal() - 2 * means_A + means_A.mean())[:, None].expand_as(gram_AA)


@dataclass
class _BorderSums:
    """Sums over one read of a stack, in float64.

    Attributes:
        products_MA: ⟨Y'_m, Y'_n⟩.
        along_M: ⟨P, Y'_m⟩, removed_M: ⟨center, Y'_m⟩, and entries_M: ⟨1, X_m⟩.
        squares: Σ v² over the entries, with v the sum of an entry's squares about the mean of all models, over those of `sample`.
    """

    products_MA: Tensor
    along_M: Tensor
    removed_M: Tensor
    entries_M: Tensor
    squares: float = 0.0


def _read_border(stack: DenseStack, num_old: int, nearest: int, removed: Tensor | None) -> _BorderSums:
    """Read a stack block by block. In each block read the new models first and then the old ones, one group at a time."""
    num_all, num_new, num_values = len(stack), len(stack) - num_old, stack.layer.num_values
    sums = _BorderSums(
        torch.zeros(num_new, num_all, dtype=torch.float64), *torch.zeros(3, num_new, dtype=torch.float64)
    )
    width = _block_values(stack, num_new)
    point, new = _part(stack, [nearest]), _part(stack, range(num_old, num_all))
    sampled = range(num_all)[sample(num_all)]
    chosen = [index - num_old for index in sampled if index >= num_old]
    groups = _groups(stack, num_old, max(1, GROUP_VALUES // width))
    size = max(len(group.indices) for group in groups)
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
            first = 0
            for group in groups:
                rows_GC = _first(memory_GC, len(group.indices), stop - start)
                group.stack.read(start, stop, rows_GC)
                kernels.subtract(rows_GC, left_LC[num_new])
                products.add(first, rows_GC)
                entries.add(rows_GC, group.is_sampled)
                first += len(rows_GC)
            order = [index for group in groups for index in group.indices]
            sums.products_MA[:, order] += products.total()
            sums.squares += entries.squares(num_all, len(sampled))
    return sums


def _add_new(sums: _BorderSums, left_LC: Tensor, num_old: int, removed: Tensor | None, block: range) -> None:
    """Add the sums of a block that need the new models only, from their rows about P, P itself and ones."""
    num_new = len(sums.along_M)
    sums_LL = kernels.long_product(left_LC, left_LC)
    sums.products_MA[:, num_old:] += sums_LL[:num_new, :num_new]
    sums.along_M += sums_LL[num_new, :num_new]
    sums.entries_M += sums_LL[num_new + 1, :num_new] + sums_LL[num_new, num_new + 1]
    if removed is not None and bool(removed.any()):
        flat = removed.flatten().double()
        sums.removed_M += left_LC[:num_new].double() @ flat[torch.arange(block.start, block.stop) % len(flat)]


@dataclass(frozen=True)
class _Group:
    """Old models that are read at once. Either all of them are in `sample` or none."""

    indices: Sequence[int]
    stack: DenseStack
    is_sampled: bool


def _groups(stack: DenseStack, num_old: int, size: int) -> list[_Group]:
    sampled = range(num_old)[sample(len(stack))]
    others = [index for index in range(num_old) if index not in sampled]
    return [
        _Group(indices[first : first + size], _part(stack, indices[first : first + size]), indices is sampled)
        for indices in (sampled, others)
        for first in range(0, len(indices), size)
    ]


class _Products:
    """Products of a block's new rows with all rows, `kernels.PRODUCT_COLUMNS` columns at a time, and their sum in float64.

    One numpy call computes all products of a group, because threads wait for the GIL between calls.
    """

    def __init__(self, left_LC: Tensor, num_new: int, num_old: int) -> None:
        left = left_LC[: _padded(num_new)].numpy()
        self._num_new, self._num_whole = num_new, left.shape[1] // PRODUCT_COLUMNS * PRODUCT_COLUMNS
        self._left_BLC = left[:, : self._num_whole].reshape(len(left), -1, PRODUCT_COLUMNS).transpose(1, 0, 2)
        self._rest_LC = left[:, self._num_whole :]
        self._products_BLN = np.empty((len(self._left_BLC), len(left), num_old), left.dtype)
        self._rest_LN = np.zeros((len(left), num_old), left.dtype)

    @np.errstate(invalid="ignore", over="ignore")
    def add(self, first: int, rows_GC: Tensor) -> None:
        """Multiply with a group's rows. The products are the columns from `first` on."""
        rows, columns = rows_GC.numpy(), slice(first, first + len(rows_GC))
        rows_BCG = rows[:, : self._num_whole].reshape(len(rows), -1, PRODUCT_COLUMNS).transpose(1, 2, 0)
        if self._num_whole:
            np.matmul(self._left_BLC, rows_BCG, out=self._products_BLN[:, :, columns])
        if self._num_whole < rows.shape[1]:
            np.matmul(self._rest_LC, rows[:, self._num_whole :].T, out=self._rest_LN[:, columns])

    def total(self) -> Tensor:
        """Return the products of the new models with all rows, in the order of the calls."""
        return torch.from_numpy(self._products_BLN.sum(0, dtype=np.float64) + self._rest_LN)[: self._num_new]


class _Entries:
    """Sums over models of each entry of a block about P: over all models, over those of `sample`, and of their squares."""

    def __init__(self, new_MC: Tensor, chosen: Sequence[int]) -> None:
        self._all_C, self._sampled_C, self._squares_C, self._mean_C = new_MC.new_zeros(4, new_MC.shape[1])
        self.add(new_MC, False)
        if chosen:
            rows_GC = new_MC[list(chosen)]
            self._add_sampled(rows_GC, len(chosen) * kernels.mean_rows(rows_GC))

    def add(self, rows_GC: Tensor, is_sampled: bool) -> None:
        """Add the rows of some models."""
        kernels.mean_rows(rows_GC, self._mean_C)
        self._all_C.add_(self._mean_C, alpha=len(rows_GC))
        if is_sampled:
            self._add_sampled(rows_GC, len(rows_GC) * self._mean_C)

    def _add_sampled(self, rows_GC: Tensor, sum_C: Tensor) -> None:
        self._sampled_C += sum_C
        self._squares_C += kernels.column_energies(rows_GC)

    def squares(self, num_all: int, num_sampled: int) -> float:
        """Return Σ v² over the entries."""
        mean_C = self._all_C.double() / num_all
        variances_C = self._squares_C - mean_C * (2 * self._sampled_C.double() - num_sampled * mean_C)
        return float(variances_C @ variances_C)


def _block_values(stack: DenseStack, num_new: int) -> int:
    """Return C: as many whole products as fit beside the new models' rows."""
    width = min(BLOCK_VALUES, max(1, LEFT_VALUES // (num_new + 2) // PRODUCT_COLUMNS) * PRODUCT_COLUMNS)
    return min(width, stack.layer.num_values)


def _padded(num_new: int) -> int:
    """Return the number of rows of a product: one, or a multiple of four, because three rows take longer than four."""
    return 1 if num_new == 1 else -(-num_new // 4) * 4


def _part(stack: DenseStack, indices: Sequence[int]) -> DenseStack:
    """Return some of a stack's models with the dtype of the whole stack. A smaller stack alone could be read as float64."""
    part = stack.subset(indices)
    part.dtype = stack.dtype
    return part


def _first(memory: Tensor, rows: int, columns: int) -> Tensor:
    """Return the beginning of a block of memory as contiguous rows."""
    return memory.view(-1)[: rows * columns].view(rows, columns)


def _require_finite(stack: DenseStack, products_MA: Tensor) -> None:
    """Raise DataError, naming the model, if a value was not finite or a product overflowed. Both make the products not finite."""
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
    """Extend both Grams of the updates by borders from factors. Their traits are cheap and computed again."""
    num_old = moments.num_models
    # If a new model has a lower rank, the models share fewer leading rows, and the old products are of too many.
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
    """Add a border (M, N + M) to the Gram. Traits that the border does not give for the new models are dropped."""
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
    """Extend the moments of the first models to all. The energies ‖X‖² and ‖X − X̂‖² of the last M are given.

    A bundle alone gives this for models that were added after the old models' files were gone. Inner products inside the kept
    subspace are those of coefficients (N, K). Inner products outside of it are unknown and counted as zero.
    """
    num_old, num_new = moments.num_models, energies_M.numel()
    inside = coefficients_NK[num_old:].double()
    border = inside @ coefficients_NK.double().T
    indices = torch.arange(num_new)
    border[indices, num_old + indices] += outside_M.double()
    cross = (energies_M - border[indices, num_old + indices] - moments.reference_energy) / 2
    return bordered(moments, border, cross, None)
