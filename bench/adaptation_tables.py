"""The rows of the adaptation bench, and its tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from bench.adaptation_training import Settings
from bench.pages import markdown

NAMES = {"fine-tunes": "adaptation", "adapters": "adaptation-adapters", "networks": "adaptation-networks"}
"""Of the tables, by zoo."""

MEAN, FULL = "mean", ("full-start", "full-start-head")
"""Keys of the rows between which a gap is."""

RATE_KEYS = {
    "in units of the spread": "learned-{}-mean",
    "unscaled": "learned-{}-mean-unscaled",
    "random, in units of the spread": "random-{}-mean",
    "random, unscaled": "random-{}-mean-unscaled",
}


@dataclass(frozen=True)
class Row:
    """What one method came to.

    Attributes:
        accuracy: by held-out task, averaged over seeds.
        num_trained, num_bytes: a task's numbers, and the size of the file that holds them.
        rate: the learning rate that was chosen; None where nothing is trained.
        seconds: of a processor, a model, trained beside the other tasks.
        basis: see `adaptation_methods.Method`.
    """

    key: str
    title: str
    accuracy: tuple[float, ...]
    num_trained: int = 0
    num_bytes: int = 0
    rate: float | None = None
    seconds: float | None = None
    basis: tuple[str, str, str] | None = None

    @property
    def mean(self) -> float:
        """Over tasks."""
        return statistics.fmean(self.accuracy)

    @property
    def error(self) -> float:
        """The mean's standard error."""
        return standard_error(self.accuracy)


@dataclass(frozen=True)
class Found:
    """All rows of one zoo.

    Attributes:
        rates: accuracy by learning rate, by method.
        basis_bytes: of what all tasks share, by label of the size.
    """

    name: str
    rows: Sequence[Row]
    rates: Mapping[str, Sequence[float]]
    basis_bytes: Mapping[str, int]

    def row(self, *keys: str) -> Row:
        """Return the row of the first of these keys that there is."""
        by_key = {row.key: row for row in self.rows}
        return next(by_key[key] for key in keys if key in by_key)

    def share(self, row: Row) -> float:
        """Return the share of the gap between the untrained mean and full fine-tuning that a row closes."""
        mean = self.row(MEAN).mean
        return (row.mean - mean) / (self.row(*FULL).mean - mean)


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / sqrt(len(values))


def main_table(found: Found) -> list[str]:
    """Every method of one zoo."""
    head = ["method", "accuracy", "of the gap", "trained numbers", "bytes a task", "learning rate", "seconds a model"]
    return markdown(head, [_cells(found, row) for row in found.rows])


def _cells(found: Found, row: Row) -> list[str]:
    return [
        row.title,
        f"{row.mean:.3f} ± {row.error:.3f}",
        f"{found.share(row):.0%}".replace("-0%", "0%"),
        f"{row.num_trained:,}" if row.num_trained else "–",
        f"{row.num_bytes:,}" if row.num_bytes else "–",
        "–" if row.rate is None else f"{row.rate:g}",
        "–" if row.seconds is None else f"{row.seconds:.2f}",
    ]


def pairs(found: Found) -> list[tuple[Row, Row]]:
    """Rows of learned bases, each with the one of random directions."""
    random = {row.basis[1:]: row for row in found.rows if row.basis and row.basis[0] == "random"}
    return [(row, random[row.basis[1:]]) for row in found.rows if row.basis and row.basis[0] == "learned"]


def difference(ours: Row, theirs: Row) -> tuple[float, float, int]:
    """Return by how much one row is better than another, task by task: the mean, its standard error, and tasks won."""
    more = [here - there for here, there in zip(ours.accuracy, theirs.accuracy, strict=True)]
    return statistics.fmean(more), standard_error(more), sum(each > 0 for each in more)


def pair_table(all_found: Sequence[Found]) -> list[str]:
    """What a learned basis adds to a random one of the same size."""
    head = [
        "zoo",
        "size",
        "from",
        "trained numbers",
        "learned",
        "random",
        "learned − random",
        "tasks won",
        "basis, once",
    ]
    return markdown(head, [_pair(found, *pair) for found in all_found for pair in pairs(found)])


def _pair(found: Found, learned: Row, random: Row) -> list[str]:
    assert learned.basis is not None
    _, start, size = learned.basis
    more, error, won = difference(learned, random)
    return [
        found.name,
        size,
        "the mean" if start == MEAN else "the parent",
        f"{learned.num_trained:,}",
        f"{learned.mean:.3f}",
        f"{random.mean:.3f}",
        f"{more:+.3f} ± {error:.3f}",
        f"{won} of {len(learned.accuracy)}",
        f"{found.basis_bytes[size]:,} bytes",
    ]


def less_table(less: Mapping[str, Found], whole: Found) -> list[str]:
    """The same methods with fewer images, or fewer steps, and with all of them."""
    head = ["method", "trained numbers", *less, "1,297 images, 300 steps"]
    first, *others = [*less.values(), whole]
    cells = []
    for row in first.rows:
        same = [row, *(found.row(row.key) for found in others)]
        figures = [f"{each.mean:.3f} ± {each.error:.3f}" for each in same]
        cells.append([row.title, f"{row.num_trained:,}" if row.num_trained else "–", *figures])
    return markdown(head, cells)


def rate_table(found: Found, settings: Settings) -> list[str]:
    """Accuracy by learning rate, of the tasks for choosing, on images kept apart: in units of the zoo's spread or not."""
    sizes = [row.basis[2] for row in found.rows if row.basis and row.basis[:2] == ("learned", MEAN)]
    head = ["trained", *(f"{rate:g}" for rate in settings.rates)]
    keys = {f"{size}, {what}": key.format(size) for what, key in RATE_KEYS.items() for size in sizes}
    shown = {title: found.rates[key] for title, key in keys.items() if key in found.rates}
    return markdown(head, [[title, *(f"{each:.3f}" for each in rates)] for title, rates in shown.items()])
