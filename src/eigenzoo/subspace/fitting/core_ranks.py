"""Choose the rank that each layer's cores are cut to, for a budget of bytes or an error bound: by one price of a byte.

At a price, each layer takes the ranks that cost least, lost energy + price · bytes, for every rank of its cores. Prices are halved
or doubled until all layers keep to the bound. Errors are sums of tails, so that nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping

from eigenzoo.linalg.rank import AUTO
from eigenzoo.subspace.bases.basis import CORES
from eigenzoo.subspace.fitting.bytes import ItemSizes
from eigenzoo.subspace.fitting.layer_spectra import LayerSpectra
from eigenzoo.subspace.fitting.options import FitOptions

ALL_BELOW = 8
"""Up to this rank every rank of cores is compared, then powers of two."""

HALVINGS = 80
"""Prices go from all energy for one byte down to 2⁻⁸⁰ of it: below the round-off of energies."""

STEPS = 14
"""Steps of the bisection: the price is found to one percent."""

PASSES = 3
"""How often the rank of one side is chosen again for that of the other: the bytes of the mean's core are their product."""


def core_ranks(
    spectra: Mapping[str, LayerSpectra],
    options: FitOptions,
    num_models: int,
    fixed: int,
    budget: int | None,
    allowed: float | None,
) -> dict[str, int]:
    """Return every layer's rank: empty for whole cores, the rank that was asked for, or for `auto` those at the best price.

    Args:
        fixed: bytes of the bundle that do not depend on ranks.
        budget, allowed: bytes of the bundle, or the energy that may be lost.
    """
    rule = options.rules.get(CORES)
    if rule != AUTO:
        return dict.fromkeys(spectra, int(rule)) if rule is not None else {}
    most = max((layer.energy for layer in spectra.values()), default=0.0)
    dear, cheap = 0.0, float(HALVINGS)
    found: dict[str, int] = {}
    for _ in range(STEPS):
        halvings = (dear + cheap) / 2
        chosen = {
            name: _at_price(layer, most * 2.0**-halvings, num_models, options.itemsizes)
            for name, layer in spectra.items()
        }
        size = fixed + sum(
            spectra[name].num_bytes(ranks, num_models, options.itemsizes) for name, ranks in chosen.items()
        )
        lost = sum(spectra[name].error(ranks) for name, ranks in chosen.items())
        is_dear = size <= budget if budget is not None else lost > (allowed or 0.0)
        dear, cheap = (halvings, cheap) if is_dear else (dear, halvings)
        # The last choice that keeps to the bound; a dear price loses more, and takes fewer bytes.
        if not found or is_dear == (budget is not None):
            found = {name: ranks[CORES] for name, ranks in chosen.items()}
    return found


def _at_price(layer: LayerSpectra, price: float, num_models: int, itemsize: ItemSizes) -> dict[str, int]:
    """Return the ranks of sides and cores at which lost energy + price · bytes is least."""
    assert layer.cores is not None
    largest = layer.cores.numel()
    candidates = {*range(1, min(ALL_BELOW, largest) + 1), *(2**power for power in range(largest.bit_length())), largest}
    choices = [_sides(layer, core_rank, price, num_models, itemsize) for core_rank in sorted(candidates)]
    return min(choices, key=lambda ranks: layer.error(ranks) + price * layer.num_bytes(ranks, num_models, itemsize))


def _sides(layer: LayerSpectra, core_rank: int, price: float, num_models: int, itemsize: ItemSizes) -> dict[str, int]:
    """Return ranks of the sides whose last directions are worth their bytes."""
    ranks = {**{axis: layer.full_rank(axis) for axis in layer.values}, CORES: core_rank}
    for _ in range(PASSES):
        for axis, values_K in layer.values.items():
            # A whole side needs no basis, which the price of a direction leaves out.
            last = max(1, min(ranks[axis], layer.full_rank(axis) - 1))
            more, fewer = ({**ranks, axis: rank} for rank in (last, last - 1))
            cost = layer.num_bytes(more, num_models, itemsize) - layer.num_bytes(fewer, num_models, itemsize)
            ranks[axis] = int((values_K >= price * cost).sum())
    return ranks
