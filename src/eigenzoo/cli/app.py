"""`eigenzoo`: register the commands, and handle their errors."""

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
    merge,
    nursery,
    options,
    plan,
    project,
    push,
    rebuild,
    report,
    route,
    serve,
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
"""Sentences on how a command continues after an interruption. All others start from the beginning."""

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals by which a terminal, a batch system and a lost connection end a command. Temporary folders are removed."""

ClickException: type[Exception] = next(
    parent for parent in typer.BadParameter.__mro__ if parent.__name__ == "ClickException"
)
"""typer's exception for bad usage: click's own class, or since typer 0.26 that of its internal click."""

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
    """Define the options of the command itself."""


for name, module in (
    ("inspect", inspect),
    ("fit", fit),
    ("plan", plan),
    ("evidence", evidence),
    ("adapt", adapt),
    ("project", project),
    ("rebuild", rebuild),
    ("merge", merge),
    ("add", add),
    ("route", route),
    ("serve", serve),
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
    """Run the command line and exit with its code.

    An error of eigenzoo is one message on standard error and exit code 2. A signal gives 128 plus its number: 130 for SIGINT, 143
    for SIGTERM, 129 for SIGHUP. Signal handlers and the import path are restored.
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
    """Convert the signals to KeyboardInterrupt, yield the numbers of received ones, and restore the handlers afterwards.

    A signal that the process ignores stays ignored, as for `nohup` and background jobs. Handlers are changed only in the main
    thread, and only if they are Python's own and can be restored.
    """
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        # Batch systems send two signals at once, and the second must not stop the clean-up after the first. A second Ctrl-C may.
        # Python drops an exception in a finalizer, so the third signal raises again.
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
    """Print that nothing was written, and what the same command will do. Return the exit code."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    complain("interrupted: no output was written" + GOES_ON.get(command, ""))
    return 128 + (received[0] if received else signal.SIGINT)


def _run(received: list[int]) -> int:
    try:
        # Outside its standalone mode click returns an exit code instead of exiting.
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
        # The reader of the output is gone. Buffered output must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 2
    # Newer versions of typer convert a KeyboardInterrupt to this code for any signal.
    if code == INTERRUPTED:
        return _interrupted(received)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
