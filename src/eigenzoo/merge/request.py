"""The choices of a merge, and what each layer gets of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from eigenzoo.errors import BudgetError, UsageError
from eigenzoo.merge.layer_updates import Context
from eigenzoo.merge.method import Method

CORE, COLUMNS, ROWS, FULL = "core", "columns", "rows", "full"
SPACES = (CORE, COLUMNS, ROWS, FULL)

FULL_RANK = "full"

ChooseRank = Callable[[Tensor], int]
"""Gives the rank that is kept from the singular values of a merged update."""

RankChoice = int | float | str | None


@dataclass(frozen=True)
class Request:
    """The method of a merge, with its options.

    Attributes:
        method, options: the method, with all its options.
        scale: what the method's result is multiplied by.
        space: what the entries belong to, for methods that work entry by entry.
    """

    method: Method
    options: Mapping[str, Any]
    scale: float
    space: str

    @property
    def chosen_space(self) -> str | None:
        """The space that the method's entries belong to; None for methods that do not work entry by entry."""
        return self.method.space or (self.space if self.method.kind == "elements" else None)


@dataclass(frozen=True)
class Job:
    """A layer's part of a merge: what its updates belong to, and what is done with them."""

    context: Context
    request: Request


def rank_choice(rank: RankChoice) -> ChooseRank:
    """Return what chooses a rank from singular values.

    >>> rank_choice(0.9)(Tensor([3.0, 1.0]))
    1
    """
    if rank is None or rank == FULL_RANK:
        return Tensor.numel
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return lambda values: rank
    if isinstance(rank, float) and 0 < rank <= 1:
        return partial(_least_rank, rank)
    raise UsageError(
        f"rank {str(rank)[:40]!r}", rule="it is a number of 1 or more, a share of the energy such as 0.99, or 'full'"
    )


def _least_rank(share: float, values: Tensor) -> int:
    """Return the least rank that keeps a share of the energy, up to the round-off of its sum."""
    energies = values.square().cumsum(0)
    return min(int((energies < share * (1 - 1e-12) * energies[-1]).sum()) + 1, values.numel())


def check_budget(budget: int | None, rank: RankChoice) -> int | None:
    """Return a number of bytes; raises BudgetError for another value, UsageError for a rank beside it."""
    if budget is None:
        return None
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise BudgetError(f"a budget of {str(budget)[:40]!r}", rule="it is a number of bytes")
    if rank is not None:
        raise UsageError(
            f"rank {rank} beside a budget", rule="the budget chooses all ranks", next_step="leave one of them out"
        )
    return budget
