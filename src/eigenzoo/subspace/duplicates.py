"""Models that are the same function: found by the moments, and looked at again where products were too coarse to tell.

Legend: N models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from eigenzoo.linalg import lora
from eigenzoo.linalg.gram import squared_distances
from eigenzoo.subspace.moments import LayerMoments
from eigenzoo.zoo.stack import UpdateStack
from eigenzoo.zoo.zoo import Zoo

DUPLICATE = 1e-10
"""Squared distance over mean energy below which two models are the same function: 1e-5 of the norm, float32 factors' round-off."""

COARSE = 10.0
"""Squared distances below so many round-offs of the products may be none at all."""


def find_duplicates(
    names: Sequence[str], moments: Iterable[LayerMoments], zoo: Zoo | None = None
) -> tuple[tuple[str, str], ...]:
    """Return pairs of models whose analysed layers agree to 1e-5 of their norm, whatever the factors they are stored as.

    Distances from float32 products are coarser than that: the models that they cannot tell apart are read again, in pairs, where
    the zoo is at hand. Without it they count as the same: they agree to the products' precision, about 1e-3 of their norm.
    """
    distances = energies = None
    coarse = DUPLICATE
    for layer in moments:
        distances = squared_distances(layer.gram_NN) + (0 if distances is None else distances)
        energies = layer.energies_N + (0 if energies is None else energies)
        coarse = max(coarse, COARSE * layer.round_off)
    if distances is None or energies is None:
        return ()
    close_NN = distances <= coarse * (energies[:, None] + energies[None, :]) / 2
    if coarse > DUPLICATE and zoo is not None:
        close_NN = _confirmed(zoo, close_NN)
    return tuple((names[first], names[second]) for first, second in close_NN.triu(1).nonzero().tolist())


def _confirmed(zoo: Zoo, close_NN: Tensor) -> Tensor:
    """Keep the pairs that agree with the first of their group when both are read again."""
    confirmed_NN = torch.zeros_like(close_NN)
    left = set(range(len(zoo)))
    for first in range(len(zoo)):
        others = [other for other in close_NN[first].nonzero()[:, 0].tolist() if other > first and other in left]
        same = [first, *(other for other in others if first in left and _agree(zoo, first, other))]
        left -= set(same)
        index = torch.tensor(same)
        confirmed_NN[index[:, None], index] = True
    return confirmed_NN


def _agree(zoo: Zoo, first: int, second: int) -> bool:
    """Whether two models agree to 1e-5 of their norm; layer by layer, until they cannot any more."""
    whole = sum(_energy(zoo, name, first) + _energy(zoo, name, second) for name in zoo.layers) / 2
    distance = 0.0
    for name in zoo.layers:
        distance += _distance(zoo, name, first, second)
        if distance > DUPLICATE * whole:
            return False
    return True


def _energy(zoo: Zoo, name: str, place: int) -> float:
    stack = zoo.stack(name, precision="high")
    if isinstance(stack, UpdateStack):
        return lora.energy(stack.factors(place))
    return float(stack.matrix(place).square().sum())


def _distance(zoo: Zoo, name: str, first: int, second: int) -> float:
    stack = zoo.stack(name, precision="high")
    if not isinstance(stack, UpdateStack):
        return float((stack.matrix(first) - stack.matrix(second)).square().sum())
    b_one, a_one = stack.factors(first)
    b_two, a_two = stack.factors(second)
    return max(lora.energy((torch.cat([b_one, -b_two], 1), torch.cat([a_one, a_two]))), 0.0)
