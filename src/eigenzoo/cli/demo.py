"""`eigenzoo demo`: the whole loop on a zoo that is trained on the spot."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eigenzoo.cli import fit as fit_command
from eigenzoo.cli import inspect as inspect_command
from eigenzoo.cli import options
from eigenzoo.cli.console import in_percent, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from eigenzoo import Coefficients, Subspace
    from eigenzoo.records import Progress

HELD_OUT = 6
"""One model in this many is kept out of the fit."""


def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for everything that the demo makes.")
    ] = Path("demo"),
    kind: Annotated[
        str, typer.Option(help="digits-vit (fine-tunes of one parent) or digits-lora (adapters of one parent).")
    ] = "digits-vit",
    num_models: Annotated[int | None, typer.Option(help="How many models to train.", show_default=False)] = None,
    rank: Annotated[int, typer.Option(help="Directions per layer.")] = 16,
    seed: options.Seed = 0,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a zoo → inspect → fit most of it → project and rebuild the models held out → measure what they can still do."""
    import eigenzoo as ez
    from eigenzoo import nursery
    from eigenzoo.errors import UsageError
    from eigenzoo.formats.output import new_folder
    from eigenzoo.linalg.rank import check_rule

    if kind not in ("digits-vit", "digits-lora"):
        raise UsageError(f"the demo has no kind {kind!r}", rule="it compares with a parent: digits-vit or digits-lora")
    if num_models is not None and num_models < HELD_OUT:
        raise UsageError(f"{num_models} models", rule=f"the demo takes at least {HELD_OUT}, one of which is held out")
    check_rule(rank)
    with new_folder(output, force=force, replaceable=lambda folder: (folder / "zoo" / "zoo.json").is_file()) as folder:
        tell = _silent if json else say
        with progress_bar(quiet=quiet or json) as progress:
            tell(f"1. training a zoo of kind {kind} on handwritten digits: one parent, many two-class tasks")
            nursery.make(kind, folder / "zoo", num_models=num_models, seed=seed, progress=progress)
            zoo = ez.open_zoo(folder / "zoo")
            found = ez.inspect(zoo, progress=progress)
        if not json:
            tell("\n2. what is in it")
            inspect_command.render(found, most=4, most_roles=8)
        held_out = zoo.names[HELD_OUT - 1 :: HELD_OUT]
        fitted = zoo.select(names=[name for name in zoo.names if name not in held_out])
        tell(f"\n3. fitting the shared subspace of {len(fitted)} of them; {len(held_out)} are held out")
        with progress_bar(quiet=quiet or json) as progress:
            space = ez.fit(fitted, rank=min(rank, len(fitted) - 1), seed=seed, progress=progress)
            space.save(folder / "bundle")
            rows = _measure(space, zoo.select(names=held_out), folder, progress)
        report = ez.load(folder / "bundle").report
        if json:
            print_json(
                {
                    "kind": kind,
                    "rank": rank,
                    "num_fitted": len(fitted),
                    "heldout": rows,
                    "mean": _averages(rows),
                    "fit": report,
                }
            )
        else:
            fit_command.render(report, most=8)
            _render(rows, rank)
    if not json:
        _what_next(output, held_out[0])


def _silent(text: str) -> None:
    """Say nothing."""


def _measure(space: Subspace, held_out: Any, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """Rebuild each held-out model, and measure it on its task's test images beside the original, the mean and the parent."""
    from eigenzoo import nursery

    base = folder / "zoo" / "_base"
    rows = []
    for number, (name, coefficients) in enumerate(space.project_many(held_out).items()):
        task = _task(coefficients)
        space.rebuild(coefficients).save(folder / "rebuilt" / name)
        space.rebuild(coefficients, mean_only=True).save(folder / "mean" / name)
        rows.append(
            {
                "name": name,
                "residual": coefficients.residual,
                "original": nursery.accuracy(folder / "zoo" / name, task=task, base=base),
                "rebuilt": nursery.accuracy(folder / "rebuilt" / name, task=task, base=base),
                "mean": nursery.accuracy(folder / "mean" / name, task=task, base=base),
                "parent": nursery.accuracy(base, task=task),
            }
        )
        progress("measuring", number + 1, len(held_out))
    return rows


def _task(coefficients: Coefficients) -> str:
    """The task that the model's own file names."""
    return next(entries["task"] for entries in coefficients.template.metadata.values() if "task" in entries)


def _averages(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        key: sum(row[key] for row in rows) / len(rows) for key in ("residual", "original", "rebuilt", "mean", "parent")
    }


def _render(rows: list[dict[str, Any]], rank: int) -> None:
    say(
        f"\n4. held-out models, never seen by the fit: accuracy on their task's 500 test images, {rank} numbers per layer"
    )
    keys = ("original", "rebuilt", "mean", "parent")
    table = [(row["name"], *(in_percent(row[key]) for key in keys), in_percent(row["residual"])) for row in rows]
    averages = _averages(rows)
    table.append(("average", *(in_percent(averages[key]) for key in keys), in_percent(averages["residual"])))
    print_table("", ("model", "original", "rebuilt", "mean only", "parent", "energy lost"), table)
    say("mean only: the same model with all its numbers set to zero, the control. Two classes: guessing scores 50 %.")


def _what_next(folder: Path, name: str) -> None:
    here = "eigenzoo" if which("eigenzoo") else sys.argv[0]
    commands = {
        f"plan {folder}/zoo": "what other axes and ranks would lose and weigh",
        f"project {folder}/bundle {folder}/zoo/{name}": "one model's residual; layer by layer with --json",
        f"add {folder}/bundle {folder}/zoo/{name}": "one more model for a few numbers",
        f"demo -o {folder}-lora --kind digits-lora": "the same with LoRA adapters",
    }
    say(f"\nEverything is in {folder}/. Try next:")
    for command, purpose in commands.items():
        say(f"  {here} {command:<{max(map(len, commands))}}   {purpose}")
