"""Choose all layers' ranks for a budget of bytes or an error bound. Each step adds the direction that saves most energy per byte.

For one truncated axis a layer's error is exactly the tail of its spectrum. Each direction gains at most as much as the last, so the
greedy order is optimal up to the last direction that fits. For several axes the sum of the tails is an upper bound of the error (De
Lathauwer et al. 2000), and the choice uses this bound.

Spectra do not contain the rounding of bases to half precision, and headers are only estimated. Both are measured after the fit, and
the bound is tightened by the excess (`Allocation.tightened`).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from eigenzoo.subspace.fitting.alone import Losses, is_affordable, stack_losses, update_losses
from eigenzoo.subspace.fitting.bytes import (
    basis_bytes,
    coefficient_bytes,
    contents,
    overhead,
)
from eigenzoo.subspace.fitting.heldout_sides import SideShares, heldout_sides
from eigenzoo.subspace.fitting.options import FitOptions
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.moments.moments_cache import MomentsCache
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack
from eigenzoo.zoo.zoo import Zoo

SIDES_BYTES = 2**30
"""Bytes of sides' moments that stay in memory between the choice of ranks and the fit. Others are collected again.
"""

SUMS_ROUND_OFF = 1e-12
"""Largest relative difference of two sums of the same float64 energies."""

EXCESS = 1.1
"""An error bound is tightened by this multiple of the measured excess, because additional directions are rounded too."""

MOST_ROUNDS = 4
"""Number of times an error bound is tightened before all directions are kept."""


@dataclass(frozen=True)
class LayerSpectra:
    """Input of allocation and plan for one layer: eigenvalues and their totals by axis, and the energy."""

    layer: Layer
    values: Mapping[str, Tensor]
    totals: Mapping[str, float]
    energy: float
    variance: float
    about_mean: float
    update_ranks: int
    gram_NN: Tensor

    def error(self, ranks: Mapping[str, int]) -> float:
        """Return an upper bound of the lost energy: the sum of the tails, limited to the whole energy."""
        tails = [max(self.totals[axis] - float(self.values[axis][:rank].sum()), 0.0) for axis, rank in ranks.items()]
        limit = self.energy if self.layer.kind == "update" and set(ranks) != {"models"} else self.variance
        return min(sum(tails), limit)

    def full_rank(self, axis: str) -> int:
        """Return the rank at which an axis is complete."""
        return int(self.values[axis].numel())

    def num_bytes(self, ranks: Mapping[str, int], num_models: int, itemsize: int) -> int:
        """Return the bytes of the layer in a bundle: center, bases, and all models' coefficients."""
        axes = tuple(axis for axis in ("models", "outputs", "inputs") if axis in ranks)
        basis = basis_bytes(self.layer, ranks, axes, itemsize, self.update_ranks, num_models)
        return basis + num_models * self.coefficient_bytes(ranks)

    def coefficient_bytes(self, ranks: Mapping[str, int]) -> int:
        """Return the bytes of one model's coefficients."""
        return coefficient_bytes(self.layer, ranks, tuple(ranks))


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
    )


@dataclass(frozen=True)
class Collected:
    """A layer's spectra, their moments, and on request the held-out capture at 0, 1, … N directions, what models lose if they are
    cut alone, and what sides keep of held-out models."""

    spectra: LayerSpectra
    moments: LayerMoments | None
    heldout: list[float] | None = None
    alone: Losses | None = None
    sides: Mapping[str, SideShares] = field(default_factory=dict)


@dataclass(frozen=True)
class SpectraRequest:
    """Options for collecting spectra: those of a fit, whether to return moments, and whether to compute held-out capture."""

    axes: tuple[str, ...]
    center: str
    precision: str = DEFAULT
    moments: bool = False
    heldout: bool = False
    seed: int = 0
    alone: bool = False


def spectra_task(
    zoo: Zoo, name: str, request: SpectraRequest, collected: LayerMoments | None, resources: Resources
) -> Collected:
    """Collect one layer's moments, unless they are given, and compute the spectra from them."""
    stack = zoo.stack(name, precision=request.precision)
    moments = collected or collect(stack, request.axes, request.center, resources)
    heldout = None
    if request.heldout and moments.variance > 0:
        heldout = cross_validated_capture(moments.gram_NN, range(len(stack) + 1), seed=request.seed)
    spectra = layer_spectra(stack, moments, request.axes)
    if not request.moments:
        moments = replace(moments, outputs=None, inputs=None)
    alone = None
    if request.alone and moments.singular_NR is not None:
        alone = update_losses(moments.singular_NR)
    elif request.alone and isinstance(stack, DenseStack) and is_affordable(zoo):
        alone = stack_losses(stack, zoo.view)
    sides: Mapping[str, SideShares] = {}
    if request.heldout and isinstance(stack, UpdateStack):
        sides = heldout_sides(stack, moments, request.axes, resources, request.seed)
    return Collected(spectra, moments, heldout, alone, sides)


