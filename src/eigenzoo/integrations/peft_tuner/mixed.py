"""Batches whose rows use different adapters: PEFT's `adapter_names=`, with the products of `eigenzoo.serve`.

All adapters of one basis in a layer are one product with their stacked cores. Adapters for which that is not possible are computed
one by one, as PEFT's own tuners do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eigenzoo.errors import UsageError
from eigenzoo.serve.layers import Chain, kind_of
from eigenzoo.serve.route import BASE_SLOT, Pick, Rows
from eigenzoo.serve.stores import Cores, Diagonals, Store

BASE_ADAPTER = "__base__"
"""PEFT's name of the model without an adapter."""


class AdapterNamesError(UsageError, ValueError):
    """Adapter names that PEFT's own tuners refuse with a ValueError."""


@dataclass
class Mixed:
    """The adapters of a batch's rows, during one call of the model.

    Attributes:
        adapters: the adapters, each once. An adapter's slot is its number here plus one.
        rows: the slot of each row.
        chains: the stacked cores by layer and basis, computed when a layer is called first.
    """

    adapters: tuple[str, ...]
    rows: Rows
    chains: dict[tuple[int, str], Chain] = field(default_factory=dict)

    def pick(self, inputs: Tensor, layer: nn.Module) -> Pick:
        """Return the slots of the rows of a layer's inputs."""
        return self.rows.pick(inputs.shape, type(layer).__name__)


def mixed_of(names: Sequence[str], known: set[str], device: torch.device, num_beams: int) -> Mixed:
    """Return the adapters of rows. Raises AdapterNamesError for names that no layer has."""
    unknown = sorted(set(names) - known - {BASE_ADAPTER})
    if unknown:
        raise AdapterNamesError(
            f"adapter_names has {unknown[0]!r}, which no layer of the model has",
            rule=f"the adapters are {', '.join(sorted(known))}; {BASE_ADAPTER!r} is the model without adapters",
            next_step="load it with load_adapter, or correct the name",
        )
    adapters = tuple(dict.fromkeys(name for name in names if name != BASE_ADAPTER))
    slots = [BASE_SLOT if name == BASE_ADAPTER else adapters.index(name) + 1 for name in names]
    return Mixed(adapters, Rows(slots, device, num_beams))


def stacked(parts_of_all: Sequence[Sequence[Tensor] | None], middle: int) -> Chain | None:
    """Return adapters' products of thin matrices as one chain with stacked middles, or None if they are not of one basis.

    Args:
        parts_of_all: of each adapter the matrices of its one product, or None for an adapter that the layer does not have.
        middle: the place of the matrix that differs.
    """
    present = [parts for parts in parts_of_all if parts is not None]
    if not present:
        return None
    sides = [part for place, part in enumerate(present[0]) if place != middle]
    for parts in present:
        others = [part for place, part in enumerate(parts) if place != middle]
        if len(others) != len(sides) or any(a.data_ptr() != b.data_ptr() for a, b in zip(others, sides, strict=True)):
            return None
    first = present[0][0] if middle else None
    last = present[0][-1] if middle < len(present[0]) - 1 else None
    dtype = next((part.dtype for part in (first, last) if part is not None), present[0][middle].dtype)
    zero = torch.zeros_like(present[0][middle])
    middles = torch.stack([zero, *(zero if parts is None else parts[middle] for parts in parts_of_all)]).to(dtype)
    store: Store = Diagonals({"weights": middles}) if zero.ndim == 1 else Cores({"cores": middles})
    return Chain(first, store, last)


def add_stacked(base: nn.Module, inputs: Tensor, result: Tensor, chain: Chain, pick: Pick) -> Tensor:
    """Return the base's output plus each row's change."""
    kind = kind_of(base)
    assert kind is not None
    return kind.added(base, inputs, result, chain, pick)


def add_one_by_one(
    inputs: Tensor, result: Tensor, pick: Pick, slots: Sequence[int], change: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Return the base's output plus the changes by adapters that are computed one after the other."""
    result = result.clone()
    for slot in slots:
        which = (pick.slots == slot).nonzero()[:, 0]
        if len(which):
            result[which] += change(slot, inputs[which]).to(result.dtype)
    return result
