"""Fixtures that several files of the evidence's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from function_zoos import NUM_FITTED, RANKS, Recorder, write_zoo

import eigenzoo as ez


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, ...]]:
    """Every case fitted and evaluated once."""
    done: dict[tuple[str, str], tuple[Any, ...]] = {}

    def make(view: str, axes: str) -> tuple[Any, ...]:
        if (view, axes) not in done:
            paths, base = write_zoo(tmp_path_factory.mktemp("zoo"), view)
            fitted = ez.open_zoo(paths[:NUM_FITTED], view=view, base=base)
            space = ez.fit(fitted, RANKS[axes], dtype="float64")
            metric = Recorder()
            found = ez.evaluate(space, metric, paths[NUM_FITTED:])
            done[view, axes] = (paths, base, space, metric, found)
        return done[view, axes]

    return make
