"""`eigenzoo import FOLDER… -o BUNDLE`: convert another tool's subspace to a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, progress_bar, say
from eigenzoo.cli.fit import render_bytes
from eigenzoo.display import counted


def command(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="A folder saved by vLoRA; or adapters with components and loadings, or a folder of them.",
            metavar="FOLDER...",
            show_default=False,
        ),
    ],
    output: options.BundleOutput,
    like: Annotated[
        Path | None,
        typer.Option(
            help="One of the original adapters, or its adapter_config.json. It provides the scale, the names, and all tensors "
            "that are not factors.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="The adapters' alpha, instead of --like. alpha = rank gives a scale of 1.", show_default=False
        ),
    ] = None,
    components: Annotated[
        Path | None,
        typer.Option(help="File with the components, for adapters that have only loadings.", show_default=False),
    ] = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert another tool's subspace of LoRA adapters to a bundle, which rebuilds the same adapters as that tool."""
    import eigenzoo as ez
    from eigenzoo.formats.output.whole import check_free
    from eigenzoo.subspace.bundles.card import foreign_to_a_bundle

    check_free(output, force=force, foreign=foreign_to_a_bundle)
    with progress_bar(quiet=quiet or json) as progress:
        output.parent.mkdir(parents=True, exist_ok=True)
        space = ez.import_subspace(
            folders,
            like=like,
            alpha=alpha,
            components=components,
            allow_pickle=allow_pickle,
            workspace=output.parent,
            progress=progress,
        )
        space.save(output, force=force)
    report = ez.load(output).report
    if json:
        print_json(report)
        return
    render(report)
    say(f"bundle: {output}")


def render(report: Mapping[str, Any]) -> None:
    """Print the imported subspace, its warnings, and the bytes."""
    ranks = sorted({rank for layer in report["layers"].values() for rank in layer["rank"].values()})
    directions = counted(ranks[0], "direction") if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]} directions"
    say(
        f"{counted(report['num_models'], 'model')}, {counted(report['num_layers'], 'layer')}, "
        f"view {report['view']}, axes {', '.join(report['axes'])}, "
        f"center {report['center']}, {directions}"
    )
    for first, second in report["duplicates"][:10]:
        say(f"duplicates: {first} and {second}")
    for warning in report["warnings"]:
        say(f"note: {warning}")
    render_bytes(report["bytes"])
