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

PARENT, MEAN, FILES = "parent", "mean", "files"
COMPARED = (PARENT, MEAN, FILES)
"""Families between whose scores a gain is counted."""

Criterion = Callable[["Row"], bool]


@dataclass(frozen=True)
class Row:
    """A way to keep models.

    Attributes:
        family, name: kind and name of the way.
        fitted: models that the shared part is fitted to.
        shared, per_model: bytes of files.
        shared_values, values: bytes of the values in them, with their scales: no headers, configs and records.
        lost: share of the energy of the fitted models; None for models that are kept by themselves.
        held_out: the same of held-out models.
        score, spread: mean of the metric on held-out models, and its standard error; None where it was not measured.
    """

    family: str
    name: str
    fitted: int
    shared: float
    per_model: float
    shared_values: float
    values: float
    lost: float | None
    held_out: float
    score: float | None = None
    spread: float = 0.0

    def each(self, number: int) -> float:
        """Bytes of the whole over the number of models."""
        return self.shared / number + self.per_model

    def each_values(self, number: int) -> float:
        """The same of the values alone."""
        return self.shared_values / number + self.values


def at_number(rows: Sequence[Row], number: int) -> list[Row]:
    """The rows that say most about so many models: those of the largest fit that has no more."""
    known = {row.fitted for row in rows}
    nearest = max((fitted for fitted in known if fitted <= number), default=min(known))
    return [row for row in rows if row.fitted == nearest]


def frontier(rows: Sequence[Row], number: int, *, by_family: bool) -> list[Row]:
    """What gains are counted between, and the rows that no smaller one (of their family, or of all) nearly equals."""
    kept = [row for row in rows if row.family in COMPARED]
    groups = list(dict.fromkeys(row.family for row in rows)) if by_family else [None]
    for group in groups:
        least = float("inf")
        for row in sorted(rows, key=lambda row: row.each(number)):
            if row not in kept and group in (None, row.family) and (row.held_out <= least - STEP):
                kept.append(row)
                least = row.held_out
    return kept


def smallest(
    rows: Sequence[Row], number: int, meets: Criterion, size: Callable[[Row, int], float] = Row.each
) -> Row | None:
    """The row that meets a criterion in the fewest bytes."""
    return min((row for row in rows if meets(row)), key=lambda row: size(row, number), default=None)


def loses(share: float) -> Criterion:
    """At most this share of the energy of held-out models is lost."""
    return lambda row: row.held_out <= share


def keeps(share: float, nothing: float, everything: float) -> Criterion:
    """At least this share of the gain in accuracy, from `nothing` to `everything`, is kept."""
    least = nothing + share * (everything - nothing)
    return lambda row: row.score is not None and row.score >= least
