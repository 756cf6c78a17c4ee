"""Which way to keep models takes the fewest bytes, at equal energy and at equal accuracy.

A way takes shared bytes once and others for each model. For more models than were fitted, both are taken to stay as they are, and
so is the loss on held-out models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

NUMBERS = (10, 30, 60, 200)
"""Numbers of models for which ways are compared."""

STEP = 0.01
"""Share of the energy that more bytes must save for a way to be worth a measurement of its accuracy."""

Criterion = Callable[["Row"], bool]


@dataclass(frozen=True)
class Row:
    """A way to keep models.

    Attributes:
        family, name: what the way is.
        fitted: models that the shared part is fitted to.
        shared, per_model: bytes.
        lost: share of the energy of the fitted models; None for models that are kept by themselves.
        held_out: the same of held-out models.
        score, spread: mean of the metric on held-out models, and its standard error; None where it was not measured.
    """

    family: str
    name: str
    fitted: int
    shared: float
    per_model: float
    lost: float | None
    held_out: float
    score: float | None = None
    spread: float = 0.0

    def each(self, number: int) -> float:
        """Bytes of the whole over the number of models."""
        return self.shared / number + self.per_model


def at_number(rows: Sequence[Row], number: int) -> list[Row]:
    """The rows that say most about so many models: those of the largest fit that has no more."""
    known = {row.fitted for row in rows}
    nearest = max((fitted for fitted in known if fitted <= number), default=min(known))
    return [row for row in rows if row.fitted == nearest]


def frontier(rows: Sequence[Row], number: int) -> list[Row]:
    """Of every family the rows that no smaller one nearly equals, in the order of their bytes."""
    kept: list[Row] = []
    for family in dict.fromkeys(row.family for row in rows):
        least = float("inf")
        for row in sorted((row for row in rows if row.family == family), key=lambda row: row.each(number)):
            if row.held_out <= least - STEP or (row.held_out < least and row.held_out == 0):
                kept.append(row)
                least = row.held_out
    return kept


def smallest(rows: Sequence[Row], number: int, meets: Criterion) -> Row | None:
    """The row that meets a criterion in the fewest bytes."""
    return min((row for row in rows if meets(row)), key=lambda row: row.each(number), default=None)


def loses(share: float) -> Criterion:
    """At most this share of the energy of held-out models is lost."""
    return lambda row: row.held_out <= share


def keeps(share: float, nothing: float, everything: float) -> Criterion:
    """At least this share of the gain in accuracy, from `nothing` to `everything`, is kept."""
    least = nothing + share * (everything - nothing)
    return lambda row: row.score is not None and row.score >= least
