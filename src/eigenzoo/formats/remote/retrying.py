"""Many jobs at once, each repeated while it may still succeed.

Drivers raise errors of hundreds of classes. What lasts (nothing there, no permission, a request that is wrong) becomes a
FormatError at once; what may pass (a broken connection, a busy server) is tried again with growing, jittered delays.
Errors that only a fault of this program makes are not touched.
"""

from __future__ import annotations

import errno
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from json import JSONDecodeError
from typing import Any

from eigenzoo.errors import EigenzooError, FormatError
from eigenzoo.formats.remote.address import scrubbed

MAX_JOBS, MAX_BYTES = 32, 64 * 2**20
"""How many jobs run at once, and how many bytes they may ask for together."""

ATTEMPTS = 8
FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0
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


class Job(ABC):
    """A piece of work that may have to be done in several attempts."""

    url: str
    misses = 0
    since: float | None = None

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


def run_jobs(
    jobs: Sequence[Job], *, attempts: int = ATTEMPTS, sleep: Callable[[float], None] = time.sleep
) -> list[EigenzooError | None]:
    """Run jobs until each is done or has failed for good; returns each one's error, None for those that are done."""
    errors: dict[int, EigenzooError] = {}
    left = list(enumerate(jobs))
    while left:
        outcomes = _run_once([job for _, job in left])
        again = []
        for (number, job), (before, outcome) in zip(left, outcomes, strict=True):
            if outcome is True:
                continue
            error = _failure(job, before, outcome, attempts)
            if error is None:
                again.append((number, job))
            else:
                errors[number] = error
        left = again
        if left:
            sleep(_delay(max(job.misses for _, job in left)))
    return [errors.get(number) for number in range(len(jobs))]


def _delay(misses: int) -> float:
    longest = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** max(misses - 1, 0))
    return longest * random.uniform(0.5, 1.0)


def _run_once(jobs: Sequence[Job]) -> list[tuple[int, bool | BaseException]]:
    """Run each job once, some at a time; returns each one's size before, and whether it is done or what it raised."""
    pool = ThreadPoolExecutor(min(MAX_JOBS, len(jobs)), thread_name_prefix="eigenzoo-remote")
    try:
        futures: list[tuple[int, Future[bool]]] = []
        running: dict[Future[bool], int] = {}
        for job in jobs:
            size = job.size()
            while running and (len(running) >= MAX_JOBS or sum(running.values()) + size > MAX_BYTES):
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
            future = pool.submit(job.run)
            running[future] = size
            futures.append((size, future))
        return [(size, future.exception() or future.result()) for size, future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _failure(job: Job, before: int, outcome: bool | BaseException, attempts: int) -> EigenzooError | None:
    """Return the error that a job ends with, or None where it is to be tried again."""
    if isinstance(outcome, EigenzooError):
        return outcome
    if isinstance(outcome, BaseException) and (isinstance(outcome, _FAULTS) or not isinstance(outcome, Exception)):
        raise outcome
    if isinstance(outcome, Exception) and _lasts(outcome):
        return _as_error(job, outcome)
    now = time.monotonic()
    if job.since is None or before - job.size() >= PROGRESS_BYTES:
        job.misses, job.since = 0, now
    job.misses += 1
    if job.misses < attempts and now - job.since < GIVE_UP_SECONDS:
        return None
    return FormatError(
        f"cannot be read ({_told(outcome)}), in {job.misses} attempts",
        where=job.url,
        next_step="check the connection and run it again: what was read of headers is kept",
    )


def _lasts(error: BaseException) -> bool:
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
            f"may not be read ({_told(error)})",
            where=job.url,
            next_step="give the driver credentials by its own settings or environment",
        )
    if status in (412, 416):
        return FormatError(
            "the file changed since it was listed",
            where=job.url,
            rule="models are not written to while they are read",
            next_step="open the zoo again",
        )
    return FormatError(f"cannot be read ({_told(error)})", where=job.url)


def _told(outcome: bool | BaseException) -> str:
    if isinstance(outcome, bool):
        return "answers are cut short"
    text = scrubbed(str(outcome))
    return f"{type(outcome).__name__}: {text}" if text else type(outcome).__name__


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error or its cause came with, where it has one."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(error, "status", None) or getattr(response, "status_code", None)
        if isinstance(found, int) and found:
            return found
        error = error.__cause__
    return None
