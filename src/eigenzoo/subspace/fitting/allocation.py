"""Choose all layers' ranks for a budget of bytes or an error bound. Each step adds the direction that saves most energy per byte.

For one truncated axis a layer's error is exactly the tail of its spectrum. Each direction gains at most as much as the last, so the
greedy order is optimal up to the last direction that fits. For several axes the sum of the tails is an upper bound of the error (De
Lathauwer et al. 2000). An error bound is met by this sum first. The cores at these ranks then give the error of all smaller
ranks, and the fewest directions of the greedy order that meet the bound are kept. Ranks that cores are cut to are chosen first
(`core_ranks`).

Spectra do not contain the rounding of bases to half precision, and headers are only estimated. Both are measured after the fit, and
the bound is tightened by the excess (`Allocation.tightened`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

from eigenzoo.errors import BudgetError
from eigenzoo.linalg import low_rank
from eigenzoo.linalg.block_sums import DEFAULT
from eigenzoo.linalg.heldout import cross_validated_capture
from eigenzoo.linalg.rank import AUTO, RankRule
from eigenzoo.passes.resources import Resources
from eigenzoo.passes.workers import Workers
from eigenzoo.records import Layer, Progress
from eigenzoo.subspace.bases.basis import CORES
from eigenzoo.subspace.bases.tucker import LeadingCores
from eigenzoo.subspace.fitting.alone import Losses, is_affordable, stack_losses, update_losses
from eigenzoo.subspace.fitting.bytes import (
    ItemSizes,
    basis_bytes,
    coefficient_bytes,
    contents,
    overhead,
)
from eigenzoo.subspace.fitting.core_losses import CoreLosses, core_losses
from eigenzoo.subspace.fitting.core_ranks import core_ranks
from eigenzoo.subspace.fitting.heldout_sides import SideShares, heldout_sides, hold_out_sides
from eigenzoo.subspace.fitting.layer_spectra import LayerSpectra, layer_spectra
from eigenzoo.subspace.fitting.options import FitOptions
from eigenzoo.subspace.fitting.tucker_fit import leading_task, lost_at
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.moments.moments_cache import MomentsCache
from eigenzoo.zoo.stack import DenseStack, UpdateStack
from eigenzoo.zoo.zoo import Zoo

SIDES_BYTES = 2**30
"""Bytes of sides' moments, and again of cores, that stay in memory between the choice of ranks and the fit. Others are collected
again, and ranks of layers without cores are chosen by the sum of the tails.
"""

SUMS_ROUND_OFF = 1e-12
"""Largest relative difference of two sums of the same float64 energies."""

EXCESS = 1.1
"""An error bound is tightened by this multiple of the measured excess, because additional directions are rounded too."""

MOST_ROUNDS = 4
"""Number of times an error bound is tightened before all directions are kept."""


@dataclass(frozen=True)
class Collected:
    """A layer's spectra, their moments, and on request the held-out capture at 0, 1, … N directions, what models lose if they are
    cut alone, what sides keep of held-out models, and what both sides lose, with whole cores and with cut ones."""

    spectra: LayerSpectra
    moments: LayerMoments | None
    heldout: list[float] | None = None
    alone: Losses | None = None
    sides: Mapping[str, SideShares] = field(default_factory=dict)
    cores: CoreLosses | None = None


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
    cores: bool = False


def spectra_task(
    zoo: Zoo, name: str, request: SpectraRequest, collected: LayerMoments | None, resources: Resources
) -> Collected:
    """Collect one layer's moments, unless they are given, and compute the spectra from them."""
    stack = zoo.stack(name, precision=request.precision)
    moments = collected or collect(stack, request.axes, request.center, resources)
    heldout = None
    if request.heldout and moments.variance > 0:
        heldout = cross_validated_capture(moments.gram_NN, range(len(stack) + 1), seed=request.seed)
    spectra, with_sides = layer_spectra(stack, moments, request.axes), moments
    if not request.moments:
        moments = replace(moments, outputs=None, inputs=None)
    alone = None
    if request.alone and moments.singular_NR is not None:
        alone = update_losses(moments.singular_NR)
    elif request.alone and isinstance(stack, DenseStack) and is_affordable(zoo):
        alone = stack_losses(stack, zoo.view)
    fold = None
    if request.heldout and isinstance(stack, UpdateStack):
        fold = hold_out_sides(stack, moments, request.axes, resources, request.seed)
    cores = None
    if request.cores and (isinstance(stack, UpdateStack) or is_affordable(zoo)):
        cores = core_losses(stack, with_sides, fold)
    return Collected(spectra, moments, heldout, alone, heldout_sides(stack, fold), cores)


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
        leading: with an error bound and several axes, the cores of these layers at the ranks that meet the bound by the sum of all
            tails.
    """

    options: FitOptions
    spectra: Mapping[str, LayerSpectra]
    moments: Mapping[str, LayerMoments]
    num_models: int
    fixed: int
    leading: Mapping[str, LeadingCores] = field(default_factory=dict)

    @property
    def bound(self) -> float | None:
        """The budget, or the error bound, if there is one."""
        return self.options.max_error if self.options.budget is None else self.options.budget

    def per_layer(self, target: float | None) -> dict[str, FitOptions]:
        """Return every layer's options, with ranks that meet `target` in place of the bound."""
        if not self.spectra:
            return {}
        steps: list[tuple[str, str]] = []
        ranks = spend(self.spectra, self.options, self.num_models, self.fixed, target, steps)
        if self.leading and target is not None:
            ranks = self._fewest(ranks, steps, target)
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
        if all(self._is_complete(layer, chosen[name].rules) for name, layer in self.spectra.items()):
            if not self.options.rounds:
                return None  # The remaining error is round-off of the products.
            halved = self.options.coefficients_dtype
            halved = "" if halved == "float32" else f" and coefficients in {halved}"
            raise BudgetError(
                f"an error bound of {bound:g}, but with all directions bases in {self.options.dtype}{halved} lose {measured:.2g}",
                rule="the error of a bundle is that of the bases as they are stored",
                next_step=f"use dtype float32{' for both' if halved else ''}, or an error bound above {measured:.2g}",
            )
        return max(self._counted(chosen) - EXCESS * (measured - bound), 0.0) if rounds < MOST_ROUNDS else 0.0

    def _is_complete(self, layer: LayerSpectra, rules: Mapping[str, RankRule]) -> bool:
        """Whether no rank that is free can be raised."""
        sides = all(layer.full_rank(axis) <= int(rules[axis]) for axis in layer.values)
        if layer.cores is None or self.options.rules.get(CORES) != AUTO:
            return sides
        return sides and layer.cores.numel() <= int(rules[CORES])

    def _fewest(
        self, most: Mapping[str, Mapping[str, int]], steps: Sequence[tuple[str, str]], target: float
    ) -> dict[str, dict[str, int]]:
        """Return the ranks after as few of these steps as keep to an error: it falls with each step, so by bisection.

        The steps raise the sides to the ranks in `most`; cores have their rank in it.
        """
        allowed = target * self._energy * (1 - SUMS_ROUND_OFF)
        lost: dict[tuple[str, tuple[int, ...]], float] = {}

        def after(count: int) -> dict[str, dict[str, int]]:
            ranks = {
                name: {axis: 0 if axis in layer.values else most[name][axis] for axis in most[name]}
                for name, layer in self.spectra.items()
            }
            for name, axis in steps[:count]:
                ranks[name][axis] += 1
            return ranks

        def lost_after(count: int) -> float:
            total = 0.0
            for name, ranks in after(count).items():
                key = name, tuple(ranks.values())
                if key not in lost:
                    lost[key] = self._lost(name, ranks)
                total += lost[key]
            return total

        counts = range(len(steps))
        return after(bisect_left(counts, True, key=lambda count: lost_after(count) <= allowed))

    def _lost(self, name: str, ranks: Mapping[str, int]) -> float:
        """The energy that a layer loses at these ranks; where its cores are not known, at most."""
        leading = self.leading.get(name)
        if leading is None or not leading.holds(ranks):
            return self.spectra[name].error(ranks)
        return lost_at(leading, self.moments[name], ranks)

    @property
    def _energy(self) -> float:
        return sum(layer.energy for layer in self.spectra.values())

    def _counted(self, chosen: Mapping[str, FitOptions]) -> float:
        """Return the estimate for the `chosen` ranks of the bounded quantity: bytes of a bundle, or lost share of the energy."""
        ranks = {
            name: {axis: int(chosen[name].rules[axis]) for axis in chosen[name].rules if axis in (*layer.values, CORES)}
            for name, layer in self.spectra.items()
        }
        if self.options.budget is None:
            return sum(self._lost(name, ranks[name]) for name in self.spectra) / self._energy
        itemsize = self.options.itemsizes
        return self.fixed + sum(
            layer.num_bytes(ranks[name], self.num_models, itemsize) for name, layer in self.spectra.items()
        )


