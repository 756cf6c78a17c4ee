"""Which model each row of a batch is for, or each token of packed sequences.

Legend: N slots, n rows, T tokens of a row, P and Q the sides of a model's matrix.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from eigenzoo.errors import UsageError

BASE = "__base__"
"""The name of the model without changes, as in PEFT."""

BASE_SLOT = 0
"""Slot of the base. Its numbers are zero."""

SHORT = 4
"""Tokens of a run up to which its matrix is gathered for each token. Longer runs are one product each."""

GATHERED = 2**22
"""Most values of gathered matrices. Larger ones are multiplied model by model, where they are."""


@dataclass(frozen=True)
class Pick:
    """The slots of the rows of a layer's inputs.

    Attributes:
        slots: (n,), the slot of each row.
        base: (n,), true for rows of the base, or None if there are none.
        packed: whether the rows are tokens, (1, n, …), and not (n, …).
        long, short: of packed tokens, the runs (start, stop, slot) of more than `SHORT` tokens, and all other tokens.
    """

    slots: Tensor
    base: Tensor | None
    packed: bool = False
    long: tuple[tuple[int, int, int], ...] = ()
    short: Tensor | None = None

    def on(self, device: torch.device) -> Pick:
        """Return the same on a device, for models whose modules are on several."""
        if self.slots.device == device:
            return self
        base, short = (None if part is None else part.to(device) for part in (self.base, self.short))
        return replace(self, slots=self.slots.to(device), base=base, short=short)

    def by_row(self, values: Tensor) -> Tensor:
        """Return values (n, T, Q) of activations (n, …, Q), or (n, 1, Q) of packed ones (1, n, Q)."""
        return values.reshape(self.slots.shape[0], -1, values.shape[-1])

    def models(self) -> list[int]:
        """Return the slots that the rows have, each once."""
        return sorted(set(self.slots.tolist()))

    def times(self, values: Tensor, matrices_NPQ: Tensor) -> Tensor:
        """Return (…, P): each row's values (…, Q) times its model's matrix (P, Q); zero for rows of the base.

        Memory besides the result: the matrices of the rows, or of the short runs of packed tokens, at most `GATHERED` values.
        """
        rows = self.by_row(values)
        num_rows, outputs = rows.shape[0], matrices_NPQ.shape[1]
        if self.long or num_rows * matrices_NPQ[0].numel() > GATHERED:
            products = rows.new_zeros(num_rows, rows.shape[1], outputs)
            self._by_run(rows, matrices_NPQ, products)
        else:
            products = torch.bmm(rows, matrices_NPQ.index_select(0, self.slots).transpose(1, 2))
        if self.base is not None:
            # Zero times an infinite activation would be NaN.
            products = products.masked_fill(self.base[:, None, None], 0)
        return products.view(*values.shape[:-1], outputs)

    def scaled(self, values: Tensor, vectors_NQ: Tensor) -> Tensor:
        """Return each row's values (…, Q) times its model's vector (Q,); zero for rows of the base."""
        products = self.by_row(values) * vectors_NQ.index_select(0, self.slots)[:, None]
        if self.base is not None:
            products = products.masked_fill(self.base[:, None, None], 0)
        return products.view(values.shape)

    def columns(self, ids: Tensor, matrices_NPV: Tensor) -> Tensor:
        """Return (…, P): the columns of each row's model's matrix at its ids (…); zero for rows of the base."""
        rows = ids.reshape(self.slots.shape[0], -1)
        found = matrices_NPV.transpose(1, 2)[self.slots[:, None], rows]
        if self.base is not None:
            found = found.masked_fill(self.base[:, None, None], 0)
        return found.view(*ids.shape, -1)

    def spread(self, rows: Tensor, ndim: int) -> Tensor:
        """Return rows (n, O) as outputs (n, …, O) with `ndim` dimensions, or as (1, n, O) of packed tokens."""
        return rows[None] if self.packed else rows.view(len(rows), *[1] * (ndim - 2), -1)

    def _by_run(self, rows: Tensor, matrices_NPQ: Tensor, products: Tensor) -> None:
        if not self.packed:
            order = torch.argsort(self.slots, stable=True)
            slots = self.slots[order].tolist()
            for start, stop in _equal(slots):
                which = order[start:stop]
                products[which] = rows[which] @ matrices_NPQ[slots[start]].T
            return
        if self.short is not None:
            for part in torch.split(self.short, max(1, GATHERED // matrices_NPQ[0].numel())):
                matrices = matrices_NPQ.index_select(0, self.slots[part])
                products[part] = torch.bmm(rows[part], matrices.transpose(1, 2))
        for start, stop, slot in self.long:
            torch.mm(rows[start:stop, 0], matrices_NPQ[slot].T, out=products[start:stop, 0])


class Route(ABC):
    """Which models the inputs of a forward pass are for."""

    @abstractmethod
    def pick(self, shape: torch.Size, where: str) -> Pick:
        """Return the slots of the rows of a layer's inputs. Raises UsageError if they are not the rows of the route."""


