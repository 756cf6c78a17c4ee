"""Workers: where the tasks of a pass run, and in which order their results come back.

One task reads and multiplies on one thread; as many run at once as there are cores. So reading one layer goes on while another's
products run, and no thread waits for another inside a product. Results come in the order of the tasks, a few at a time: what
is made of them does not depend on who was first, and memory does not grow with their number.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

from eigenzoo.formats.open_files import kept_open
from eigenzoo.passes.buffers import release
from eigenzoo.passes.garbage import seldom_collecting
from eigenzoo.passes.resources import Resources, resources_for

Key = TypeVar("Key")
Call = Callable[[], Any]
Done = tuple[Key, list[Any]]
Weight = Callable[[Any], int]

SWITCH_SECONDS = 5e-4
"""How often Python's threads change places while workers run."""

WAITING = 2
"""Tasks that wait beside those that run, so that no worker waits for the one who collects results."""

HELD_BYTES = 192 * 2**20
"""What results that wait for their turn may weigh, for each worker."""


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

    def in_order(self, jobs: Iterable[tuple[Key, Sequence[Call]]], weight: Weight = _nothing) -> Iterator[Done[Key]]:
        """Run the calls of each job; yields jobs with their calls' results in the order in which they came.

        So many calls are handed out that no worker waits, but no more than that, and not while the results that wait for their
        turn may weigh more than `HELD_BYTES` a worker: `weight` says what a job's results may weigh, in bytes. An error of a call
        is raised in its turn, and whatever has not begun is cancelled.
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
                    yield key, [future.result() for future in futures]
                else:
                    wait(_unfinished(pending), return_when=FIRST_COMPLETED)
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()

    def _has_room(self, pending: Iterable[tuple[Key, list[Future[Any]]]], weight: Weight) -> bool:
        if len(_unfinished(pending)) >= self.num + WAITING:
            return False
        weights = [weight(key) for key, _ in pending]
        return len(weights) <= self.num or sum(weights) <= HELD_BYTES * self.num


def _unfinished(pending: Iterable[tuple[Any, list[Future[Any]]]]) -> list[Future[Any]]:
    return [future for _, futures in pending for future in futures if not future.done()]


@contextmanager
def local_workers(max_memory: int | None = None, device: str = "cpu", num: int | None = None) -> Iterator[Workers]:
    """Open as many threads as torch has, with one thread each for whatever they call.

    Args:
        max_memory: bytes that blocks of weights may take in all; by default a quarter of the machine's memory.
        device: where products run.
        num: another number of threads.

    Raises UsageError for a device that is not there, and for too little memory.
    """
    num = num or num_threads()
    resources = resources_for(num, max_memory, device)
    with single_threaded(), _switching_often(), seldom_collecting(), kept_open():
        # OpenMP counts threads for each thread that calls it: what this one was given says nothing to those of the pool.
        pool = ThreadPoolExecutor(num, "eigenzoo", torch.set_num_threads, (1,))
        try:
            yield Workers(pool, num, resources)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            release()


@contextmanager
def opened_workers(workers: Workers | None, max_memory: int | None = None, device: str = "cpu") -> Iterator[Workers]:
    """Give the workers that were opened already, or open threads here for as long as the context lasts."""
    if workers is not None:
        yield workers
        return
    with local_workers(max_memory, device) as opened:
        yield opened


@contextmanager
def single_threaded() -> Iterator[None]:
    """Give torch and numpy one thread each while inside: threads that share two cores with others mostly wait for them.

    Several threads may be inside at once; the last one out gives back what the first one found.
    """
    with _pinned.lock:
        if _pinned.depth == 0:
            _pinned.threads = torch.get_num_threads()
            _pinned.limits = _controller().limit(limits=1, user_api="blas")
        _pinned.depth += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _pinned.lock:
            _pinned.depth -= 1
            if _pinned.depth == 0:
                torch.set_num_threads(_pinned.threads)
                _pinned.limits.restore_original_limits()


class _Pinned:
    """How many are inside `single_threaded`, and what they found there."""

    def __init__(self) -> None:
        self.lock, self.depth, self.threads = threading.Lock(), 0, 1
        self.limits: Any = None


_pinned = _Pinned()


def num_threads() -> int:
    """Return how many threads this process may use, also inside `single_threaded`."""
    with _pinned.lock:
        return _pinned.threads if _pinned.depth else torch.get_num_threads()


@contextmanager
def _switching_often() -> Iterator[None]:
    """Let Python's threads change places every half millisecond.

    A thread that comes back from a short read waits that long for one that is not reading; by the default of 5 ms two threads
    took as long as one.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
