"""What one model of a zoo brings to each served module, and where its numbers are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.errors import MismatchError
from eigenzoo.serve.layers import Chain
from eigenzoo.serve.numbers import LayerForm
from eigenzoo.serve.stores import Cores, Factors, Slots

Write = Callable[[int], None]
"""Writes a model's numbers into a slot."""


class Part(ABC):
    """A part of the models that differs between them."""

    @abstractmethod
    def slots(self) -> Slots:
        """Where the numbers of all models are."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the coefficients or tensors that are read of each model."""

    @abstractmethod
    def prepare(self, values: Mapping[str, Tensor]) -> Write:
        """Compute a model's numbers from its coefficients or tensors, by name, and return what writes them."""


@dataclass
class LayerPart(Part):
    """A layer of the subspace that is a chain in a module."""

    layer: str
    form: LayerForm
    chain: Chain

    def slots(self) -> Slots:
        """See `Part`."""
        return self.chain.store

    def names(self) -> tuple[str, ...]:
        """See `Part`."""
        return (self.layer,)

    def prepare(self, values: Mapping[str, Tensor]) -> Write:
        """See `Part`. A matrix of a higher rank than the store's factors makes the store one of whole cores."""
        numbers = self.form.numbers(values[self.layer], self.chain.store)
        if numbers is not None:
            return lambda slot: self.chain.store.write(slot, numbers)

        def write(slot: int) -> None:
            store = self.chain.store
            if isinstance(store, Factors):
                store = Cores({"cores": store.stacks["left"] @ store.stacks["right"]})
            found = self.form.numbers(values[self.layer], store)
            assert found is not None
            store.write(slot, found)
            self.chain.store = store

        return write


@dataclass
class OwnPart(Part):
    """A tensor that each model has of its own, whole: a bias, a weight of a norm, a head.

    Attributes:
        name: the layer or the carried tensor.
        stored: where it is.
        key: the name of its stack.
        own: the module's own tensor.
        rebuilt: function from coefficients to the tensor, or None for carried tensors.
        difference: whether the difference from the module's own tensor is stored.
        laid_out: function that gives a tensor the form in which it is stored.
    """

    name: str
    stored: Slots
    key: str
    own: Tensor
    rebuilt: Callable[[Tensor], Tensor] | None
    difference: bool
    laid_out: Callable[[Tensor], Tensor]

    def slots(self) -> Slots:
        """See `Part`."""
        return self.stored

    def names(self) -> tuple[str, ...]:
        """See `Part`."""
        return (self.name,)

    def numbers(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return a model's tensor as it is stored. A model without it has the module's own."""
        own = self.own.detach().cpu().double()
        tensor = values.get(self.name, own)
        if self.rebuilt is not None:
            tensor = self.rebuilt(tensor)
        if tensor.shape != own.shape:
            raise MismatchError(
                f"has shape {list(tensor.shape)}",
                where=f"tensor '{self.name}'",
                rule=f"the served module has {list(own.shape)}, the same for all models",
                next_step="serve models whose heads have one shape",
            )
        tensor = tensor.double() - own if self.difference else tensor.double()
        return self.laid_out(tensor)

    def prepare(self, values: Mapping[str, Tensor]) -> Write:
        """See `Part`."""
        numbers = self.numbers(values)
        return lambda slot: self.stored.write(slot, {self.key: numbers})


@dataclass
class UpdatePart(Part):
    """A LoRA update of a module that the subspace does not have, as two factors of each model.

    Attributes:
        name: the module's name in the files.
        chain: the chain, whose store is `Factors` of the largest rank of the models.
    """

    name: str
    chain: Chain

    def slots(self) -> Slots:
        """See `Part`."""
        return self.chain.store

    def names(self) -> tuple[str, ...]:
        """See `Part`."""
        return (f"{self.name}.a", f"{self.name}.b")

    def prepare(self, values: Mapping[str, Tensor]) -> Write:
        """See `Part`."""
        store = self.chain.store
        if f"{self.name}.b" not in values:
            return lambda slot: store.write(
                slot, {name: torch.zeros_like(part[0]) for name, part in store.stacks.items()}
            )
        left, right = values[f"{self.name}.b"], values[f"{self.name}.a"]
        rank = store.stacks["left"].shape[2]
        if left.shape[1] > rank:
            raise MismatchError(
                f"rank {left.shape[1]}",
                where=f"module '{self.name}'",
                rule=f"the served models have at most {rank} in this excluded module",
                next_step="attach again with this model",
            )
        padded = {
            "left": torch.nn.functional.pad(left, (0, rank - left.shape[1])),
            "right": torch.nn.functional.pad(right, (0, 0, 0, rank - left.shape[1])),
        }
        return lambda slot: store.write(slot, padded)
