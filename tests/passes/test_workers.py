"""Results come in the order of the tasks, and no more of them wait for their turn than is said."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from eigenzoo.passes.resources import Resources
from eigenzoo.passes.workers import MAX_PENDING_BYTES, MOST_PENDING, Workers, local_workers

NUM, KEYS = 3, range(500)


class AtOnce(Executor):
    """Runs each task before the next one is handed out: whoever collects the results is always slower."""

    def submit(self, call: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*given, **named))
        return future


@pytest.mark.parametrize(
    ("weight", "most"), [(0, MOST_PENDING * NUM), (MAX_PENDING_BYTES, NUM)], ids=["light", "heavy"]
)
def test_few_results_wait_for_one_who_collects_them_slowly(weight: int, most: int) -> None:
    made: list[int] = []
    workers = Workers(AtOnce(), NUM, Resources())
    for taken, (key, result) in enumerate(workers.each("testing", made.append, KEYS, weight=lambda _: weight)):
        assert (key, result) == (taken, None)
        assert len(made) - taken <= most + 1
    assert made == list(KEYS)


def test_results_come_in_order_from_threads() -> None:
    with local_workers(num=2) as workers:
        assert list(workers.each("testing", str, KEYS)) == [(key, str(key)) for key in KEYS]
