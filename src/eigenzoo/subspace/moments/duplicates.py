"""Models that are the same function: found by the moments, and looked at again where products were too coarse to tell.

Legend: N models, C coefficients of all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from eigenzoo.linalg import lora
from eigenzoo.linalg.gram import center_gram, squared_distances
from eigenzoo.subspace.coefficients import Coefficients
from eigenzoo.subspace.moments.layer_moments import LayerMoments
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

    Distances from float32 products are coarser than that: models that they cannot tell apart are read again, in pairs, where the
    zoo is at hand. Without it, those count as the same that are as close as such products can show: of full weights, whose products
    are about the mean, 1e-3 of what they differ from it, and of updates 1e-3 of their norm.
    """
    size = len(names)
    distances_NN, allowed_NN = torch.zeros(2, size, size, dtype=torch.float64)
    energies_N = torch.zeros(size, dtype=torch.float64)
    coarse = False
    for layer in moments:
        distances_NN += squared_distances(layer.gram_NN)
        energies_N += layer.energies_N
        if layer.round_off > DUPLICATE:
            # What round-off is a share of: the Gram of updates is taken about zero, that of full weights about the mean.
            scale_N = layer.energies_N if layer.singular_NR is not None else center_gram(layer.gram_NN).diagonal()
            allowed_NN += COARSE * layer.round_off * (scale_N[:, None] + scale_N) / 2
            coarse = True
    least_NN = DUPLICATE * (energies_N[:, None] + energies_N) / 2
    close_NN = distances_NN <= torch.maximum(allowed_NN, least_NN)
    if coarse and zoo is not None:
        close_NN = _confirmed(zoo, close_NN, energies_N)
    return tuple((names[first], names[second]) for first, second in close_NN.triu(1).nonzero().tolist())


def _confirmed(zoo: Zoo, close_NN: Tensor, energies_N: Tensor) -> Tensor:
    """Keep the pairs that agree with the first of their group when both are read again."""
    confirmed_NN = torch.zeros_like(close_NN)
    left = set(range(len(zoo)))
    for first in range(len(zoo)):
        others = [other for other in close_NN[first].nonzero()[:, 0].tolist() if other > first and other in left]
        same = [
            first,
            *(
                other
                for other in others
                if first in left and _agree(zoo, first, other, float(energies_N[[first, other]].mean()))
            ),
        ]
        left -= set(same)
        index = torch.tensor(same)
        confirmed_NN[index[:, None], index] = True
    return confirmed_NN


def _agree(zoo: Zoo, first: int, second: int, energy: float) -> bool:
    """Whether two models agree to 1e-5 of their norm; layer by layer, until they cannot any more."""
    distance = 0.0
    for name in zoo.layers:
        distance += _distance(zoo, name, first, second)
        if distance > DUPLICATE * energy:
            return False
    return True


def _distance(zoo: Zoo, name: str, first: int, second: int) -> float:
    stack = zoo.stack(name, precision="high")
    if not isinstance(stack, UpdateStack):
        return float((stack.matrix(first) - stack.matrix(second)).square().sum())
    b_one, a_one = stack.factors(first)
    b_two, a_two = stack.factors(second)
    return max(lora.energy((torch.cat([b_one, -b_two], 1), torch.cat([a_one, a_two]))), 0.0)


def find_copies(
    new: Sequence[Coefficients], names: Sequence[str], coefficients: Mapping[str, Tensor]
) -> list[tuple[str, str]]:
    """Return pairs of a model and a new one of the same coefficients, to 1e-5 of the model's norm.

    Only of new models that lie inside the kept subspace: of others the coefficients do not tell. `coefficients` are those of all
    models (N, …) in the order of `names`, layer by layer.
    """
    inside = [model for model in new if model.residual <= DUPLICATE]
    if not inside:
        return []
    rows_NC = torch.cat([rows.flatten(1).double() for rows in coefficients.values()], 1)
    found = []
    for model in inside:
        place = names.index(model.name)
        close_N = (rows_NC[:place] - rows_NC[place]).square().sum(1) <= DUPLICATE * sum(model.energies.values())
        found += [(names[other], model.name) for other in close_N.nonzero()[:, 0].tolist()]
    return found
