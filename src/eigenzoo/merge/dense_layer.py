"""Merge one layer of full weights, some rows of all models at a time.

Legend: T models, O outputs, I inputs, p rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from eigenzoo.linalg.spectrum import largest_singular_value
from eigenzoo.merge.certificate import LayerSums
from eigenzoo.merge.layer_updates import Combination, Context, LayerUpdates, Product, RowWise
from eigenzoo.merge.request import Job
from eigenzoo.zoo.stack import DenseStack

VECTORS = ("vector", "scalar")
"""Unfoldings of norms and biases, which are not matrices."""

OF_MATRICES = ("core", "factors")
"""Kinds of methods that say nothing of norms and biases: these are averaged."""


SPECTRAL_VALUES = 2**22
"""Values of the largest layer with which largest singular values are computed: its rows then take no more than a tile."""

TILE_BYTES = 32 * 2**20
"""Bytes of the rows of all models that are read at a time."""

Apply = Callable[[int, Tensor], Tensor]
"""Gives rows (p, I) of a merged update from the number of the first and the same rows of all updates (T, p, I)."""


class UpdatesInTiles(LayerUpdates):
    """A layer of full weights minus their base, read in blocks of rows, or one model after another."""

    def __init__(self, context: Context, stack: DenseStack) -> None:
        super().__init__(context)
        self._stack = stack

    @property
    def num_values(self) -> int:
        """O·I."""
        return self._stack.layer.num_values

    @property
    def rank(self) -> int:
        """Rank of a dense matrix."""
        return min(self._stack.layer.shape)

    @cached_property
    def gram_TT(self) -> Tensor:
        """The updates' inner products, (T, T) float64. One pass."""
        gram_TT = torch.zeros(self.num_models, self.num_models, dtype=torch.float64)
        for block in self.blocks():
            gram_TT += block.flatten(1) @ block.flatten(1).T
        return gram_TT

    def blocks(self) -> Iterator[Tensor]:
        """Yield the updates' rows in their order, (T, p, I) float64."""
        inputs = self._stack.layer.shape[1]
        for block in self._stack.blocks(TILE_BYTES):
            # A copy always: the stack's memory is used again.
            yield block.rows.to(torch.float64, copy=True).view(self.num_models, -1, inputs)

    def matrices(self) -> Iterator[Tensor]:
        """Yield the updates one by one, (O, I) float64."""
        return (self._stack.matrix(index).double() for index in range(self.num_models))

    def whole(self) -> Tensor:
        """Return the updates, (T, O, I) float64."""
        return torch.stack(list(self.matrices()))


def merge_rows(layer: UpdatesInTiles, job: Job, unfolding: str) -> Apply:
    """Return what gives rows of the merged update. Norms and biases are averaged by methods that are about matrices, and layers
    without moments of inputs by methods that need them."""
    method, weights_T, scale = job.request.method, job.context.weights_T, job.request.scale
    without_moment = method.kind == "factors" and not job.context.input_grams
    if without_moment or (unfolding in VECTORS and method.kind in OF_MATRICES):
        total = float(weights_T.sum())
        return _combination((weights_T / total if total else torch.full_like(weights_T, 1 / len(weights_T))) * scale)
    result = method.merge(layer, **job.request.options)
    if isinstance(result, Combination):
        return _combination(result.coefficients_T * scale)
    if isinstance(result, RowWise):
        of_rows = result.apply
        return lambda first, block: of_rows(block) * scale
    merged_OI = (result.left_OS @ result.right_SI if isinstance(result, Product) else result) * scale
    return lambda first, block: merged_OI[first : first + block.shape[1]]


def _combination(coefficients_T: Tensor) -> Apply:
    return lambda first, block: torch.tensordot(coefficients_T, block, 1)


def write_rows(layer: UpdatesInTiles, apply: Apply, write: Callable[[Tensor], Tensor], *, spectral: bool) -> LayerSums:
    """Compute the merge M some rows at a time, write them, and compare what was written with M and with the sources. One pass.

    `write` takes rows of M in their order, and returns them as the file has them, without the base. With `spectral` all rows stay
    in memory, for the largest singular values.
    """
    num, energy, lost, first = layer.num_models, 0.0, 0.0, 0
    energies_T, products_T = torch.zeros(num).double(), torch.zeros(num).double()
    kept: tuple[list[Tensor], list[Tensor]] = [], []
    for block in layer.blocks():
        merged = apply(first, block)
        written = write(merged)
        difference = merged - written
        energy, lost = energy + float(merged.square().sum()), lost + float(difference.square().sum())
        energies_T += block.square().sum((1, 2))
        products_T += (block * written).sum((1, 2))
        if spectral:
            kept[0].append(merged)
            kept[1].append(difference)
        first += block.shape[1]
    largest, largest_lost = (largest_singular_value(torch.cat(rows)) if spectral else None for rows in kept)
    return LayerSums(
        rank=layer.rank,
        energy=energy,
        lost=lost,
        largest=largest,
        largest_lost=largest_lost,
        energies_T=energies_T,
        products_T=products_T,
    )
