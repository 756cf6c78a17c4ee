"""Calls to stores, each repeated while it may still succeed, and many such jobs at once.

Drivers raise errors of hundreds of classes. What lasts (nothing there, no permission, a request that is wrong) becomes a
FormatError at once; what may pass (a broken connection, a busy server) is tried again with growing, jittered delays, or when
the server asks for it. Errors that only a fault of this program makes are not touched.

Tenacity does the repeating. Each job has its own: what one waits for, a delay or a slow answer, no other waits for.
"""

from __future__ import annotations

import errno
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from json import JSONDecodeError
from threading import Condition, Event
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
)
from tenacity.stop import stop_base

from eigenzoo.errors import EigenzooError, FormatError
from eigenzoo.formats.open_files import OPEN_AGAIN
from eigenzoo.formats.remote.address import scrubbed

T = TypeVar("T")

MAX_JOBS, MAX_BYTES = 32, 64 * 2**20
"""How many jobs run at once, and how many bytes they may ask for together."""

MAX_THREADS = 4 * MAX_JOBS
"""Jobs that run or wait for their next attempt: so many more may be broken before others wait for them."""

ATTEMPTS = 8
FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0
LONGEST_WAIT = 300.0
"""A server that asks to wait for longer, in all, is not waited for. The hub counts requests in windows of five minutes."""

GIVE_UP_SECONDS = 60.0
"""After so long without progress nothing more is tried: some drivers repeat each attempt for many seconds themselves."""

PROGRESS_BYTES = 2**16
"""A broken answer that brought so many bytes is no failed attempt."""

_FAULTS = (TypeError, AttributeError, LookupError, AssertionError, ArithmeticError, MemoryError)
_LASTING = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ValueError, ImportError, NotImplementedError),
)
_LASTING_NUMBERS = frozenset({errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG})
_LASTING_NAMES = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError", "LocalTokenNotFoundError"}
)
_PASSING_STATUS = frozenset({408, 409, 421, 425, 429})


class GivenUp(RetryError):
    """What is not tried any more.

    Attributes:
        waited: the seconds that it was waited for because the server asked.
    """

    waited = 0.0


def repeat(
    call: Callable[[], T],
    *,
    lasts: Callable[[BaseException], bool],
    stop: Callable[[RetryCallState], bool],
    first_delay: float = FIRST_DELAY,
    stopped: Event | None = None,
    progressed: Callable[[], bool] = lambda: False,
    queued: Callable[[], float] = lambda: 0.0,
) -> T:
    """Call, and call again while the fault may pass: after growing delays, or as long as the server asks for.

    Args:
        call: the function to call.
        lasts: tells of an error whether it comes again.
        stop: when to give up, by tenacity's rules.
        first_delay: seconds before the second attempt, doubled each time up to 10 s.
        stopped: ends a delay, and all that is tried, when it is set.
        progressed: tells after a failed attempt whether it brought something; attempts and time then count anew.
        queued: seconds that the last attempt waited for a free place; they do not count as time without progress.

    Waits that the server asks for come to `LONGEST_WAIT` at most, counted anew after progress as well. Raises what lasts as it is,
    and GivenUp, which holds the last attempt, for the rest.
    """
    ended = Event() if stopped is None else stopped
    growing = wait_exponential(first_delay, LONGEST_DELAY)
    waited = 0.0

    def count(state: RetryCallState) -> None:
        nonlocal waited
        state.start_time += queued()
        if state.attempt_number == 1 or progressed():
            state.attempt_number, state.start_time, waited = 1, time.monotonic(), 0.0

    def delay(state: RetryCallState) -> float:
        return max(growing(state) * random.uniform(0.5, 1.0), asked_to_wait(failure(state)))

    def wait_as_asked(state: RetryCallState) -> None:
        nonlocal waited
        asked = asked_to_wait(failure(state))
        state.start_time, waited = state.start_time + asked, waited + asked

    again = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and not lasts(error)),
        stop=lambda state: ended.is_set() or waited + asked_to_wait(failure(state)) > LONGEST_WAIT or stop(state),
        wait=delay,
        after=count,
        before_sleep=wait_as_asked,
        sleep=lambda seconds: pause(seconds, ended),
        retry_error_cls=GivenUp,
    )
    try:
        return again(call)
    except GivenUp as error:
        error.waited = waited
        raise


def pause(seconds: float, stopped: Event) -> None:
    """Wait, until `stopped` is set at the longest."""
    stopped.wait(seconds)


def failure(attempt: RetryCallState | RetryError) -> BaseException | None:
    """Return what the last attempt failed by."""
    outcome = attempt.last_attempt if isinstance(attempt, RetryError) else attempt.outcome
    return outcome.exception() if outcome is not None else None


class Stopped(Exception):
    """Ends a call in its thread at its next attempt or piece, where another has failed or the user has interrupted."""


def side_by_side(calls: Sequence[Callable[[], T]], most: int, stopped: Event) -> list[T]:
    """Make calls on so many threads; the first fault sets `stopped`, at which the others are to end, and is raised."""
    pool = ThreadPoolExecutor(most, thread_name_prefix="eigenzoo-remote")
    futures: list[Future[T]] = []
    try:
        futures += [pool.submit(call) for call in calls]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        if not all(future.done() for future in futures):
            stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
    faults = [fault for future in futures if not future.cancelled() and (fault := future.exception())]
    if faults:
        raise min(faults, key=lambda fault: isinstance(fault, Stopped))
    return [future.result() for future in futures]


