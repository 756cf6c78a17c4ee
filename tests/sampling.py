"""Which rows of a table of cases `make test` runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from kernels import share_of

TESTS = Path(__file__).parent
WHOLE = tuple(TESTS / name for name in ("advice", "attacks", "cli", "verify"))
"""Here each row is a claim of its own, or a sample is taken already."""

MOST, EVERY = 4, 3
MOST_NUMERICAL, EVERY_NUMERICAL = 3, 4
"""Of a test with more rows than MOST, one in EVERY is run; of one about linear algebra, whose rows are inputs of one law, fewer."""


def mark_further(items: Iterable[pytest.Item]) -> None:
    """Mark rows of long tables that show the same of further inputs."""
    tables: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if "[" in item.nodeid and item.get_closest_marker("slow") is None:
            tables[item.nodeid.partition("[")[0]].append(item)
    for rows in tables.values():
        numerical = rows[0].get_closest_marker("numerical") is not None
        most, every = (MOST_NUMERICAL, EVERY_NUMERICAL) if numerical else (MOST, EVERY)
        if len(rows) <= most or any(rows[0].path.is_relative_to(folder) for folder in WHOLE):
            continue
        for row in rows[1:]:
            # By their names and not by their places: each third place of a table of three axes would be one axis.
            if crc32(row.nodeid.encode()) % every:
                row.add_marker(pytest.mark.further(share=share_of(row.nodeid)))


def slow_but(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Give all cases as parameters; those that are not in `quick` show more of the same and are slow."""
    every = list(cases)
    assert all(case in every for case in quick), quick
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in every]
