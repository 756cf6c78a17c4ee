"""Spend a budget of bytes, or meet an error bound, over all layers: always the direction that saves most energy per byte.

For one truncated axis a layer's error is exactly the tail of its spectrum, the gain of each next direction is no larger
than the last, and the greedy order is optimal up to the last direction that fits. For several axes the sum of the tails
bounds the error from above (De Lathauwer et al. 2000), and that bound is what is spent against.

What a spectrum does not know is measured after the fit, and the bound tightened by the excess (`Allocation.tightened`): what
rounding of bases to half precision loses, and the bytes of headers.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from eigenzoo.errors import BudgetError
from eigenzoo.linalg.block_sums import DEFAULT
from eigenzoo.linalg.gram import center_gram
from eigenzoo.linalg.heldout import cross_validated_capture
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.passes.resources import Resources
from eigenzoo.passes.workers import Workers
from eigenzoo.records import Layer, Progress
from eigenzoo.subspace.fitting.bytes import (
    basis_bytes,
    coefficient_bytes,
    contents,
    overhead,
)
from eigenzoo.subspace.fitting.options import FitOptions
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.moments.moments_cache import MomentsCache
from eigenzoo.zoo.stack import Stack, UpdateStack
from eigenzoo.zoo.zoo import Zoo

SIDES_BYTES = 2**30
"""Bytes of moments of sides that are held from the choice of ranks to the fit; those of further layers are collected again."""

SUMS_ROUND_OFF = 1e-12
"""Relative difference of two sums of the same float64 energies, at most."""

EXCESS = 1.1
"""Times the measured excess by which an error bound is tightened: more directions are also rounded."""

MOST_ROUNDS = 4
"""Rounds of tightening an error bound, after which everything is kept."""


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


@dataclass(frozen=True)
class Collected:
    """A layer's spectra, the moments that they are of, and (where asked) its held-out capture at 0, 1, … N directions."""

    spectra: LayerSpectra
    moments: LayerMoments | None
    heldout: list[float] | None = None


@dataclass(frozen=True)
class Wanted:
    """What is collected of each layer: as of a fit, and whether moments come back, and held-out capture of axis `models`."""

    axes: tuple[str, ...]
    center: str
    precision: str = DEFAULT
    moments: bool = False
    heldout: bool = False
    seed: int = 0


def spectra_task(zoo: Zoo, name: str, wanted: Wanted, known: LayerMoments | None, resources: Resources) -> Collected:
    """Collect one layer's moments, unless they are known, and what follows from them at all ranks."""
    stack = zoo.stack(name, precision=wanted.precision)
    moments = known or collect(stack, wanted.axes, wanted.center, resources)
    heldout = None
    if wanted.heldout and moments.variance > 0:
        heldout = cross_validated_capture(moments.gram_NN, range(len(stack) + 1), seed=wanted.seed)
    spectra = layer_spectra(stack, moments, wanted.axes)
    if not wanted.moments:
        moments = replace(moments, outputs=None, inputs=None)
    return Collected(spectra, moments, heldout)


def collect_spectra(
    zoo: Zoo, wanted: Wanted, workers: Workers, cache: MomentsCache, progress: Progress
) -> dict[str, Collected]:
    """Collect the spectra of all layers: one pass over the weights, and none where the moments of axis `models` are kept.

    Moments of the sides come back, up to `SIDES_BYTES` in all.
    """
    collected: dict[str, Collected] = {}
    held = 0

    def known(name: str) -> LayerMoments | None:
        return cache.get(name, wanted.center, wanted.precision) if wanted.axes == ("models",) else None

    tasks = ((name, [partial(spectra_task, zoo, name, wanted, known(name), workers.resources)]) for name in zoo.layers)
    for name, (found,) in workers.in_order(tasks, lambda name: _side_bytes(zoo.layers[name], wanted)):
        cache.put(name, wanted.center, wanted.precision, found.moments)
        size = _side_bytes(zoo.layers[name], wanted)
        fits = held + size <= SIDES_BYTES
        held += size if fits else 0
        collected[name] = found if fits else replace(found, moments=None)
        progress("collecting spectra", len(collected), len(zoo.layers))
    return collected


def _side_bytes(layer: Layer, wanted: Wanted) -> int:
    """Bytes of a layer's moments of the sides that come back, at most."""
    sizes = zip(("outputs", "inputs"), layer.shape, strict=True)
    return sum(8 * size**2 for axis, size in sizes if axis in wanted.axes) if wanted.moments else 0


