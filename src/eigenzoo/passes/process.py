"""Settings of the whole process that a pass changes: how Python switches threads and collects garbage, torch's and BLAS's threads.

Passes may overlap in several threads. The first pass to begin keeps what it finds, and the last one to end gives it back.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

SWITCH_SECONDS = 5e-4
"""How often Python switches threads while workers run.

A thread that comes back from a short read waits that long for one that is not reading; by the default of 5 ms two threads took
as long as one.
"""

FEWEST_COLLECTIONS = 100_000
"""Allocations between two garbage collections while a zoo is opened or read: each one visits the headers of hundreds of models."""

Undo = Callable[[], object]


class SharedSetting:
    """A setting of the process that is changed as long as anyone is inside.

    Args:
        change: changes the setting, and returns the function that gives back what was there before.
    """

    def __init__(self, change: Callable[[], Undo]) -> None:
        self._change, self._lock, self._depth = change, threading.Lock(), 0
        self._undo: Undo = lambda: None

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Hold the change while inside, in any thread."""
        with self._lock:
            if self._depth == 0:
                self._undo = self._change()
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._undo()


def _switch_often() -> Undo:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, SWITCH_SECONDS))
    return lambda: sys.setswitchinterval(usual)


def _collect_seldom() -> Undo:
    usual = gc.get_threshold()
    gc.set_threshold(max(usual[0], FEWEST_COLLECTIONS), *usual[1:])
    return lambda: gc.set_threshold(*usual)


def _limit_blas() -> Undo:
    limits = _controller().limit(limits=1, user_api="blas")
    _leave_control()

    def restore() -> None:
        limits.restore_original_limits()
        _leave_control()

    return restore


def _leave_control() -> None:
    """Let another thread set BLAS's threads next: newer threadpoolctl obeys only the thread that was first, without an error."""
    for library in _controller().lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


_often, _seldom, _blas = SharedSetting(_switch_often), SharedSetting(_collect_seldom), SharedSetting(_limit_blas)


def switching_often() -> AbstractContextManager[None]:
    """Let Python switch threads every half millisecond while inside."""
    return _often.changed()


def seldom_collecting() -> AbstractContextManager[None]:
    """Let Python look for cyclic garbage seldom while inside."""
    return _seldom.changed()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Give torch and BLAS one thread each while inside: threads that share two cores with others mostly wait for them.

    torch counts threads for each thread that calls it, so each thread that enters is given back its own number.
    """
    if _entered.depth:
        yield
        return
    with _lock:
        # A thread that torch first meets while another one is inside inherits that one's single thread.
        own = torch.get_num_threads()
        if _torch.depth == 0:
            _torch.threads = own
        elif own == 1:
            own = _torch.threads
        _torch.depth += 1
        torch.set_num_threads(1)
    _entered.depth = 1
    try:
        with _blas.changed():
            yield
    finally:
        _entered.depth = 0
        with _lock:
            _torch.depth -= 1
            torch.set_num_threads(own)


def enter_worker() -> None:
    """Give a thread that runs tasks, and nothing else as long as it lives, one thread of torch."""
    _entered.depth = 1
    # Torch's first call on a thread gives it the number that any thread has set last. That call is made here, before ours is set.
    torch.get_num_threads()
    torch.set_num_threads(1)


def num_threads() -> int:
    """Return how many threads this process may use, also inside `single_threaded`."""
    with _lock:
        return _torch.threads if _torch.depth else torch.get_num_threads()


class _Entered(threading.local):
    """Whether this thread is inside `single_threaded`."""

    depth = 0


class _Torch:
    """How many threads are inside `single_threaded`, and torch's threads before the first of them."""

    depth, threads = 0, 1


_lock, _entered, _torch = threading.Lock(), _Entered(), _Torch()
