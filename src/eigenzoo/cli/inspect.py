"""`eigenzoo inspect ZOO`: list the contents of a zoo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.cli.left_behind import say_hidden, say_left_files
from eigenzoo.display import counted, in_bytes

if TYPE_CHECKING:
    from eigenzoo.zoo.inspection import Inspection


def command(
    zoo: options.ZooArgument,
    opening: options.Opening,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List models, layers by role, sizes, left-out tensors with reasons, duplicates, and NaN or Inf. Reads everything once.

    Exit code 1 if a value is NaN or Inf.
    """
    import eigenzoo as ez

    with progress_bar(quiet=quiet or json) as progress:
        inspection = ez.inspect(opening.zoo(zoo, progress), progress=progress)
    if json:
        print_json(inspection.to_dict())
    else:
        render(inspection)
    if inspection.num_non_finite:
        raise typer.Exit(1)


def render(inspection: Inspection, most: int = 12, most_roles: int = 100) -> None:
    """Print an inspection as tables. Long lists are truncated and say how many are left out."""
    say(
        f"{counted(inspection.num_models, 'model')}, {counted(inspection.num_layers, 'layer')}, view {inspection.view}: "
        f"{in_bytes(inspection.analysed_bytes)} analysed of {in_bytes(inspection.whole_bytes)} in files"
    )
    zeros = any(model.num_zeros for model in inspection.models)
    print_table(
        "models",
        ("name", "format", "written by", "bytes", "values", "dtypes", "ranks", *(["zero updates"] if zeros else [])),
        [
            (
                model.name,
                model.format,
                model.written_by or "–",
                in_bytes(model.num_bytes),
                f"{model.num_values:,}",
                ", ".join(model.dtypes),
                ", ".join(map(str, model.ranks)) or "–",
                *([model.num_zeros] if zeros else []),
            )
            for model in inspection.models[:most]
        ],
        left=3,
    )
    _more(len(inspection.models), most, "models")
    largest = sorted(range(len(inspection.roles)), key=lambda index: -inspection.roles[index].num_values)[:most_roles]
    print_table(
        "layers of one model",
        ("role", "shape", "unfolding", "dtype", "layers", "values", "bytes", "ranks"),
        [
            (
                row.role,
                f"{row.shape[0]} × {row.shape[1]}",
                row.unfolding,
                row.dtype,
                row.num_layers,
                f"{row.num_values:,}",
                in_bytes(row.num_bytes),
                ", ".join(map(str, row.ranks)) or "–",
            )
            for row in (inspection.roles[index] for index in sorted(largest))
        ],
        left=4,
    )
    _more(len(inspection.roles), most_roles, "roles")
    if inspection.left_out:
        print_table(
            "left out, carried unchanged",
            ("tensor", "why", "models"),
            [(item.tensor, item.reason, item.num_models) for item in inspection.left_out[:most]],
            left=3,
        )
        _more(len(inspection.left_out), most, "tensors")
    _render_faults(inspection)


def _render_faults(inspection: Inspection) -> None:
    from eigenzoo.zoo.runs import say_runs

    say_left_files(inspection.not_carried, inspection.num_models)
    say_hidden(inspection.not_read)
    for skipped in inspection.skipped:
        say(f"skipped: {skipped.path}: {skipped.reason}")
    for group in inspection.duplicates:
        say(f"duplicates (same content): {', '.join(group)}")
    for group in inspection.same_function:
        say(f"duplicates (same function): {', '.join(group)}")
    if inspection.runs:
        say(f"one run: {say_runs(inspection.runs, inspection.num_models)}")
    for model in inspection.models:
        if model.num_non_finite:
            say(f"not finite: {model.num_non_finite} values of {model.name}, in {', '.join(model.non_finite_in[:5])}")
    for warning in inspection.warnings:
        say(f"warning: {warning}")


def _more(count: int, most: int, what: str) -> None:
    if count > most:
        say(f"… and {count - most} more {what}; --json lists all")
