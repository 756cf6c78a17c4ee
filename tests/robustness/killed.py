"""Work in a child process that is killed: at a time, or before the n-th call that changes the disk.

A child is forked from a process that has imported everything, so that a kill costs no import.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Work = Callable[[], object]

CHANGES = frozenset({"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.utime"})
"""Audit events of calls that change the disk; so do `open` for writing, and what `_watched` counts besides."""

FAILED = 99


@dataclass(frozen=True)
class Run:
    """How a child ended.

    Attributes:
        killed: whether it was killed.
        num_calls: how many calls changed the disk.
        renames: which of them, by their numbers from 1, changed a name.
        seconds: how long it took.
    """

    killed: bool
    num_calls: int
    renames: list[int]
    seconds: float


def run(work: Work, *, kill_at: int | None = None, kill_after: float | None = None) -> Run:
    """Do the work in a child.

    `kill_at` is the number of the call before which it kills itself, `kill_after` the seconds after which it is killed.
    """
    reading, writing = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _child(work, kill_at, writing)
    os.close(writing)
    # The pipe is readable when the child has come to its end.
    if kill_after is not None and not select.select([reading], [], [], kill_after)[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = os.read(reading, 2**16) or b"[0, []]"
    os.close(reading)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.WEXITSTATUS(status) == 0, f"the child ended with {status}"
    return Run(killed, *json.loads(said), time.perf_counter() - started)


def _child(work: Work, kill_at: int | None, writing: int) -> None:
    """Work, tell how many calls changed the disk, and leave without any of the parent's ends."""
    count, renames = 0, []

    def counted(renaming: bool) -> None:
        nonlocal count
        count += 1
        if renaming:
            renames.append(count)
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    code = FAILED
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        _watch(counted)
        work()
        os.write(writing, json.dumps([count, renames]).encode())
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _watch(counted: Callable[[bool], None]) -> None:
    """Count every call that changes the disk, before it is made."""
    from eigenzoo.formats.output import renaming

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        written = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if event in CHANGES or written:
            counted(event == "os.rename")

    def before(function: Callable[..., Any], renames: bool = False) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            counted(renames)
            return function(*arguments, **options)

        return watched

    # Neither is audited by Python.
    os.fsync, os.pwrite, os.write = before(os.fsync), before(os.pwrite), before(os.write)
    renaming._renameat2 = before(renaming._renameat2, renames=True)
    sys.addaudithook(hook)


def digest(path: Path) -> str | None:
    """A hash of a file or of a folder's names and bytes; None where there is nothing."""
    if not path.exists():
        return None
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        total.update(f"{file.relative_to(path.parent)}\0".encode())
        if file.is_file():
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def hidden(folder: Path) -> list[str]:
    """Names in a folder that begin with a dot."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@contextlib.contextmanager
def arguments(*words: object) -> Iterator[None]:
    """The command line of this process."""
    before = sys.argv
    sys.argv = ["eigenzoo", *map(str, words)]
    try:
        yield
    finally:
        sys.argv = before


def command(*words: object) -> None:
    """Run a command of the command line, which must end well."""
    from eigenzoo.cli.app import main

    with arguments(*words):
        try:
            main()
        except SystemExit as leave:
            if leave.code not in (0, None):
                raise RuntimeError(f"{words} ended with {leave.code}") from None


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code, and what it said on standard error."""

    code: int
    said: str


def answer_of(*commands: Sequence[object], prepare: Work | None = None) -> list[Answer]:
    """Run commands in children, all at once, and return their answers in order; `prepare` is done in each child before."""
    children = []
    ready, go = os.pipe()
    for words in commands:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(ready, 1)  # ends when the parent closes its end
            _answer(words, writing, prepare)
        os.close(writing)
        children.append((child, reading))
    os.close(ready)
    os.close(go)
    answers = []
    for child, reading in children:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
            said = pipe.read()
        answers.append(Answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said))
    return answers


def _answer(words: Sequence[object], writing: int, prepare: Work | None) -> None:
    from eigenzoo.cli.app import main

    code = FAILED
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        sys.stderr = os.fdopen(writing, "w", encoding="utf-8")
        sys.stdout = os.fdopen(1, "w")
        if prepare is not None:
            prepare()
        with arguments(*words):
            main()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else FAILED
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def side_by_side(work: Work) -> Iterator[int]:
    """Yield numbers for as long as a child works; an error of the child is one of this process."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    number, status = 0, (0, 0)
    while status[0] == 0:
        yield number
        number, status = number + 1, os.waitpid(child, os.WNOHANG)
    assert status[1] == 0, f"the child ended with {status[1]}"
