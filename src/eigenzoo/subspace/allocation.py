"""Spend a budget of bytes, or meet an error bound, over all layers: always the direction that saves most energy per byte.

For one truncated axis a layer's error is exactly the tail of its spectrum, the gain of each next direction is no larger
than the last, and the greedy order is optimal up to the last direction that fits. For several axes the sum of the tails
bounds the error from above (De Lathauwer et al. 2000), and that bound is what is spent against.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigenzoo.errors import BudgetError
from eigenzoo.formats.basis_files import header_room
from eigenzoo.formats.contents import canonical_json
from eigenzoo.formats.layout import layout_of
from eigenzoo.formats.peft_lora import LoraAdapter
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.records import Layer, Progress
from eigenzoo.subspace.basis import PARTS, form_of
from eigenzoo.subspace.bytes import (
    CARD_AND_REPORT,
    FILE_OVERHEAD,
    MANIFEST_PER_LAYER,
    MANIFEST_PER_MODEL,
    RECORD_BYTES,
    basis_bytes,
    coefficient_bytes,
)
from eigenzoo.subspace.moments import LayerMoments, collect
from eigenzoo.subspace.options import FitOptions
from eigenzoo.zoo.stack import Stack, UpdateStack
from eigenzoo.zoo.zoo import Zoo


@dataclass(frozen=True)
class LayerSpectra:
    """What allocation and plan know of a layer: eigenvalues per axis, their totals, the whole energy."""

    layer: Layer
    values: Mapping[str, Tensor]
    totals: Mapping[str, float]
    energy: float
    variance: float
    update_ranks: int

    def error(self, ranks: Mapping[str, int]) -> float:
        """Energy lost at most: the tails' sum, and never more than what there is to lose."""
        tails = [max(self.totals[axis] - float(self.values[axis][:rank].sum()), 0.0) for axis, rank in ranks.items()]
        limit = self.energy if self.layer.kind == "update" and set(ranks) != {"models"} else self.variance
        return min(sum(tails), limit)

    def whole(self, axis: str) -> int:
        """The rank at which an axis is complete."""
        return int(self.values[axis].numel())

    def num_bytes(self, ranks: Mapping[str, int], num_models: int, itemsize: int) -> int:
        """Bytes of the layer in a bundle: center, bases, and all models' coefficients."""
        axes = tuple(axis for axis in ("models", "outputs", "inputs") if axis in ranks)
        return basis_bytes(self.layer, ranks, axes, itemsize, self.update_ranks) + num_models * coefficient_bytes(
            self.layer, ranks, axes
        )


def layer_spectra(stack: Stack, moments: LayerMoments, axes: tuple[str, ...]) -> LayerSpectra:
    """Take the spectra of a layer's moments."""
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
    return LayerSpectra(stack.layer, values, totals, float(moments.energies_N.sum()), moments.variance, update_ranks)


def collect_spectra(
    zoo: Zoo, axes: tuple[str, ...], center: str, block_bytes: int, progress: Progress
) -> dict[str, LayerSpectra]:
    """Collect the spectra of all layers; one pass over the weights."""
    spectra = {}
    for number, name in enumerate(zoo.layers):
        stack = zoo.stack(name)
        spectra[name] = layer_spectra(stack, collect(stack, axes, center, block_bytes), axes)
        progress("collecting spectra", number + 1, len(zoo.layers))
    return spectra


def fixed_bytes(zoo: Zoo, axes: tuple[str, ...]) -> int:
    """Bytes that a bundle has at any rank, at most: headers, the manifest, and what is carried, each tensor once per model."""
    carried = sum(
        model.tensors[name].nbytes + 200 for place, model in enumerate(zoo.models) for name in zoo.carried(place)
    )
    model = zoo.models[0]
    layout = sum(len(text) + RECORD_BYTES for text in _texts(zoo))
    side_files = sum(len(model.read_side_file(name)) for name in model.side_files)
    parts = PARTS[form_of({layer.kind for layer in zoo.layers.values()}, axes)]
    layers = header_room(list(zoo.layers), parts) + sum(
        MANIFEST_PER_LAYER + 4 * len(name.encode()) for name in zoo.layers
    )
    models = len(zoo) * (FILE_OVERHEAD + MANIFEST_PER_MODEL + 4 * len(zoo.layers))
    models += sum(6 * len(name.encode()) for name in zoo.names) + sum(len(str(model.metadata)) for model in zoo.models)
    return CARD_AND_REPORT + carried + layout + side_files + layers + models


