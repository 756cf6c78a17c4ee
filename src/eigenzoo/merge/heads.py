"""Tensors that no method merges: trained heads, biases of adapters, layers of other shapes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eigenzoo.errors import DataError, MismatchError, UsageError
from eigenzoo.formats.writers import all_finite
from eigenzoo.zoo.zoo import Zoo

REFUSE, FIRST = "refuse", "first"


def find_owner(zoo: Zoo, heads: str) -> int:
    """Return the number of the model that the file is like: its heads are taken where models differ.

    Raises UsageError for a name that no model has.
    """
    if heads in (REFUSE, FIRST):
        return 0
    if heads not in zoo.names:
        raise UsageError(f"heads {heads[:60]!r}", rule=f"it is refuse, first, or a model: {', '.join(zoo.names[:5])}")
    return zoo.place(heads)


def check_agreement(zoo: Zoo, names: Iterable[str], owner: int, heads: str) -> None:
    """Raise MismatchError for the first of these tensors that models do not have alike, unless one model's were asked for.

    Cost: each tensor is read once from each model, two at a time.
    """
    if heads != REFUSE:
        return
    for name in names:
        own = _read(zoo, owner, name)
        for index, model in enumerate(zoo.names):
            if index != owner and not _equal(own, _read(zoo, index, name)):
                raise MismatchError(
                    f"{model} and {zoo.names[owner]} differ in it",
                    where=f"tensor '{name}'",
                    rule="heads and biases are not merged: they come unchanged where all models have the same",
                    next_step=f"choose whose are written: --heads first, or --heads {model} (heads=)",
                )


def read_head(zoo: Zoo, owner: int, name: str) -> Tensor:
    """Read a tensor of the model that the file is like; raises DataError for NaN and Inf."""
    values = zoo.read_carried(owner, name)
    if values.is_floating_point() and not all_finite(values):
        raise DataError(
            "has values that are NaN or Inf",
            where=f"tensor '{name}' of {zoo.names[owner]}",
            rule="only finite weights are written",
            next_step="take this tensor from another model: --heads NAME (heads=)",
        )
    return values


def _read(zoo: Zoo, index: int, name: str) -> Tensor | None:
    return zoo.read_carried(index, name) if name in zoo.models[index].tensors else None


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Tell whether two tensors have the same values; NaN is equal to itself."""
    if one is None or other is None or one.shape != other.shape:
        return False
    if one.dtype != other.dtype:
        return torch.equal(one.double(), other.double())
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
