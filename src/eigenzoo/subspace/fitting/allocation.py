"""Spend a budget of bytes, or meet an error bound, over all layers: always the direction that saves most energy per byte.

For one truncated axis a layer's error is exactly the tail of its spectrum, the gain of each next direction is no larger
than the last, and the greedy order is optimal up to the last direction that fits. For several axes the sum of the tails
bounds the error from above (De Lathauwer et al. 2000), and that bound is what is spent against.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
from torch import Tensor

from eigenzoo.errors import BudgetError
from eigenzoo.formats.bundle.basis_files import header_room
from eigenzoo.formats.bundle.contents import canonical_json, tensor_id
from eigenzoo.formats.layout import layout_of
from eigenzoo.linalg.gram import center_gram
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.passes.resources import Resources
from eigenzoo.passes.workers import Workers
from eigenzoo.records import Layer, Progress
from eigenzoo.subspace.bases.basis import PARTS, form_of
from eigenzoo.subspace.fitting.bytes import (
    CARD_AND_REPORT,
    FILE_OVERHEAD,
    MANIFEST_PER_LAYER,
    MANIFEST_PER_MODEL,
    RECORD_BYTES,
    TENSOR_HEADER,
    basis_bytes,
    coefficient_bytes,
)
from eigenzoo.subspace.fitting.options import FitOptions
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.layer_moments import LayerMoments
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
    about_mean: float
    update_ranks: int
    gram_NN: Tensor

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
        basis = basis_bytes(self.layer, ranks, axes, itemsize, self.update_ranks, num_models)
        return basis + num_models * self.coefficient_bytes(ranks)

    def coefficient_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes of one model's coefficients."""
        return coefficient_bytes(self.layer, ranks, tuple(ranks))


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
    return LayerSpectra(
        stack.layer,
        values,
        totals,
        float(moments.energies_N.sum()),
        moments.variance,
        float(center_gram(moments.gram_NN).diagonal().sum()),
        update_ranks,
        moments.gram_NN,
    )


def spectra_task(zoo: Zoo, name: str, axes: tuple[str, ...], center: str, resources: Resources) -> LayerSpectra:
    """Collect one layer's spectra."""
    stack = zoo.stack(name)
    return layer_spectra(stack, collect(stack, axes, center, resources), axes)


def collect_spectra(
    zoo: Zoo, axes: tuple[str, ...], center: str, workers: Workers, progress: Progress
) -> dict[str, LayerSpectra]:
    """Collect the spectra of all layers; one pass over the weights."""
    spectra: dict[str, LayerSpectra] = {}
    tasks = ((name, [partial(spectra_task, zoo, name, axes, center, workers.resources)]) for name in zoo.layers)
    for name, (found,) in workers.in_order(tasks):
        spectra[name] = found
        progress("collecting spectra", len(spectra), len(zoo.layers))
    return spectra


@dataclass(frozen=True)
class Overhead:
    """Bytes that a bundle has at any rank, at most: what is there once, and what every model brings on average."""

    shared: int
    per_model: int


def overhead(zoo: Zoo, axes: tuple[str, ...]) -> Overhead:
    """Count headers, the manifest, and what is carried, each content once; reads what is carried."""
    uses: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for place in range(len(zoo)):
        found = _contents(zoo, place)
        uses.update(found.keys())
        sizes.update(found)
    own = sum(size for content, size in sizes.items() if uses[content] == 1)
    parts = PARTS[form_of({layer.kind for layer in zoo.layers.values()}, axes)]
    layers = header_room(list(zoo.layers), parts) + sum(
        MANIFEST_PER_LAYER + 4 * len(name.encode()) for name in zoo.layers
    )
    carried = sum(60 + len(name.encode()) for place in range(len(zoo)) for name in zoo.carried(place))
    texts = sum(6 * len(name.encode("utf-8", "surrogatepass")) for name in zoo.names) + sum(
        len(str(model.metadata)) for model in zoo.models
    )
    per_model = FILE_OVERHEAD + MANIFEST_PER_MODEL + 4 * len(zoo.layers) + ceil((own + carried + texts) / len(zoo))
    return Overhead(CARD_AND_REPORT + layers + sum(sizes.values()) - own, per_model)


def _contents(zoo: Zoo, place: int) -> dict[str, int]:
    """Bytes in rest/ of everything that one model needs besides its coefficients, by content."""
    model = zoo.models[place]
    documents = [layout_of(model).to_json()]
    documents += [dict(model.config)] if model.config is not None else []
    found = {hashlib.sha256(text).hexdigest(): len(text) for text in map(canonical_json, documents)}
    for file in model.side_files:
        data = model.read_side_file(file)
        found[hashlib.sha256(data).hexdigest()] = len(data)
    for name in zoo.carried(place):
        values = zoo.read_carried(place, name)
        found[tensor_id(values)] = values.nbytes + TENSOR_HEADER
    return {content: size + RECORD_BYTES for content, size in found.items()}


def allocate(zoo: Zoo, options: FitOptions, workers: Workers, progress: Progress) -> dict[str, FitOptions]:
    """Return per-layer options whose ranks spend the budget or meet the error bound; empty where neither is asked."""
    if options.budget is None and options.max_error is None:
        return {}
    spectra = collect_spectra(zoo, options.axes, options.center, workers, progress)
    known = overhead(zoo, options.axes)
    ranks = spend(spectra, options, len(zoo), known.shared + known.per_model * len(zoo))
    return {name: replace(options, rules=ranks[name]) for name in spectra}


def spend(
    spectra: Mapping[str, LayerSpectra], options: FitOptions, num_models: int, fixed: int
) -> dict[str, dict[str, int]]:
    """Raise ranks one direction at a time, best gain per byte first; pure in the spectra."""
    itemsize = options.torch_dtype.itemsize
    ranks = {name: dict.fromkeys(layer.values, 0) for name, layer in spectra.items()}
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
        for axis in ranks[name]
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
