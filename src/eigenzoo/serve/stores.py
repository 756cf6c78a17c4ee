"""The numbers of all attached models in one layer, stacked: slot 0 is the base's and zero.

    Cores       a core (P, Q) for each model
    Factors     a core as two factors (P, R) (R, Q), where that is less to read
    Diagonals   weights of the zoo's own factors, a number for each rank
    Blends      weights of whole-layer directions (K, O, I)
    Vectors     a bias or a weight of a norm for each model

Legend: N slots, P and Q the sides of a core, R its rank, K directions, O outputs, I inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from eigenzoo.serve.route import Pick

GROWTH = 16
"""Share 1/16 of the slots is added when all are taken, so that spare slots take less than a tenth of the memory."""


class Slots:
    """Numbers of the models, by slot.

    Attributes:
        stacks: tensors (N, …), by name.
    """

    def __init__(self, stacks: Mapping[str, Tensor]) -> None:
        self.stacks = dict(stacks)

    def grow(self, num_slots: int) -> None:
        """Make room for more slots. Forward passes of other threads use the old tensors until the new ones are whole."""
        for name, stack in self.stacks.items():
            wider = stack.new_zeros(num_slots, *stack.shape[1:])
            wider[: len(stack)] = stack
            self.stacks[name] = wider

    def write(self, slot: int, numbers: Mapping[str, Tensor]) -> None:
        """Write a model's numbers."""
        for name, values in numbers.items():
            self.stacks[name][slot] = values.to(self.stacks[name])

    @property
    def bytes_per_model(self) -> int:
        """Bytes of one slot."""
        return sum(stack[0].numel() * stack.element_size() for stack in self.stacks.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(stack.numel() * stack.element_size() for stack in self.stacks.values())

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.stacks = {name: stack.to(device) for name, stack in self.stacks.items()}


class Store(Slots, ABC):
    """Matrices of the models, by slot: how they are multiplied with the rows of a batch."""

    @abstractmethod
    def times(self, values: Tensor, pick: Pick) -> Tensor:
        """Return (…, P): each row's values (…, Q) times its model's matrix. Zero for rows of the base."""

    @abstractmethod
    def lookup(self, ids: Tensor, pick: Pick) -> Tensor:
        """Return (…, P): the columns of each row's matrix at its ids (…). Zero for rows of the base."""

    @abstractmethod
    def matrix(self, slot: int) -> Tensor:
        """Return a model's matrix (P, Q)."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """Products of one row, except those with whole layers."""


class Cores(Store):
    """Matrices `cores` (N, P, Q)."""

    def times(self, values: Tensor, pick: Pick) -> Tensor:
        """See `Store`."""
        return pick.times(values, self.stacks["cores"])

    def lookup(self, ids: Tensor, pick: Pick) -> Tensor:
        """See `Store`."""
        return pick.columns(ids, self.stacks["cores"])

    def matrix(self, slot: int) -> Tensor:
        """See `Store`."""
        return self.stacks["cores"][slot]

    @property
    def cost(self) -> int:
        """P·Q."""
        return self.stacks["cores"][0].numel()


class Factors(Store):
    """Matrices as `left` (N, P, R) times `right` (N, R, Q)."""

    def times(self, values: Tensor, pick: Pick) -> Tensor:
        """See `Store`."""
        return pick.times(pick.times(values, self.stacks["right"]), self.stacks["left"])

    def lookup(self, ids: Tensor, pick: Pick) -> Tensor:
        """See `Store`."""
        return pick.times(pick.columns(ids, self.stacks["right"]), self.stacks["left"])

    def matrix(self, slot: int) -> Tensor:
        """See `Store`."""
        return self.stacks["left"][slot] @ self.stacks["right"][slot]

    @property
    def cost(self) -> int:
        """R·(P + Q)."""
        return self.stacks["left"][0].numel() + self.stacks["right"][0].numel()


class Diagonals(Store):
    """Diagonals `weights` (N, R)."""

    def times(self, values: Tensor, pick: Pick) -> Tensor:
        """See `Store`."""
        return pick.scaled(values, self.stacks["weights"])

    def lookup(self, ids: Tensor, pick: Pick) -> Tensor:
        """Not needed: the zoo's factors A are always there to look ids up."""
        raise NotImplementedError

    def matrix(self, slot: int) -> Tensor:
        """See `Store`."""
        return torch.diag(self.stacks["weights"][slot])

    @property
    def cost(self) -> int:
        """R."""
        return self.stacks["weights"][0].numel()


class Blends(Store):
    """Sums Σ c_k V_k with `weights` (N, K) of directions (K, O, I), which are the same for all models.

    The matrix of each model of a batch is summed, one at a time.
    """

    def __init__(self, weights_NK: Tensor, directions_KOI: Tensor) -> None:
        super().__init__({"weights": weights_NK})
        self.directions_KOI = directions_KOI

    def times(self, values: Tensor, pick: Pick) -> Tensor:
        """See `Store`. Memory: one matrix (O, I)."""
        rows = pick.by_row(values)
        products = rows.new_zeros(*rows.shape[:2], self.directions_KOI.shape[1])
        for slot in pick.models():
            which = (pick.slots == slot).nonzero()[:, 0]
            products[which] = rows[which] @ self.matrix(slot).T
        if pick.base is not None:
            products = products.masked_fill(pick.base[:, None, None], 0)
        return products.view(*values.shape[:-1], products.shape[-1])

    def lookup(self, ids: Tensor, pick: Pick) -> Tensor:
        """See `Store`. Memory: K times the result."""
        columns = self.directions_KOI.permute(2, 0, 1)[pick.by_row(ids[..., None])[..., 0]]
        summed = torch.einsum("ntko,nk->nto", columns, self.stacks["weights"].index_select(0, pick.slots))
        return summed.reshape(*ids.shape, -1)

    def matrix(self, slot: int) -> Tensor:
        """See `Store`."""
        matrix_OI: Tensor = torch.tensordot(self.stacks["weights"][slot], self.directions_KOI, 1)
        return matrix_OI

    @property
    def cost(self) -> int:
        """K·O·I."""
        return self.directions_KOI.numel()

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        super().to(device)
        self.directions_KOI = self.directions_KOI.to(device)


class Vectors(Slots):
    """Tensors `values` (N, …): a bias or a weight of a norm for each model."""

    def rows(self, pick: Pick) -> Tensor:
        """Return each row's tensor (n, …)."""
        return self.stacks["values"].index_select(0, pick.slots)
