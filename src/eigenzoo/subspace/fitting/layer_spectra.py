"""Spectra of one layer: the error and the bytes of any ranks, without a basis.

Legend: N models, K directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.linalg.gram import center_gram
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.records import Layer
from eigenzoo.subspace.bases.basis import CORES
from eigenzoo.subspace.fitting.bytes import ItemSizes, basis_bytes, coefficient_bytes
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.stack import Stack, UpdateStack


@dataclass(frozen=True)
class LayerSpectra:
    """Input of allocation and plan for one layer: eigenvalues and their totals by axis, and the energy.

    `cores` are the energies of the updates' singular values, summed over models: a core's are never larger. None for full weights.
    """

    layer: Layer
    values: Mapping[str, Tensor]
    totals: Mapping[str, float]
    energy: float
    variance: float
    about_mean: float
    update_ranks: int
    gram_NN: Tensor
    cores: Tensor | None = None

    def error(self, ranks: Mapping[str, int]) -> float:
        """Return an upper bound of the lost energy: the sum of the tails, limited to the whole energy."""
        tails = [
            max(self.totals[axis] - float(self.values[axis][:rank].sum()), 0.0)
            for axis, rank in ranks.items()
            if axis != CORES
        ]
        if CORES in ranks and self.cores is not None:
            tails.append(float(self.cores[ranks[CORES] :].sum()))
        limit = self.energy if self.layer.kind == "update" and set(ranks) != {"models"} else self.variance
        return min(sum(tails), limit)

    def full_rank(self, axis: str) -> int:
        """Return the rank at which an axis is complete."""
        return int(self.values[axis].numel())

    def num_bytes(self, ranks: Mapping[str, int], num_models: int, itemsize: ItemSizes) -> int:
        """Return the bytes of the layer in a bundle: center, bases, and all models' coefficients."""
        axes = tuple(axis for axis in ("models", "outputs", "inputs") if axis in ranks)
        basis = basis_bytes(self.layer, ranks, axes, itemsize.basis, self.update_ranks, num_models)
        return basis + num_models * self.coefficient_bytes(ranks, itemsize)

    def coefficient_bytes(self, ranks: Mapping[str, int], itemsize: ItemSizes) -> int:
        """Return the bytes of one model's coefficients."""
        return coefficient_bytes(self.layer, ranks, tuple(ranks), itemsize.coefficient)


def layer_spectra(stack: Stack, moments: LayerMoments, axes: tuple[str, ...]) -> LayerSpectra:
    """Compute the spectra of a layer's moments."""
    values: dict[str, Tensor] = {}
    totals: dict[str, float] = {}
    if "models" in axes:
        values["models"] = (
            eigenpairs(moments.centered_NN, moments.round_off)[0] if moments.variance > 0 else torch.zeros(0)
        )
        totals["models"] = moments.variance
    for axis, side in (("outputs", moments.outputs), ("inputs", moments.inputs)):
        if axis in axes and side is not None:
            varies = moments.variance > 0 or isinstance(stack, UpdateStack)
            values[axis] = side.eigenvectors().values_K if varies else torch.zeros(0)
            totals[axis] = side.trace if varies else 0.0
    update_ranks = sum(stack.ranks) if isinstance(stack, UpdateStack) else 0
    return LayerSpectra(
        stack.layer,
        values,
        totals,
        float(moments.energies_N.sum()),
        moments.variance,
        float(center_gram(moments.gram_NN).diagonal().sum()),
        update_ranks,
        moments.gram_NN,
        None if moments.singular_NR is None else moments.singular_NR.square().sum(0),
    )