def allocate(zoo: Zoo, options: FitOptions, workers: Workers, cache: MomentsCache, progress: Progress) -> Allocation:
    """Collect spectra if a budget or an error bound is given. Cost: one pass over the weights."""
    if not options.bounded:
        return Allocation(options, {}, {}, len(zoo), 0)
    counted = overhead(zoo, options.axes, contents(zoo), options.itemsizes.basis)
    fixed = counted.shared + counted.per_model * len(zoo)
    _check_least(zoo, options, fixed)
    request = SpectraRequest(options.axes, options.center, options.precision_of_products, moments=True)
    collected = collect_spectra(zoo, request, workers, cache, progress)
    moments = {name: layer.moments for name, layer in collected.items() if layer.moments is not None}
    spectra = {name: layer.spectra for name, layer in collected.items()}
    _check_core_rank(options, spectra)
    found = Allocation(options, spectra, moments, len(zoo), fixed)
    if options.max_error is None or len(options.axes) == 1:
        return found
    return replace(found, leading=_collect_leading(zoo, found, workers, progress))


def _collect_leading(zoo: Zoo, found: Allocation, workers: Workers, progress: Progress) -> dict[str, LeadingCores]:
    """Collect cores at the ranks that meet the error bound by the sum of all axes' losses, up to `SIDES_BYTES` in all.

    The fit needs these cores anyway, so that no weight is read more often. For the other layers the sum decides.
    """
    ranks = spend(found.spectra, found.options, found.num_models, found.fixed)
    tasks, held = [], 0
    for name, moments in found.moments.items():
        size = _core_bytes(zoo.layers[name], ranks[name], found.num_models)
        if all(ranks[name].values()) and held + size <= SIDES_BYTES:
            held += size
            tasks.append((name, ranks[name], moments))
    task = partial(leading_task, zoo, found.options.precision_of_products)
    return {
        name: leading for (name, _, _), leading in workers.each("collecting cores", task, tasks, progress, what="layer")
    }


