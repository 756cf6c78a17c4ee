"""Which rows of a table of cases are not slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Give all cases as parameters; those that are not in `quick` show more of the same and are slow."""
    every = list(cases)
    assert all(case in every for case in quick), quick
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in every]
