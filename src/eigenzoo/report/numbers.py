"""Round numbers, average them over layers, and select ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ranks = NDArray[np.int64]


def floats(values: Iterable[Any] | None) -> Floats:
    """Make an array of a list, with NaN for missing values."""
    known = () if values is None else values
    return np.array([math.nan if value is None else value for value in known], dtype=np.float64)


def rounded(values: Iterable[Any] | None, digits: int = 4) -> list[float | None]:
    """Round to significant digits for the page. Missing values are None.

    >>> rounded([0.123456, None, 12345678])
    [0.1235, None, 12350000.0]
    """
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in floats(values).tolist()]


@cache
def log_ranks(num_ranks: int, limit: int = 40) -> Ranks:
    """Return about `limit` ranks from 1 to `num_ranks`, evenly spaced on a log scale, or all if there are not more.

    >>> log_ranks(3), len(log_ranks(499))
    (array([1, 2, 3]), 40)
    """
    tries = limit
    ranks = np.arange(1, min(num_ranks, limit) + 1)
    while num_ranks > limit:
        found = np.unique(np.round(np.geomspace(1, num_ranks, tries)).astype(np.int64))
        if len(found) > limit:
            break
        ranks, tries = found, tries + 1
    return ranks.astype(np.int64)


def at_rank(ranks: Sequence[int], values: Sequence[Any], rank: int) -> float | None:
    """Return the value at the largest evaluated rank up to `rank`."""
    known = [(at, value) for at, value in zip(ranks, values, strict=False) if at <= rank and value is not None]
    return float(max(known)[1]) if known else None


def weighted_mean(values: Sequence[Any], weights: Sequence[float]) -> float | None:
    """Average the values that are not missing; None if all are."""
    known, weight = floats(values), floats(weights)
    there = np.isfinite(known) & (weight > 0)
    return float(np.average(known[there], weights=weight[there])) if there.any() else None


def quantile(values: Iterable[Any], share: float) -> float | None:
    """Return a quantile of the values that are not missing."""
    known = floats(values)
    known = known[np.isfinite(known)]
    return float(np.quantile(known, share)) if len(known) else None