def _core_bytes(layer: Layer, ranks: Mapping[str, int], num_models: int) -> int:
    """Bytes of a layer's cores, of its bases, and of the mean of full weights."""
    sizes = dict(zip(("outputs", "inputs"), layer.shape, strict=True))
    core = prod(ranks.get(axis, size) for axis, size in sizes.items())
    bases = sum(size * ranks[axis] for axis, size in sizes.items() if axis in ranks)
    return 8 * (num_models * core + bases + (layer.num_values if layer.kind == "dense" else core))


def _check_least(zoo: Zoo, options: FitOptions, fixed: int) -> None:
    """Raise BudgetError, before any weight is read, for a budget smaller than rank 0 needs."""
    ranks = dict.fromkeys(options.axes, 0)
    itemsize, least = options.itemsizes, fixed
    for name, layer in zoo.layers.items():
        stack = zoo.stack(name)
        update_ranks = sum(stack.ranks) if isinstance(stack, UpdateStack) else 0
        least += basis_bytes(layer, ranks, options.axes, itemsize.basis, update_ranks, len(zoo))
        least += len(zoo) * coefficient_bytes(layer, ranks, options.axes, itemsize.coefficient)
    _require_room(options.budget, least)


def _check_core_rank(options: FitOptions, spectra: Mapping[str, LayerSpectra]) -> None:
    """Raise BudgetError for a core rank that loses more than the error bound, even between whole sides."""
    rule, max_error = options.rules.get(CORES), options.max_error
    if not isinstance(rule, int) or max_error is None:
        return
    lost = sum(
        float(layer.cores[rule:].sum())
        for layer in spectra.values()
        if layer.cores is not None and low_rank.pays((layer.full_rank("outputs"), layer.full_rank("inputs")), rule)
    )
    energy = sum(layer.energy for layer in spectra.values())
    if lost > max_error * energy:
        raise BudgetError(
            f"an error bound of {max_error:g}, but cores of rank {rule} lose {lost / energy:.2g} between whole sides",
            next_step="raise the core rank or the error bound, or use core rank 'auto'",
        )


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
    steps: list[tuple[str, str]] | None = None,
) -> dict[str, dict[str, int]]:
    """Raise ranks one direction at a time, best gain per byte first. `target` replaces the bound by a tighter one.

    The layer and axis of each direction are added to `steps`.
    """
    itemsize = options.itemsizes
    budget, max_error = options.budget, options.max_error
    if target is not None:
        budget, max_error = (None, target) if budget is None else (int(target), None)
    ranks = {name: dict.fromkeys(layer.values, 0) for name, layer in spectra.items()}
    energy = sum(layer.energy for layer in spectra.values())
    # A fit reports another sum of the same numbers.
    allowed = None if max_error is None else max_error * energy * (1 - SUMS_ROUND_OFF)
    for name, core_rank in core_ranks(spectra, options, num_models, fixed, budget, allowed).items():
        ranks[name][CORES] = core_rank
    spent = fixed + sum(layer.num_bytes(ranks[name], num_models, itemsize) for name, layer in spectra.items())
    errors = {name: layer.error(ranks[name]) for name, layer in spectra.items()}
    if budget is not None and spent > budget:
        # A tightened target is lower by the excess of the written bundle over the estimate.
        _require_room(options.budget, spent + (options.budget or 0) - budget)
    lost = sum(errors.values())
    heap = [
        entry
        for name in spectra
        for axis in spectra[name].values
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
        if steps is not None:
            steps.append((name, axis))
        lost += (error := spectra[name].error(grown)) - errors[name]
        errors[name] = error
        entry = _next(spectra[name], name, axis, rank + 1, grown, num_models, itemsize)
        if entry:
            heapq.heappush(heap, entry)
    return ranks


def _next(
    layer: LayerSpectra, name: str, axis: str, rank: int, ranks: Mapping[str, int], num_models: int, itemsize: ItemSizes
) -> tuple[float, str, str, int] | None:
    """Return the heap entry for one more direction of an axis: minus the gain per byte."""
    if rank >= layer.full_rank(axis):
        return None
    # Every other axis counts with at least one direction, because a core without the other side would cost nothing.
    others = {other: max(count, 1) for other, count in ranks.items()}
    more, now = {**others, axis: rank + 1}, {**others, axis: rank}
    cost = layer.num_bytes(more, num_models, itemsize) - layer.num_bytes(now, num_models, itemsize)
    return -float(layer.values[axis][rank]) / max(cost, 1), name, axis, rank
