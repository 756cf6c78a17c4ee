"""Find models that are the same function by their moments. If products were too coarse, the models are compared again.

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
"""Two models are the same function below this squared distance over mean energy: 1e-5 of the norm, float32 factors' round-off."""

COARSE = 10.0
"""Squared distances below this multiple of the products' round-off may be zero."""


def find_duplicates(
    names: Sequence[str], moments: Iterable[LayerMoments], zoo: Zoo | None = None
) -> tuple[tuple[str, str], ...]:
    """Return pairs of models whose analysed layers agree to 1e-5 of their norm. Factors may differ if their products agree.

    Distances from float32 products are coarser than that. With a zoo, models closer than these can resolve are read again in pairs.
    Without it they count as the same. The products of full weights are about the mean and resolve 1e-3 of the distance from it;
    those of updates resolve 1e-3 of the norm.
    """
    size = len(names)
    distances_NN, allowed_NN = torch.zeros(2, size, size, dtype=torch.float64)
    energies_N = torch.zeros(size, dtype=torch.float64)
    coarse = False
    for layer in moments:
        distances_NN += squared_distances(layer.gram_NN)
        energies_N += layer.energies_N
        if layer.round_off > DUPLICATE:
            # Round-off is relative to the Gram as computed: about zero for updates, about the mean for full weights.
            scale_N = layer.energies_N if layer.singular_NR is not None else center_gram(layer.gram_NN).diagonal()
            allowed_NN += COARSE * layer.round_off * (scale_N[:, None] + scale_N) / 2
            coarse = True
    least_NN = DUPLICATE * (energies_N[:, None] + energies_N) / 2
    close_NN = distances_NN <= torch.maximum(allowed_NN, least_NN)
    if coarse and zoo is not None:
        close_NN = _confirmed(zoo, close_NN, energies_N)
    return tuple((names[first], names[second]) for first, second in close_NN.triu(1).nonzero().tolist())


def _confirmed(zoo: Zoo, close_NN: Tensor, energies_N: Tensor) -> Tensor:
    """Read pairs of a group's first model and another again, and return those that agree."""
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
    """Tell whether two models agree to 1e-5 of their norm. Stops at the layer from which on they cannot."""
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
    """Return pairs of a model and a new one whose coefficients agree to 1e-5 of the model's norm.

    Only new models inside the kept subspace are compared, because coefficients do not describe the others completely.
    `coefficients` has those of all models (N, …) in the order of `names`, by layer.
    """
    inside = [model for model in new if model.residual <= DUPLICATE]
    if not inside:
        return []
    rows_NC = torch.cat([rows.flatten(1).double() for rows in coefficients.values()], 1)
    pairs = []
    for model in inside:
        index = names.index(model.name)
        close_N = (rows_NC[:index] - rows_NC[index]).square().sum(1) <= DUPLICATE * sum(model.energies.values())
        pairs += [(names[other], model.name) for other in close_N.nonzero()[:, 0].tolist()]
    return pairs