class Job(ABC):
    """A piece of work that may have to be done in several attempts."""

    url: str

    @abstractmethod
    def run(self) -> bool:
        """Do it, or what is left of it; returns whether it is done."""

    def size(self) -> int:
        """Bytes that it still asks for."""
        return 0


class Call(Job):
    """A call whose answer is kept in `value`."""

    def __init__(self, url: str, call: Callable[[], Any]) -> None:
        self.url, self._call = url, call
        self.value: Any = None

    def run(self) -> bool:
        """Call."""
        self.value = self._call()
        return True


class _CutShort(Exception):
    """An answer ended before its time."""


class _Gate:
    """Lets in so many attempts, and bytes, at a time."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._jobs = self._bytes = 0

    @contextmanager
    def passed(self, size: int) -> Iterator[None]:
        """Wait until there is room for an attempt of so many bytes, and keep it."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._jobs or (self._jobs < MAX_JOBS and self._bytes + size <= MAX_BYTES)
            )
            self._count(1, size)
        try:
            yield
        finally:
            with self._changed:
                self._count(-1, -size)
                self._changed.notify_all()

    def _count(self, jobs: int, size: int) -> None:
        self._jobs, self._bytes = self._jobs + jobs, self._bytes + size


def run_jobs(jobs: Sequence[Job], *, attempts: int = ATTEMPTS) -> list[EigenzooError | None]:
    """Run jobs until each is done or has failed for good; returns each one's error, None for those that are done."""
    if not jobs:
        return []
    gate, stopped = _Gate(), Event()
    stop = stop_after_attempt(attempts) | stop_after_delay(GIVE_UP_SECONDS)
    pool = ThreadPoolExecutor(min(MAX_THREADS, len(jobs)), thread_name_prefix="eigenzoo-remote")
    try:
        futures = [pool.submit(_finish, job, gate, stopped, stop) for job in jobs]
        return [_error_of(job, future.exception()) for job, future in zip(jobs, futures, strict=True)]
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _finish(job: Job, gate: _Gate, stopped: Event, stop: stop_base) -> None:
    """Run a job until it is done; it keeps its place at the gate while it runs, and not while it waits."""
    before, queued = 0, 0.0

    def attempt() -> None:
        nonlocal before, queued
        before, began = job.size(), time.monotonic()
        with gate.passed(before):
            queued = time.monotonic() - began
            if not stopped.is_set() and not job.run():
                raise _CutShort("answers are cut short")

    repeat(
        attempt,
        lasts=_lasts,
        stop=stop,
        stopped=stopped,
        progressed=lambda: before - job.size() >= PROGRESS_BYTES,
        queued=lambda: queued,
    )


def _error_of(job: Job, error: BaseException | None) -> EigenzooError | None:
    """Return the error that a job ends with, None where it is done; raises faults of this program."""
    if error is None or isinstance(error, EigenzooError):
        return error
    if isinstance(error, _FAULTS) or not isinstance(error, Exception):
        raise error
    if not isinstance(error, GivenUp):
        return _as_error(job, error)
    last, num = failure(error), error.last_attempt.attempt_number
    asked = asked_to_wait(last)
    return FormatError(
        f"cannot be read ({_described(last)}), in {num} attempt{'' if num == 1 else 's'}"
        + (f", and {error.waited:.0f} s of waiting as its store asked" if error.waited else ""),
        where=job.url,
        next_step=f"run it again in {asked:.0f} s, as its store requests"
        if error.waited + asked > LONGEST_WAIT
        else "check the connection and run it again: headers that were read are kept",
    )


def _lasts(error: BaseException) -> bool:
    if isinstance(error, (EigenzooError, *_FAULTS)):
        return True
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in _PASSING_STATUS
    if isinstance(error, _LASTING) and not isinstance(error, JSONDecodeError):
        return True
    if isinstance(error, OSError) and error.args and error.args[0] in _LASTING_NUMBERS:
        return True
    return type(error).__name__ in _LASTING_NAMES


def _as_error(job: Job, error: Exception) -> FormatError:
    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return FormatError("there is no such file", where=job.url, next_step="check the name and the permissions")
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _LASTING_NAMES:
        return FormatError(
            f"may not be read ({_described(error)})",
            where=job.url,
            next_step="set the driver's credentials in its own settings or environment",
        )
    if status in (412, 416):
        return FormatError(
            "the file changed since it was listed",
            where=job.url,
            rule="a model must not change while it is read",
            next_step=OPEN_AGAIN,
        )
    return FormatError(f"cannot be read ({_described(error)})", where=job.url)


def _described(error: BaseException | None) -> str:
    text, name = scrubbed(str(error)), type(error).__name__
    if isinstance(error, _CutShort):
        return text
    return f"{name}: {text}" if text else name


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error or its cause came with, where it has one."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(error, "status", None) or getattr(response, "status_code", None)
        if isinstance(status, int) and status:
            return status
        error = error.__cause__
    return None


def asked_to_wait(error: BaseException | None) -> float:
    """Return for how many seconds the answer that an error or its cause came with asks to wait; 0 where it does not."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        else:
            headers = getattr(error, "headers", None) or getattr(response, "headers", None)
        asked = {str(name).lower(): value for name, value in (headers or {}).items()}.get("retry-after")
        if asked is not None:
            return _seconds(str(asked))
        error = error.__cause__
    return 0.0


def _seconds(asked: str) -> float:
    """Read a Retry-After: a number of seconds, or a date."""
    try:
        seconds = float(asked) if asked.strip().isdecimal() else parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, seconds)