def collect_spectra(
    zoo: Zoo, request: SpectraRequest, workers: Workers, cache: MomentsCache, progress: Progress
) -> dict[str, Collected]:
    """Collect the spectra of all layers in one pass over the weights, or in none if the moments of axis `models` are in the cache.

    Moments of the sides are returned up to `SIDES_BYTES` in all.
    """
    collected: dict[str, Collected] = {}
    side_bytes = 0

    def given_moments(name: str) -> LayerMoments | None:
        return cache.get(name, request.center, request.precision) if request.axes == ("models",) else None

    tasks = (
        (name, [partial(spectra_task, zoo, name, request, given_moments(name), workers.resources)])
        for name in zoo.layers
    )
    for name, (result,) in workers.in_order(tasks, lambda name: _side_bytes(zoo.layers[name], request)):
        cache.put(name, request.center, request.precision, result.moments)
        size = _side_bytes(zoo.layers[name], request)
        fits = side_bytes + size <= SIDES_BYTES
        side_bytes += size if fits else 0
        collected[name] = result if fits else replace(result, moments=None)
        progress("collecting spectra", len(collected), len(zoo.layers))
    return collected


def _side_bytes(layer: Layer, request: SpectraRequest) -> int:
    """Return the largest number of bytes of the sides' moments that a layer's task returns."""
    sizes = zip(("outputs", "inputs"), layer.shape, strict=True)
    return sum(8 * size**2 for axis, size in sizes if axis in request.axes) if request.moments else 0


@dataclass(frozen=True)
class Allocation:
    """The spectra from which ranks are chosen. Empty without a budget or an error bound.

    Attributes:
        options: of the fit.
        spectra: of all layers.
        moments: of the layers whose moments the fit can use again.
        num_models, fixed: N, and the bytes of a bundle that do not depend on the ranks.
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
        """Return a tighter target if the bundle made with the `chosen` ranks exceeds the bound, else None.

        The written bundle decides, because spectra do not contain rounding and headers are estimated. The target is below the count
        of the chosen ranks, so that they are never chosen again. Raises BudgetError if every direction is kept and rounding alone
        exceeds the bound.
        """
        bound = self.bound
        if bound is None or measured <= bound:
            return None
        if self.options.budget is not None:
            return self._counted(chosen) - (measured - bound)
        if all(
            layer.full_rank(axis) <= int(chosen[name].rules[axis])
            for name, layer in self.spectra.items()
            for axis in layer.values
        ):
            if self.options.torch_dtype.itemsize >= 4:
                return None  # The remaining error is round-off of the products.
            raise BudgetError(
                f"an error bound of {bound:g}, but with all directions bases in {self.options.dtype} lose {measured:.2g}",
                rule="the error of a bundle is that of the bases as they are stored",
                next_step=f"use dtype float32, or an error bound above {measured:.2g}",
            )
        return max(self._counted(chosen) - EXCESS * (measured - bound), 0.0) if rounds < MOST_ROUNDS else 0.0

    def _counted(self, chosen: Mapping[str, FitOptions]) -> float:
        """Return the estimate for the `chosen` ranks of the bounded quantity: bytes of a bundle, or lost share of the energy."""
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
    """Collect spectra if a budget or an error bound is given. Cost: one pass over the weights."""
    if not options.bounded:
        return Allocation(options, {}, {}, len(zoo), 0)
    counted = overhead(zoo, options.axes, contents(zoo))
    fixed = counted.shared + counted.per_model * len(zoo)
    _check_least(zoo, options, fixed)
    request = SpectraRequest(options.axes, options.center, options.precision_of_products, moments=True)
    collected = collect_spectra(zoo, request, workers, cache, progress)
    moments = {name: layer.moments for name, layer in collected.items() if layer.moments is not None}
    spectra = {name: layer.spectra for name, layer in collected.items()}
    return Allocation(options, spectra, moments, len(zoo), fixed)


def _check_least(zoo: Zoo, options: FitOptions, fixed: int) -> None:
    """Raise BudgetError, before any weight is read, for a budget smaller than rank 0 needs."""
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
    """Raise ranks one direction at a time, best gain per byte first. `target` replaces the bound by a tighter one."""
    itemsize = options.torch_dtype.itemsize
    budget, max_error = options.budget, options.max_error
    if target is not None:
        budget, max_error = (None, target) if budget is None else (int(target), None)
    ranks = {name: dict.fromkeys(layer.values, 0) for name, layer in spectra.items()}
    spent = fixed + sum(layer.num_bytes(ranks[name], num_models, itemsize) for name, layer in spectra.items())
    errors = {name: layer.error(ranks[name]) for name, layer in spectra.items()}
    energy = sum(layer.energy for layer in spectra.values())
    # A fit reports another sum of the same numbers.
    allowed = None if max_error is None else max_error * energy * (1 - SUMS_ROUND_OFF)
    if budget is not None and spent > budget:
        # A tightened target is lower by the excess of the written bundle over the estimate.
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
    """Return the heap entry for one more direction of an axis: minus the gain per byte."""
    if rank >= layer.full_rank(axis):
        return None
    # Every other axis counts with at least one direction, because a core without the other side would cost nothing.
    others = {other: max(count, 1) for other, count in ranks.items()}
    more, now = {**others, axis: rank + 1}, {**others, axis: rank}
    cost = layer.num_bytes(more, num_models, itemsize) - layer.num_bytes(now, num_models, itemsize)
    return -float(layer.values[axis][rank]) / max(cost, 1), name, axis, rank
