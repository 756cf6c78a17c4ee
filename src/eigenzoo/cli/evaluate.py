"""`eigenzoo evaluate BUNDLE --metric module:function`: measure rebuilt models."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.display import counted
from eigenzoo.errors import EigenzooError, UsageError

if TYPE_CHECKING:
    from eigenzoo.evidence.function import FunctionEvidence


def command(
    bundle: options.BundleArgument,
    metric: Annotated[str, options.METRIC],
    metric_arg: options.MetricArg = None,
    models: options.HeldOutModels = None,
    parent: options.Parent = None,
    base: options.Base = None,
    ranks: Annotated[
        str | None,
        typer.Option(help="Ranks at which to rebuild, comma-separated. Default: powers of two.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    max_memory: options.MaxMemory = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure held-out models with your own metric: original, rebuilt, and the controls (mean, head alone, random basis)."""
    import eigenzoo as ez

    chosen = parse_ranks(ranks)
    num_bytes = options.parse_bytes(max_memory, "--max-memory")
    # A module or metric that prints must not print into the document.
    with (
        contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext(),
        progress_bar(quiet=quiet or json) as progress,
    ):
        measure = load_metric(metric, metric_arg)
        space = ez.load(bundle, base=base)
        held_out = space.open(models, allow_pickle=allow_pickle) if models else None
        measured = ez.evaluate(
            space,
            measure,
            held_out,
            ranks=chosen,
            parent=parent,
            seed=seed,
            device=device,
            max_memory=num_bytes,
            progress=progress,
        )
    if json:
        print_json(measured.to_dict())
    else:
        render(measured)


def render(measured: FunctionEvidence) -> None:
    """Print every variant's average and standard error, and the conclusion."""
    kind, whose = ("held-out model", "") if measured.heldout else ("model", ", not all held out")
    say(
        f"{measured.metric} of {counted(measured.num_models, kind)}{whose}; "
        f"the subspace was fitted to {counted(measured.num_fitted, 'model')}"
    )
    print_table(
        "",
        ("variant", "average", "± standard error"),
        [(name, _number(mean), _number(error)) for name, mean, error in measured.averages],
    )
    say(
        "parent: the model before fine-tuning (of adapters: the base without an update). mean only: the zoo's mean. head only: the "
        "parent, or the mean, with the model's own head. random basis: as many random directions about the mean. without the "
        "first: rebuilt from the other directions. cut alone: without sharing, by the model's own SVD. –: not measured (no "
        "parent is known, or all heads agree)."
    )
    say(f"\n{measured.sentence}")


def parse_ranks(text: str | None) -> list[int] | None:
    """Read a comma-separated list of ranks.

    >>> parse_ranks("1, 4,16")
    [1, 4, 16]
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(f"{text!r} is not a list of ranks", where="--ranks", rule="write 1,4,16")
    return [int(part) for part in parts]


def load_metric(text: str, argument: str | None) -> Any:
    """Import module:function, first from the working folder. If it has an argument, call it once to get the metric."""
    module_name, _, function_name = text.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"{text!r} does not name a function", where="--metric", rule="write module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    target = _called(
        f"module {module_name!r} cannot be imported",
        importlib.import_module,
        module_name,
        f"run the command in the folder with {module_name.replace('.', '/')}.py",
    )
    for part in function_name.split("."):
        if not hasattr(target, part):
            raise UsageError(
                f"module {module_name!r} has no {function_name!r}",
                where="--metric",
                next_step=f"name a function of {getattr(target, '__file__', None) or 'it'}",
            )
        target = getattr(target, part)
    if argument is not None:
        target = _called(f"{text} failed for {argument!r}", target, argument)
    if not callable(target):
        raise UsageError(
            f"{text} is not a function", where="--metric", rule="a metric is called with the path of a model"
        )
    return target


def _called(what: str, function: Any, argument: str, absent: str = "") -> Any:
    """Call the user's code. Its errors are reported as errors of that code."""
    try:
        return function(argument)
    except EigenzooError:
        raise
    except (Exception, SystemExit) as error:
        # The missing module is one that the user's module imports.
        missing = isinstance(error, ModuleNotFoundError) and error.name == argument
        raise UsageError(
            f"{what} ({type(error).__name__}: {error})", where="--metric", next_step=absent if missing else ""
        ) from error


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