class Rows(Route):
    """One model for each row of a batch.

    Args:
        slots: slot of each row.
        expand: how many rows `generate` makes of each: beams or returned sequences.
    """

    def __init__(self, slots: Sequence[int], device: torch.device, expand: int = 1) -> None:
        self._rows = torch.tensor(slots, dtype=torch.long, device=device)
        self._base = None if BASE_SLOT not in slots else self._rows == BASE_SLOT
        self._pick = Pick(self._rows, self._base)
        repeated = self._rows.repeat_interleave(expand)
        self._expanded = Pick(repeated, None if self._base is None else repeated == BASE_SLOT)

    @property
    def num_rows(self) -> int:
        """Number of rows of the batch."""
        return self._rows.shape[0]

    def pick(self, shape: torch.Size, where: str) -> Pick:
        """Rows, or as many beams of each."""
        if shape[0] == self._pick.slots.shape[0]:
            return self._pick
        if shape[0] == self._expanded.slots.shape[0]:
            return self._expanded
        raise UsageError(
            f"gets {shape[0]} rows, but {self._pick.slots.shape[0]} models are named",
            where=f"module '{where}'",
            rule="the first dimension of its inputs must be the batch, with one model named for each row",
            next_step="name one model for each row of the batch; a module that mixes rows cannot be served per row",
        )


class Packed(Route):
    """Runs of tokens, each for one model, in one row.

    Args:
        slots, lengths: slot and number of tokens of each run, in order.
        kept: indices of the tokens that the model keeps before its head, or None for all.
    """

    def __init__(
        self, slots: Sequence[int], lengths: Sequence[int], device: torch.device, kept: Tensor | None = None
    ) -> None:
        self._runs = list(zip(slots, lengths, strict=True))
        self._device = device
        self._num_tokens = sum(lengths)
        self._kept = kept
        self._picks: dict[tuple[int, bool], Pick] = {}

    def pick(self, shape: torch.Size, where: str) -> Pick:
        """Tokens, or those that are kept. Tokens after the last run are padding."""
        if len(shape) > 1 and shape[0] == 1:
            if self._kept is not None and shape[1] == len(self._kept):
                return self._cached(shape[1], True)
            if shape[1] >= self._num_tokens:
                return self._cached(shape[1], False)
        raise UsageError(
            f"gets inputs of shape {list(shape)}, but {self._num_tokens} packed tokens are named",
            where=f"module '{where}'",
            rule="packed tokens are one row (1, tokens, …)",
            next_step="name the length of each run of tokens of the row",
        )

    def _cached(self, num_tokens: int, is_kept: bool) -> Pick:
        key = (num_tokens, is_kept)
        if key not in self._picks:
            slots = [slot for slot, length in self._runs for _ in range(length)]
            if is_kept and self._kept is not None:
                slots = [slots[index] if index < len(slots) else BASE_SLOT for index in self._kept.tolist()]
            slots += [BASE_SLOT] * (num_tokens - len(slots))
            self._picks[key] = packed_pick(slots, self._device)
        return self._picks[key]


def packed_pick(slots: Sequence[int], device: torch.device) -> Pick:
    """Return the pick of tokens with these slots: runs of more than `SHORT` tokens apart from the others."""
    long = tuple((start, stop, slots[start]) for start, stop in _equal(slots) if stop - start > SHORT)
    is_long = {index for start, stop, _ in long for index in range(start, stop)}
    rest = [index for index in range(len(slots)) if index not in is_long]
    tensor = torch.tensor(slots, dtype=torch.long, device=device)
    base = tensor == BASE_SLOT if BASE_SLOT in slots else None
    short = torch.tensor(rest, dtype=torch.long, device=device) if rest else None
    return Pick(tensor, base, True, long, short)


def _equal(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges of equal numbers that follow each other."""
    bounds = [index for index in range(len(slots) + 1) if index in (0, len(slots)) or slots[index] != slots[index - 1]]
    return list(pairwise(bounds))


class Routing(threading.local):
    """The route of the forward passes of each thread."""

    def __init__(self) -> None:
        self.route: Route | None = None

    @contextmanager
    def entered(self, route: Route) -> Iterator[None]:
        """Use a route for this thread's forward passes."""
        before, self.route = self.route, route
        try:
            yield
        finally:
            self.route = before
