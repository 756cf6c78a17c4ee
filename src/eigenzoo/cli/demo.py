"""`eigenzoo demo`: train a zoo and run the whole loop on it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eigenzoo.cli import fit as fit_command
from eigenzoo.cli import inspect as inspect_command
from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.display import in_percent
from eigenzoo.records import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eigenzoo import Coefficients
    from eigenzoo.evidence.function import FunctionEvidence

HELD_OUT = 6
"""One of this many models is held out of the fit."""

SCORES = ("original", "rebuilt", "mean", "parent", "random_basis")


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: zoo, bundle and report.")] = Path(
        "demo"
    ),
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of zoo: digits-vit (fine-tunes of one parent) or digits-lora (adapters of one parent)."
        ),
    ] = "digits-vit",
    num_models: options.NumModels = None,
    rank: Annotated[int, typer.Option(help="Number of directions per layer.")] = 16,
    seed: options.Seed = 0,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a small zoo, fit most of it, rebuild and measure the held-out models, and write a report with the verdict."""
    import eigenzoo as ez
    from eigenzoo import nursery
    from eigenzoo.errors import UsageError
    from eigenzoo.evidence.presentation import present
    from eigenzoo.formats.output.whole import new_folder
    from eigenzoo.linalg.rank import check_rule
    from eigenzoo.report import render_html, require

    if kind not in ("digits-vit", "digits-lora"):
        raise UsageError(f"the demo has no kind {kind!r}", rule="it compares with a parent: digits-vit or digits-lora")
    if num_models is not None and num_models < HELD_OUT:
        raise UsageError(f"{num_models} models", rule=f"the demo takes at least {HELD_OUT}, one of which is held out")
    check_rule(rank)
    require("html")
    with new_folder(output, force=force, foreign=foreign_to_a_demo) as folder:
        tell = _silent if json else say
        with progress_bar(quiet=quiet or json) as progress:
            tell(f"1. training a zoo of kind {kind} on handwritten digits: one parent, many two-class tasks")
            nursery.make(kind, folder / "zoo", num_models=num_models, seed=seed, progress=progress)
            zoo = ez.open_zoo(folder / "zoo")
            inspection = ez.inspect(zoo, progress=progress)
        if not json:
            tell("\n2. what is in it")
            # The parent is left out intentionally, and the folder still has its temporary name.
            inspect_command.render(replace(inspection, not_read=()), most=4, most_roles=8)
        held_out = zoo.names[HELD_OUT - 1 :: HELD_OUT]
        fitted = zoo.select(names=[name for name in zoo.names if name not in held_out])
        tell(f"\n3. fitting the shared subspace of {len(fitted)} of them; {len(held_out)} are held out")
        with progress_bar(quiet=quiet or json) as progress:
            ez.fit(fitted, rank=min(rank, len(fitted) - 1), seed=seed, progress=progress).save(folder / "bundle")
            space = ez.load(folder / "bundle")
        if not json:
            fit_command.render(space.report, most=8)
        tell(
            f"\n4. held-out models, never seen by the fit: accuracy on their task's 500 test images, {rank} numbers per layer"
        )
        with progress_bar(quiet=quiet or json) as progress:
            unseen = zoo.select(names=held_out)
            function = ez.evaluate(
                space,
                nursery.metric(folder / "zoo"),
                unseen,
                parent=_parent(kind, folder),
                seed=seed,
                progress=progress,
            )
            rows = _rows(function, space.project_many(unseen))
        if not json:
            _render(rows)
            say(function.sentence)
        tell("\n5. is the subspace real?")
        with progress_bar(quiet=quiet or json) as progress:
            evidence = ez.evidence(space, seed=seed, progress=progress)
            document = present(
                evidence,
                space,
                title=f"{output.name}/bundle",
                command=_report_command(output, kind, held_out, seed),
                date=date.today().isoformat(),
                function=function,
            )
            (folder / "report.html").write_text(render_html(document), encoding="utf-8")
        if json:
            print_json(
                {
                    "kind": kind,
                    "rank": rank,
                    "num_fitted": len(fitted),
                    "heldout": rows,
                    "mean": _averages(rows),
                    "fit": space.report,
                    "verdict": plain(evidence.verdict),
                    "report": str(output / "report.html"),
                }
            )
    if not json:
        say(f"verdict: {evidence.verdict.code}", style="bold")
        say(evidence.verdict.text)
        _what_next(output, held_out[0])
        say(f"\nThe report, with every control and figure: {output}/report.html")