@dataclass(frozen=True)
class Allocation:
    """What ranks are chosen from; without a budget or an error bound, of no layer.

    Attributes:
        options: as asked.
        spectra: of all layers.
        moments: of the layers whose moments the fit need not collect again.
        num_models, fixed: N, and the bytes that a bundle has at any rank.
    """

    options: FitOptions
    spectra: Mapping[str, LayerSpectra]
    moments: Mapping[str, LayerMoments]
    num_models: int
    fixed: int

    @property
    def bound(self) -> float | None:
        """The budget, or the error bound, if there is one."""
        return self.options.max_error if self.options.budget is None else self.options.budget

    def per_layer(self, target: float | None) -> dict[str, FitOptions]:
        """Return every layer's options, with ranks that meet `target` in place of the bound."""
        if not self.spectra:
            return {}
        ranks = spend(self.spectra, self.options, self.num_models, self.fixed, target)
        return {name: replace(self.options, rules=ranks[name]) for name in self.spectra}

    def tightened(self, chosen: Mapping[str, FitOptions], measured: float, rounds: int) -> float | None:
        """Return a tighter target where the bundle that was made with `chosen` ranks exceeds the bound; None where it does not.

        Rounding of bases is no part of the spectra, and headers are counted in advance: so what was written decides. The target
        lies below what the chosen ranks count, so that they are never chosen again. Raises BudgetError where every direction is
        kept and the bound is exceeded by rounding alone.
        """
        bound = self.bound
        if bound is None or measured <= bound:
            return None
        if self.options.budget is not None:
            return self._counted(chosen) - (measured - bound)
        if all(
            layer.whole(axis) <= int(chosen[name].rules[axis])
            for name, layer in self.spectra.items()
            for axis in layer.values
        ):
            if self.options.torch_dtype.itemsize >= 4:
                return None  # What is left is the round-off of the products.
            raise BudgetError(
                f"an error bound of {bound:g}, but with all directions bases in {self.options.dtype} lose {measured:.2g}",
                rule="the error of a bundle is that of the bases as they are stored",
                next_step=f"use dtype float32, or an error bound above {measured:.2g}",
            )
        return max(self._counted(chosen) - EXCESS * (measured - bound), 0.0) if rounds < MOST_ROUNDS else 0.0

    def _counted(self, chosen: Mapping[str, FitOptions]) -> float:
        """What `chosen` ranks take by the count, in what is bounded: bytes of a bundle, or the share of the energy that is lost."""
        ranks = {
            name: {axis: int(chosen[name].rules[axis]) for axis in layer.values} for name, layer in self.spectra.items()
        }
        if self.options.budget is None:
            lost = sum(layer.error(ranks[name]) for name, layer in self.spectra.items())
            return lost / sum(layer.energy for layer in self.spectra.values())
        itemsize = self.options.torch_dtype.itemsize
        return self.fixed + sum(
            layer.num_bytes(ranks[name], self.num_models, itemsize) for name, layer in self.spectra.items()
        )


def allocate(zoo: Zoo, options: FitOptions, workers: Workers, cache: MomentsCache, progress: Progress) -> Allocation:
    """Collect what ranks are chosen from, where a budget or an error bound is given: one pass over the weights."""
    if not options.bounded:
        return Allocation(options, {}, {}, len(zoo), 0)
    known = overhead(zoo, options.axes, contents(zoo))
    fixed = known.shared + known.per_model * len(zoo)
    _check_least(zoo, options, fixed)
    wanted = Wanted(options.axes, options.center, options.precision_of_products, moments=True)
    collected = collect_spectra(zoo, wanted, workers, cache, progress)
    moments = {name: layer.moments for name, layer in collected.items() if layer.moments is not None}
    spectra = {name: layer.spectra for name, layer in collected.items()}
    return Allocation(options, spectra, moments, len(zoo), fixed)


def _check_least(zoo: Zoo, options: FitOptions, fixed: int) -> None:
    """Raise BudgetError, before any weight is read, for a budget that no rank could keep to."""
    ranks = dict.fromkeys(options.axes, 0)
    itemsize, least = options.torch_dtype.itemsize, fixed
    for name, layer in zoo.layers.items():
        stack = zoo.stack(name)
        update_ranks = sum(stack.ranks) if isinstance(stack, UpdateStack) else 0
        least += basis_bytes(layer, ranks, options.axes, itemsize, update_ranks, len(zoo))
        least += len(zoo) * coefficient_bytes(layer, ranks, options.axes)
    _require_room(options.budget, least)


def _require_room(budget: int | None, least: int) -> None:
    if budget is not None and least > budget:
        raise BudgetError(
            f"a budget of {budget:,} bytes, but means, carried tensors and headers alone take {least:,}",
            next_step="raise the budget, exclude layers, or choose other axes",
        )


def spend(
    spectra: Mapping[str, LayerSpectra],
    options: FitOptions,
    num_models: int,
    fixed: int,
    target: float | None = None,
) -> dict[str, dict[str, int]]:
    """Raise ranks one direction at a time, best gain per byte first; pure in the spectra. `target` stands for a tighter bound."""
    itemsize = options.torch_dtype.itemsize
    budget, max_error = options.budget, options.max_error
    if target is not None:
        budget, max_error = (None, target) if budget is None else (int(target), None)
    ranks = {name: dict.fromkeys(layer.values, 0) for name, layer in spectra.items()}
    spent = fixed + sum(layer.num_bytes(ranks[name], num_models, itemsize) for name, layer in spectra.items())
    errors = {name: layer.error(ranks[name]) for name, layer in spectra.items()}
    energy = sum(layer.energy for layer in spectra.values())
    # The share that a fit states is another sum of the same numbers.
    allowed = None if max_error is None else max_error * energy * (1 - SUMS_ROUND_OFF)
    if budget is not None and spent > budget:
        # What a tightened target has less is what the bundle has more than was counted.
        _require_room(options.budget, spent + (options.budget or 0) - budget)
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
        if budget is not None and spent + cost > budget:
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
