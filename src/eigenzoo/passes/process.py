"""Settings of the whole process that a pass changes: how Python switches threads and collects garbage, torch's and BLAS's threads.

Passes may overlap in several threads. The first pass to begin saves the settings, and the last one to end restores them.
"""

from __future__ import annotations

import gc
import sys
import threading
import warnings
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
        change: changes the setting, and appends the function that gives back the value from before, before it does.
    """

    def __init__(self, change: Callable[[list[Undo]], None]) -> None:
        self._change, self._lock = change, threading.Lock()
        self._inside = set[object]()
        self._undos = list[Undo]()

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Hold the change while inside, in any thread. Ctrl-C at any moment leaves no change behind."""
        entry = object()
        try:
            self._enter(entry)
            yield
        finally:
            try:
                self._leave(entry)
            except KeyboardInterrupt:
                self._leave(entry)
                raise

    def _enter(self, entry: object) -> None:
        with self._lock:
            first = not self._inside
            self._inside.add(entry)
            if first:
                self._change(self._undos)

    def _leave(self, entry: object) -> None:
        """Undo the change when the last pass ends. A second call completes a first one that was interrupted."""
        with self._lock:
            self._inside.discard(entry)
            if not self._inside:
                for undo in reversed(self._undos):
                    undo()
                self._undos.clear()


def _switch_often(undos: list[Undo]) -> None:
    usual = sys.getswitchinterval()
    undos.append(lambda: sys.setswitchinterval(usual))
    sys.setswitchinterval(min(usual, SWITCH_SECONDS))


def _collect_seldom(undos: list[Undo]) -> None:
    usual = gc.get_threshold()
    undos.append(lambda: gc.set_threshold(*usual))
    gc.set_threshold(max(usual[0], FEWEST_COLLECTIONS), *usual[1:])


def _limit_blas(undos: list[Undo]) -> None:
    usual = [(library, library.num_threads) for library in _controller().lib_controllers if library.user_api == "blas"]

    def restore() -> None:
        for library, threads in usual:
            library.set_num_threads(threads)
        _leave_control()

    undos.append(restore)
    for library, _ in usual:
        library.set_num_threads(1)
    _leave_control()


def _leave_control() -> None:
    """Let another thread set BLAS's threads next: newer threadpoolctl silently ignores all threads but the first."""
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
    entry, own = object(), 0
    try:
        with _lock:
            # A thread that calls torch for the first time while another one is inside inherits the single-thread setting.
            own = torch.get_num_threads()
            if not _torch.inside:
                _torch.threads = own
            elif own == 1:
                own = _torch.threads
            _torch.inside.add(entry)
            _entered.depth = 1
            torch.set_num_threads(1)
        with _blas.changed():
            yield
    finally:
        try:
            _leave(entry, own)
        except KeyboardInterrupt:
            _leave(entry, own)
            raise


def _leave(entry: object, own: int) -> None:
    with _lock:
        _torch.inside.discard(entry)
        _entered.depth = 0
        if own:
            torch.set_num_threads(own)


def enter_worker() -> None:
    """Give a thread that runs tasks, and nothing else as long as it lives, one thread of torch."""
    _entered.depth = 1
    # Torch's first call on a thread takes over the number that any thread has set last. So it is made here, before ours is set.
    torch.get_num_threads()
    torch.set_num_threads(1)


def num_threads() -> int:
    """Return how many threads this process may use, also inside `single_threaded`."""
    with _lock:
        return _torch.threads if _torch.inside else torch.get_num_threads()


class _Entered(threading.local):
    """Whether this thread is inside `single_threaded`."""

    depth = 0


class _Torch:
    """The threads inside `single_threaded`, and torch's number of threads before the first of them."""

    def __init__(self) -> None:
        self.inside, self.threads = set[object](), 1


_lock, _entered, _torch = threading.Lock(), _Entered(), _Torch()


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what transformers and PEFT say while they load and save from a user who is told all that matters."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
