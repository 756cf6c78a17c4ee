"""`eigenzoo`: the commands, and what happens when they fail."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from eigenzoo.cli import (
    adapt,
    add,
    demo,
    evaluate,
    evidence,
    fit,
    importing,
    inspect,
    nursery,
    options,
    plan,
    project,
    push,
    rebuild,
    report,
    verify,
)
from eigenzoo.cli.console import complain
from eigenzoo.cli.examples import epilog
from eigenzoo.errors import EigenzooError

INTERRUPTED = 130

GOES_ON = {
    "fit": "; run the same command again to resume after the finished layers",
    "adapt": "; run the same command again to resume from the last checkpoint",
}
"""What a command does when it is run again after an interruption; all others begin anew."""

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
"""What a terminal, a batch system and a lost connection send to end a command: temporary folders are removed on the way out."""

ClickException: type[Exception] = next(
    parent for parent in typer.BadParameter.__mro__ if parent.__name__ == "ClickException"
)
"""What typer raises for bad usage: click's own class, or since typer 0.26 that of the click inside it."""

app = typer.Typer(
    name="eigenzoo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the weight subspace that many models of one architecture share, and use it.",
    epilog="Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input, 130 interrupted.\n\n"
    "Start with: eigenzoo inspect ZOO, then eigenzoo evidence ZOO.\n\n"
    "Words such as zoo, rank and bundle: docs/glossary.md",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"eigenzoo {version('eigenzoo')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


for name, module in (
    ("inspect", inspect),
    ("fit", fit),
    ("plan", plan),
    ("evidence", evidence),
    ("adapt", adapt),
    ("project", project),
    ("rebuild", rebuild),
    ("add", add),
    ("import", importing),
    ("verify", verify),
    ("evaluate", evaluate),
    ("push", push),
    ("report", report),
    ("demo", demo),
):
    app.command(name, epilog=epilog(name))(options.spread(module.command))
app.add_typer(nursery.app, name="nursery")


def main() -> None:
    """Run the command line; leaves with an exit code.

    Deliberate refusals are one message on standard error and exit code 2. A signal that ends the command gives 128 and its number:
    130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP. What of this process a command changes is given back: the handlers of signals
    and the path of imports.
    """
    path = list(sys.path)
    try:
        with _stopped_by_signals() as received:
            code = _run(received)
    finally:
        sys.path[:] = path
    sys.exit(code)


@contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """Let the signals end the command by KeyboardInterrupt, and give the numbers of those that did; then put the handlers back.

    A signal that the process ignores stays ignored, as `nohup` and jobs in the background want it. Only the main thread has
    handlers: in another one, and where a handler is not Python's own and could not be put back, nothing changes.
    """
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        # Batch systems send two at once: the second must not end the cleaning up that the first began. A second Ctrl-C may.
        # Python drops an exception that is raised in a finalizer, so the third signal raises again.
        if len(received) != 2 or number == signal.SIGINT:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in STOPPING if hasattr(signal, name)):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_IGN, None):
                continue
            before[number] = handler
            signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(received: list[int]) -> int:
    """Say that nothing was written, and what the same command then does; returns the exit code."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    complain("interrupted: no output was written" + GOES_ON.get(command, ""))
    return 128 + (received[0] if received else signal.SIGINT)


def _run(received: list[int]) -> int:
    try:
        # Outside its standalone mode click hands an exit code back instead of leaving with it.
        code = app(prog_name="eigenzoo", standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted(received)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except ClickException as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except EigenzooError as error:
        complain(f"{type(error).__name__}: {error}")
        return 2
    except BrokenPipeError:
        # The reader has gone: what is still buffered must not fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 2
    # Newer versions of typer make this code of a KeyboardInterrupt, whatever the signal was.
    if code == INTERRUPTED:
        return _interrupted(received)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
