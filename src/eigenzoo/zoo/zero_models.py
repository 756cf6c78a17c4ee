"""Find models without content: adapters whose updates are all zero, and models that equal their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from eigenzoo.zoo.zoo import Zoo

SUSPECT = 1e-6
"""Share of the largest model's energy below which a model is looked at again: round-off of moments is less."""

WORDS = {
    "update": "all updates are zero",
    "factors": "all updates are zero",
    "delta": "all weights are those of the base",
}

MOST_NAMED = 5


def zero_models(zoo: Zoo, energies: Mapping[str, Tensor]) -> list[str]:
    """Say which models hold nothing but zeros, as one warning; nothing where none does.

    Args:
        zoo: the models.
        energies: by layer ‖X‖² of each model (N,).

    Cost: one more read of the models that have next to no energy.
    """
    energies_N = [energy_N.double() for name, energy_N in energies.items() if _counts(zoo, name)]
    total_N = sum(energies_N, torch.zeros(len(zoo), dtype=torch.float64))
    suspects = (total_N <= SUSPECT * total_N.max()).nonzero().flatten().tolist()
    return say_zero([zoo.names[index] for index in suspects if _is_zero(zoo, index)], zoo.view)


def say_zero(names: Sequence[str], view: str) -> list[str]:
    """Word the warning.

    >>> say_zero(["t2"], "update")
    ['t2: all updates are zero']
    """
    if not names:
        return []
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return [f"{', '.join(names[:MOST_NAMED])}{more}: {WORDS.get(view, 'all weights are zero')}"]


def _counts(zoo: Zoo, layer: str) -> bool:
    """Tell whether a layer counts. A factor A alone is a random initial value, not an update."""
    return zoo.view != "factors" or not layer.endswith(".lora_A")


def _is_zero(zoo: Zoo, index: int) -> bool:
    model = zoo.models[index]
    for name in filter(partial(_counts, zoo), zoo.layers):
        key, scale = zoo.keys(name)[index]
        if not scale:
            continue
        if zoo.layers[name].kind == "update":
            if all(bool(factor.any()) for factor in model.read_factors(key)):
                return False
            continue
        values = model.read(key)
        if zoo.view == "delta" and zoo.base is not None:
            values = values.double() - zoo.base.read(key).double()
        if bool(values.any()):
            return False
    return True
