"""The one rule for seeds, in Python and on the command line."""

from __future__ import annotations

import operator
from typing import Any

from eigenzoo.errors import UsageError

MOST_SEEDS = 2**63
"""Seeds that torch's generators tell apart without a sign."""


def check_seed(seed: Any, most: int = MOST_SEEDS, *, where: str = "") -> int:
    """Return a seed as an int; raises UsageError unless it is a whole number from 0 to `most` - 1. Numpy's integers are fine.

    >>> check_seed(7)
    7
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < most:
        raise UsageError(
            f"seed {_shown(seed)}",
            where=where,
            rule=f"a seed is a whole number from 0 to 2**{most.bit_length() - 1} - 1",
        )
    return number


def _shown(seed: Any) -> str:
    # Python writes no number of more than some thousand digits.
    return "of more than 4,000 digits" if isinstance(seed, int) and abs(seed) >= 10**4000 else str(seed)[:40]
