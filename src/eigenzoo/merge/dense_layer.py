"""Merge one layer of full weights, some rows of all models at a time.

Legend: T models, O outputs, I inputs, p rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from eigenzoo.linalg.spectrum import largest_singular_value
from eigenzoo.merge.certificate import LayerSums
from eigenzoo.merge.layer_updates import Context, LayerUpdates, Product, values_of
from eigenzoo.merge.request import Job
from eigenzoo.zoo.stack import DenseStack

VECTORS = ("vector", "scalar")
"""Unfoldings of norms and biases, which are not matrices."""

OF_MATRICES = ("core", "factors")
"""Kinds of methods that say nothing of norms and biases: these are averaged."""


class UpdatesInTiles(LayerUpdates):
    """A layer of full weights minus their base, read in blocks of rows, or one model after another."""

    def __init__(self, context: Context, stack: DenseStack) -> None:
        super().__init__(context)
        self._stack = stack

    @property
    def num_values(self) -> int:
        """O·I."""
        return self._stack.layer.num_values

    @cached_property
    def gram_TT(self) -> Tensor:
        """The updates' inner products, (T, T) float64. One pass."""
        flat = (block.flatten(1) for block in self.blocks())
        return torch.stack([rows @ rows.T for rows in flat]).sum(0)

    def blocks(self) -> Iterator[Tensor]:
        """Yield the updates' rows in their order, (T, p, I) float64."""
        inputs = self._stack.layer.shape[1]
        for block in self._stack.blocks():
            # A copy always: the stack's memory is used again.
            yield block.rows.to(torch.float64, copy=True).view(self.num_models, -1, inputs)

    def matrices(self) -> Iterator[Tensor]:
        """Yield the updates one by one, (O, I) float64."""
        return (self._stack.matrix(index).double() for index in range(self.num_models))

    def whole(self) -> Tensor:
        """Return the updates, (T, O, I) float64."""
        return torch.stack(list(self.matrices()))


def merge_dense(layer: UpdatesInTiles, job: Job, unfolding: str) -> Tensor:
    """Return the merged update (O, I), float64. Norms and biases are averaged by methods that are about matrices."""
    method, weights_T = job.request.method, job.context.weights_T
    if unfolding in VECTORS and method.kind in OF_MATRICES:
        total = float(weights_T.sum())
        shares = weights_T / total if total else torch.full_like(weights_T, 1 / len(weights_T))
        return layer.combined(shares) * job.request.scale
    result = method.merge(layer, **job.request.options)
    if isinstance(result, Product):
        return result.left_OS @ result.right_SI * job.request.scale
    return values_of(result, layer) * job.request.scale


def compare_dense(layer: UpdatesInTiles, merged_OI: Tensor, written_OI: Tensor) -> LayerSums:
    """Compare the merge M with the one in the file, both without the base, and with the sources. One pass."""
    difference = merged_OI - written_OI
    num = len(layer.context.models)
    energies_T, products_T, start = torch.zeros(num).double(), torch.zeros(num).double(), 0
    for block in layer.blocks():
        rows = written_OI[start : start + block.shape[1]]
        energies_T += block.square().sum((1, 2))
        products_T += (block * rows).sum((1, 2))
        start += block.shape[1]
    return LayerSums(
        rank=min(merged_OI.shape),
        energy=float(merged_OI.square().sum()),
        lost=float(difference.square().sum()),
        largest=largest_singular_value(merged_OI),
        largest_lost=largest_singular_value(difference),
        energies_T=energies_T,
        products_T=products_T,
    )
