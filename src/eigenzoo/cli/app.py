"""`eigenzoo`: the commands, and what happens when they fail."""

from __future__ import annotations

import sys

import click
import typer

from eigenzoo.cli import add, demo, fit, inspect, nursery, plan, project, rebuild, verify
from eigenzoo.cli.console import complain
from eigenzoo.errors import EigenzooError

app = typer.Typer(
    name="eigenzoo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find the weight subspace that many models of one architecture share, and use it. "
    "Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input.",
)
app.command("inspect")(inspect.command)
app.command("fit")(fit.command)
app.command("plan")(plan.command)
app.command("project")(project.command)
app.command("rebuild")(rebuild.command)
app.command("add")(add.command)
app.command("verify")(verify.command)
app.command("demo")(demo.command)
app.add_typer(nursery.app, name="nursery")


def main() -> None:
    """Run the command line; deliberate refusals are one message on standard error and exit code 2."""
    try:
        app(standalone_mode=False)
    except click.exceptions.Abort:
        complain("interrupted: nothing was written")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except KeyboardInterrupt:
        complain("interrupted: nothing was written")
        sys.exit(130)
    except EigenzooError as error:
        complain(f"{type(error).__name__}: {error}")
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
