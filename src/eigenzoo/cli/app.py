"""`eigenzoo`: the commands, and what happens when they fail."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
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
    plan,
    project,
    push,
    rebuild,
    report,
    verify,
)
from eigenzoo.cli.console import complain
from eigenzoo.errors import EigenzooError

INTERRUPTED = 130

ClickException: type[Exception] = next(
    parent for parent in typer.BadParameter.__mro__ if parent.__name__ == "ClickException"
)
"""What typer raises for bad usage: click's own class, or since typer 0.26 that of the click inside it."""

app = typer.Typer(
    name="eigenzoo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find the weight subspace that many models of one architecture share, and use it. "
    "Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eigenzoo {version('eigenzoo')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


app.command("inspect")(inspect.command)
app.command("fit")(fit.command)
app.command("plan")(plan.command)
app.command("evidence")(evidence.command)
app.command("adapt")(adapt.command)
app.command("project")(project.command)
app.command("rebuild")(rebuild.command)
app.command("add")(add.command)
app.command("import")(importing.command)
app.command("verify")(verify.command)
app.command("evaluate")(evaluate.command)
app.command("push")(push.command)
app.command("report")(report.command)
app.command("demo")(demo.command)
app.add_typer(nursery.app, name="nursery")


def main() -> None:
    """Run the command line; deliberate refusals are one message on standard error and exit code 2."""
    # What batch systems send before they kill: then too, temporary folders are removed on the way out.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    code = _run()
    if code == INTERRUPTED:
        complain(
            "interrupted: no output was written; a fit goes on from what it has done when it is run again, and so does adapt"
        )
    sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _run() -> int:
    try:
        # Outside its standalone mode click hands an exit code back instead of leaving with it.
        code = app(prog_name="eigenzoo", standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
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
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
