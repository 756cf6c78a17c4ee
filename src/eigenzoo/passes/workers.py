"""Workers: where the tasks of a pass run, and in which order their results arrive.

Each task reads and multiplies on one thread. As many tasks run at once as there are cores. So one layer is read while another
is multiplied, and no thread waits for another inside a product. Results arrive in the order of the tasks, a few at a time.
Outputs therefore do not depend on which task finished first, and memory does not grow with the number of tasks.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from eigenzoo.formats.open_files import keep_files_open
from eigenzoo.passes.buffers import release
from eigenzoo.passes.machine import num_cores
from eigenzoo.passes.process import enter_worker, num_threads, seldom_collecting, single_threaded, switching_often
from eigenzoo.passes.resources import (
    Resources,
    check_agrees,
    check_device,
    check_memory,
    enough_memory,
    most_workers,
    resources_for,
)
from eigenzoo.records import Progress, no_progress

Key = TypeVar("Key")
Result = TypeVar("Result")
Call = Callable[[], Any]
Done = tuple[Key, list[Any]]
Weight = Callable[[Any], int]

WAITING = 2
"""Tasks that are queued beside those that run, so that no worker waits while results are collected."""

MAX_PENDING_BYTES = 192 * 2**20
"""Bytes that results may take while they wait for their turn, per worker."""

MOST_PENDING = 8
"""Jobs for each worker that are handed out and not collected yet, at most: results without a weight take memory too."""


def _nothing(key: Any) -> int:
    return 0


class Workers:
    """Runs tasks on an executor: threads of this process, or processes elsewhere.

    Attributes:
        num: how many tasks run at once.
        resources: what each of them may use.
    """

    def __init__(
        self, executor: Executor, num: int, resources: Resources, run: Callable[[Call], Any] = operator.call
    ) -> None:
        self._executor, self._run, self.num, self.resources = executor, run, num, resources

    def in_order(
        self, jobs: Iterable[tuple[Key, Sequence[Call]]], weight: Weight = _nothing, what: str = "layer"
    ) -> Iterator[Done[Key]]:
        """Run the calls of each job; yields jobs with their calls' results in the order in which they came.

        Enough calls are submitted that no worker waits, and no more. None is submitted while `MOST_PENDING` jobs per worker
        wait for their turn, or while their results may take more than `MAX_PENDING_BYTES` per worker. `weight` returns the bytes
        that a job's results may take.
        An error of a call is raised in its turn, and whatever has not begun is cancelled. Where a call ran out of
        memory, that is a ResourceError; `what` says there what a job's key, or the first part of it, names.
        """
        pending: deque[tuple[Key, list[Future[Any]]]] = deque()
        waiting = iter(jobs)
        left = True
        try:
            while True:
                while left and self._has_room(pending, weight):
                    job = next(waiting, None)
                    left = job is not None
                    if job is not None:
                        pending.append((job[0], [self._executor.submit(self._run, call) for call in job[1]]))
                if not pending:
                    return
                if all(future.done() for future in pending[0][1]):
                    key, futures = pending.popleft()
                    with enough_memory(_location(what, key), self.resources.device):
                        results = [future.result() for future in futures]
                    yield key, results
                else:
                    wait(_unfinished(pending), return_when=FIRST_COMPLETED)
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()

    def each(
        self,
        stage: str,
        task: Callable[[Key], Result],
        keys: Collection[Key],
        progress: Progress = no_progress,
        weight: Weight = _nothing,
        what: str = "",
    ) -> Iterator[tuple[Key, Result]]:
        """Run one task for each key; yields keys with their results in order, and reports each as progress.

        `weight` and `what` are as in `in_order`; without `what` errors name the stage.
        """
        jobs = ((key, [partial(task, key)]) for key in keys)
        for done, (key, (result,)) in enumerate(self.in_order(jobs, weight, what or stage), 1):
            yield key, result
            progress(stage, done, len(keys))

    def _has_room(self, pending: Iterable[tuple[Key, list[Future[Any]]]], weight: Weight) -> bool:
        if len(_unfinished(pending)) >= self.num + WAITING:
            return False
        weights = [weight(key) for key, _ in pending]
        light = len(weights) <= MOST_PENDING * self.num and sum(weights) <= MAX_PENDING_BYTES * self.num
        return len(weights) <= self.num or light


def _unfinished(pending: Iterable[tuple[Any, list[Future[Any]]]]) -> list[Future[Any]]:
    return [future for _, futures in pending for future in futures if not future.done()]


def _location(what: str, key: Any) -> str:
    name = key[0] if isinstance(key, tuple) and key else key
    return f"{what} '{name}'" if isinstance(name, str) else ""


@contextmanager
def local_workers(max_memory: int | None = None, device: str = "cpu", num: int | None = None) -> Iterator[Workers]:
    """Open as many threads as torch has, with one thread each for whatever they call.

    Args:
        max_memory: bytes that blocks of weights may take in all; by default a quarter of the machine's memory.
        device: where products run.
        num: another number of threads.

    Raises UsageError for a device that is not there, and for too little memory.
    """
    num = num or most_workers(min(num_threads(), num_cores()), device)
    resources = resources_for(num, max_memory, device)
    with single_threaded(), switching_often(), seldom_collecting(), keep_files_open():
        pool = ThreadPoolExecutor(num, "eigenzoo", enter_worker)
        try:
            yield Workers(pool, num, resources)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            release()


@contextmanager
def opened_workers(workers: Workers | None, max_memory: int | None = None, device: str = "cpu") -> Iterator[Workers]:
    """Give the workers that were opened already, or open threads here for as long as the context lasts.

    Raises UsageError for a device or `max_memory` that contradicts `workers`.
    """
    check_workers(workers, max_memory, device)
    if workers is not None:
        yield workers
        return
    with local_workers(max_memory, device) as opened:
        yield opened


def check_workers(workers: Workers | None, max_memory: int | None = None, device: str = "cpu") -> None:
    """Raise what `opened_workers` would, before anything else is done."""
    if workers is None:
        check_device(device)
        check_memory(max_memory)
    else:
        check_agrees(workers.resources, max_memory, device)