def _texts(zoo: Zoo) -> set[bytes]:
    """Layouts and configs of all models, as a bundle stores them: once per content, and adapters of other scales differ."""
    documents = [layout_of(model).to_json() for model in zoo.models]
    documents += [dict(model.config) for model in zoo.models if isinstance(model, LoraAdapter)]
    return {canonical_json(document) for document in documents}


def allocate(zoo: Zoo, options: FitOptions, block_bytes: int, progress: Progress) -> dict[str, FitOptions]:
    """Return per-layer options whose ranks spend the budget or meet the error bound; empty where neither is asked."""
    if options.budget is None and options.max_error is None:
        return {}
    spectra = collect_spectra(zoo, options.axes, options.center, block_bytes, progress)
    ranks = spend(spectra, options, len(zoo), fixed_bytes(zoo, options.axes))
    return {name: replace(options, rules=ranks[name]) for name in spectra}


def spend(
    spectra: Mapping[str, LayerSpectra], options: FitOptions, num_models: int, fixed: int
) -> dict[str, dict[str, int]]:
    """Raise ranks one direction at a time, best gain per byte first; pure in the spectra."""
    itemsize = options.torch_dtype.itemsize
    ranks = {name: dict.fromkeys(options.axes, 0) for name in spectra}
    spent = fixed + sum(layer.num_bytes(ranks[name], num_models, itemsize) for name, layer in spectra.items())
    errors = {name: layer.error(ranks[name]) for name, layer in spectra.items()}
    energy = sum(layer.energy for layer in spectra.values())
    allowed = None if options.max_error is None else options.max_error * energy
    if options.budget is not None and spent > options.budget:
        raise BudgetError(
            f"a budget of {options.budget:,} bytes, but means, carried tensors and headers alone take {spent:,}",
            next_step="raise the budget, exclude layers, or choose other axes",
        )
    lost = sum(errors.values())
    heap = [
        entry
        for name in spectra
        for axis in options.axes
        if (entry := _next(spectra[name], name, axis, 0, ranks[name], num_models, itemsize))
    ]
    heapq.heapify(heap)
    while heap and (allowed is None or lost > allowed):
        _, name, axis, rank = heapq.heappop(heap)
        if rank != ranks[name][axis]:
            continue
        grown = {**ranks[name], axis: rank + 1}
        cost = spectra[name].num_bytes(grown, num_models, itemsize) - spectra[name].num_bytes(
            ranks[name], num_models, itemsize
        )
        if options.budget is not None and spent + cost > options.budget:
            continue
        ranks[name], spent = grown, spent + cost
        lost += (error := spectra[name].error(grown)) - errors[name]
        errors[name] = error
        entry = _next(spectra[name], name, axis, rank + 1, grown, num_models, itemsize)
        if entry:
            heapq.heappush(heap, entry)
    return ranks


def _next(
    layer: LayerSpectra, name: str, axis: str, rank: int, ranks: Mapping[str, int], num_models: int, itemsize: int
) -> tuple[float, str, str, int] | None:
    """The heap's entry for one more direction of an axis: minus the gain per byte."""
    if rank >= layer.whole(axis):
        return None
    # Counted with at least one direction of every other axis: a core without the other side would look free.
    others = {other: max(count, 1) for other, count in ranks.items()}
    more, now = {**others, axis: rank + 1}, {**others, axis: rank}
    cost = layer.num_bytes(more, num_models, itemsize) - layer.num_bytes(now, num_models, itemsize)
    return -float(layer.values[axis][rank]) / max(cost, 1), name, axis, rank
