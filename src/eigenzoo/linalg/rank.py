"""Choose the rank of an axis by a rule, and return the reason.

A rule is an int (the number of directions), a float in (0, 1] (the share of the variance; 1.0 is all of it), or "auto" (parallel
analysis, Horn 1965, against a null).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

from scipy.special import stdtrit
from torch import Tensor

from eigenzoo.errors import RankError
from eigenzoo.linalg.spectrum import NUMERICAL_RANK

RankRule = int | float | str
AUTO = "auto"
AUTO_QUANTILE = 0.95
"""The null's quantile that a direction must exceed: Horn's usual choice, one chance in twenty for a direction of noise."""

ENOUGH_DRAWS = 20
"""Draws of a null from which on its quantile is one of them: the largest of fewer is exceeded by chance more often."""


@dataclass(frozen=True)
class RankChoice:
    """A rank and the reason for it."""

    rank: int
    reason: str


def check_rule(rule: RankRule) -> RankRule:
    """Return a rank rule as int, float or "auto" (numpy's numbers too), or raise RankError for one that means nothing."""
    if isinstance(rule, Integral) and not isinstance(rule, bool):
        rule = int(rule)
    elif isinstance(rule, Real) and not isinstance(rule, bool):
        rule = float(rule)
    elif rule != AUTO:
        raise RankError(f"{rule!r} is not a rank", rule="a rank is a number, a share in (0, 1], or 'auto'")
    if isinstance(rule, float) and not 0 < rule <= 1:
        raise RankError(f"rank {rule} is not a share", rule="a float rank is a share of the variance in (0, 1]")
    if isinstance(rule, int) and rule < 0:
        raise RankError(f"rank {rule} is negative", rule="a rank is a number of directions")
    return rule


def choose_rank(rule: RankRule, values_K: Tensor, total: float, null: Tensor | None = None) -> RankChoice:
    """Choose how many leading directions to keep.

    Args:
        rule: see the top of this file.
        values_K: eigenvalues above round-off, descending.
        total: the trace of the moment, the denominator of every share.
        null: for "auto", (draws, N) null explained variance ratios.
    """
    available = values_K.numel()
    if isinstance(rule, str):
        if null is None:
            raise RankError("rank 'auto' needs a null", next_step="give a number or a share")
        return _parallel_analysis(values_K, total, null)
    if isinstance(rule, float):
        if rule == 1.0:
            return RankChoice(available, "everything above round-off")
        shares = values_K.cumsum(0) / total if total > 0 else values_K
        return RankChoice(
            min(available, int((shares < rule).sum()) + 1) if available else 0, f"{100 * rule:g} % of the variance"
        )
    if rule >= available:
        return RankChoice(available, "all there are" if rule > available else "as asked")
    return RankChoice(rule, "as asked")


def _parallel_analysis(values_K: Tensor, total: float, null: Tensor) -> RankChoice:
    """Count the leading eigenvalues above the null's quantile, up to the first that is not."""
    if total <= 0 or not values_K.numel():
        return RankChoice(0, "no variance")
    # With a single dimension a share is 1 in the null too, up to round-off.
    threshold = null_threshold(null)[: values_K.numel()]
    above = (values_K / total) > threshold * (1 + NUMERICAL_RANK)
    rank = int(above.long().cumprod(0).sum())
    return RankChoice(rank, f"{rank} directions above the {AUTO_QUANTILE:.0%} quantile of the null")


def null_threshold(null: Tensor) -> Tensor:
    """Return what a share of noise exceeds once in twenty, of each direction, from (draws, N) null shares.

    From `ENOUGH_DRAWS` draws on their quantile; from fewer the upper bound of one more draw of a normal variable with their mean
    and spread (Student's t). A largest eigenvalue is skewed: of noise one in seventeen passes
    with five draws, where one in six exceeds the largest of five.
    """
    num_draws = null.shape[0]
    if num_draws >= ENOUGH_DRAWS or num_draws == 1:
        # "higher", because with 20 draws the interpolated quantile accepts one noise spectrum in eleven.
        largest: Tensor = null.quantile(AUTO_QUANTILE, dim=0, interpolation="higher")
        return largest
    deviates = float(stdtrit(num_draws - 1, AUTO_QUANTILE)) * (1 + 1 / num_draws) ** 0.5
    bound: Tensor = null.mean(0) + deviates * null.std(0)
    return bound
