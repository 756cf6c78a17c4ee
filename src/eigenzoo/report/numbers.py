"""Numbers: how they are rounded, weighted over layers, thinned out, and written for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ranks = NDArray[np.int64]

NONE = "–"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def floats(values: Iterable[Any] | None) -> Floats:
    """Make an array of a list, with NaN for what is missing."""
    known = () if values is None else values
    return np.array([math.nan if value is None else value for value in known], dtype=np.float64)


def rounded(values: Iterable[Any] | None, digits: int = 4) -> list[float | None]:
    """Round to significant digits for the page; what is missing stays None.

    >>> rounded([0.123456, None, 12345678])
    [0.1235, None, 12350000.0]
    """
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in floats(values).tolist()]


@cache
def log_ranks(num_ranks: int, limit: int = 40) -> Ranks:
    """About `limit` ranks from 1 to `num_ranks`, evenly spaced on a log scale; all of them where they are no more.

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
    """The value at the largest evaluated rank up to `rank`."""
    known = [(at, value) for at, value in zip(ranks, values, strict=False) if at <= rank and value is not None]
    return float(max(known)[1]) if known else None


def weighted_mean(values: Sequence[Any], weights: Sequence[float]) -> float | None:
    """Average over what is known; None where nothing is."""
    known, weight = floats(values), floats(weights)
    there = np.isfinite(known) & (weight > 0)
    return float(np.average(known[there], weights=weight[there])) if there.any() else None


def quantile(values: Iterable[Any], share: float) -> float | None:
    """A quantile of what is known."""
    known = floats(values)
    known = known[np.isfinite(known)]
    return float(np.quantile(known, share)) if len(known) else None


def in_percent(share: float | None) -> str:
    """Write a share.

    >>> in_percent(0.1234), in_percent(0.00456), in_percent(-0.02), in_percent(None)
    ('12.3 %', '0.456 %', '−2 %', '–')
    """
    if share is None:
        return NONE
    text = f"{100 * share:.3g}" if 0 < abs(share) < 0.1 else f"{100 * share:.1f}"
    return f"{_plain_exponent(text)} %"


def in_number(value: float | None) -> str:
    """Write a number in up to four significant digits, counts in full.

    >>> in_number(1234567), in_number(0.123456), in_number(1.5e12), in_number(16.0)
    ('1,234,567', '0.1235', '1.5 × 10¹²', '16')
    """
    if value is None:
        return NONE
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    return _plain_exponent(f"{value:.4g}")


def in_bytes(count: float | None) -> str:
    """Write a byte count as people read it.

    >>> in_bytes(1_234_567), in_bytes(12)
    ('1.23 MB', '12 B')
    """
    if count is None:
        return NONE
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def many(count: int, noun: str) -> str:
    """Write a count with its noun.

    >>> many(1, "model"), many(1200, "layer")
    ('1 model', '1,200 layers')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _plain_exponent(text: str) -> str:
    mantissa, _, power = text.partition("e")
    written = f"{mantissa} × 10{str(int(power)).translate(SUPERSCRIPT)}" if power else mantissa
    return "−" + written[1:] if written.startswith("-") else written