def foreign_to_a_demo(folder: Path) -> str:
    """Return the name of a file in a folder that is not part of a demo, or "". Its bundle may have grown, as the demo suggests."""
    from eigenzoo.formats.output.own import OTHER_KIND, find_stranger, list_files, recorded
    from eigenzoo.nursery.recipe import ZOO
    from eigenzoo.report.recognising import is_report
    from eigenzoo.subspace.bundles.card import foreign_to_a_bundle

    if not (folder / "zoo").is_dir() or not (folder / "bundle").is_dir():
        return OTHER_KIND
    parts = {"zoo": recorded(ZOO), "bundle": foreign_to_a_bundle}
    own = {name for name in list_files(folder) if name.partition("/")[0] in parts}
    foreign_file = find_stranger(folder, {*own, "report.html"})
    for name, foreign in parts.items():
        fault = foreign(folder / name)
        foreign_file = foreign_file or (fault and f"its folder {name!r} {fault}")
    page = folder / "report.html"
    return foreign_file or ("" if not page.exists() or is_report(page, "html") else "holds another 'report.html'")


def _report_command(output: Path, kind: str, held_out: Sequence[str], seed: int) -> str:
    """Return the command that makes the demo's page again."""
    words = [
        "eigenzoo",
        "report",
        f"{output}/bundle",
        "--metric",
        "eigenzoo.nursery:metric",
        "--metric-arg",
        f"{output}/zoo",
    ]
    words += [word for name in held_out for word in ("--models", f"{output}/zoo/{name}")]
    parent = _parent(kind, output)
    words += [] if parent is None else ["--parent", str(parent)]
    words += ["--seed", str(seed), "-o", f"{output}/report.html", "--force"]
    return shlex.join(words)


def _silent(text: str) -> None:
    """Say nothing."""


def _parent(kind: str, folder: Path) -> Path | None:
    """Return the parent of full weights. Adapters name their own."""
    return folder / "zoo" / "_base" if kind == "digits-vit" else None


def _rows(function: FunctionEvidence, projected: Mapping[str, Coefficients]) -> list[dict[str, Any]]:
    """Return for each held-out model the accuracies of original, rebuilt model, mean and parent, and the residual."""
    return [
        {
            "name": name,
            "residual": projected[name].residual,
            "original": measured.original,
            "rebuilt": measured.rebuilt[function.ranks[-1]],
            "mean": measured.mean,
            "parent": measured.parent,
            "random_basis": measured.random_basis[function.ranks[-1]],
        }
        for name, measured in function.models.items()
    ]


def _averages(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in ("residual", *SCORES)}


def _render(rows: list[dict[str, Any]]) -> None:
    averages = {"name": "average", **_averages(rows)}
    print_table(
        "",
        ("model", "original", "rebuilt", "mean only", "parent", "random basis", "energy lost"),
        [
            (row["name"], *(in_percent(row[key]) for key in SCORES), in_percent(row["residual"]))
            for row in (*rows, averages)
        ],
    )
    say(
        "Controls: the mean only (all coefficients zero), and the same number of random directions instead of the subspace. There "
        "are two classes, so guessing scores 50 %."
    )


def _what_next(folder: Path, name: str) -> None:
    if which("eigenzoo"):
        program = "eigenzoo"
    elif Path(sys.argv[0]).name == "__main__.py":  # started as python -m eigenzoo
        program = f"{shlex.quote(sys.executable)} -m eigenzoo"
    else:
        program = sys.argv[0]
    commands = {
        f"plan {folder}/zoo": "compare axes and ranks by error and bytes",
        f"project {folder}/bundle {folder}/zoo/{name}": "print one model's residual; per layer with --json",
        f"add {folder}/bundle {folder}/zoo/{name}": "add one model to the bundle",
        f"demo -o {folder}-lora --kind digits-lora": "run the demo with LoRA adapters",
    }
    say(f"\nEverything is in {folder}/. Try next:")
    for command, purpose in commands.items():
        say(f"  {program} {command:<{max(map(len, commands))}}   {purpose}")
