"""`eigenzoo merge MODEL… -o OUT`: merge models into one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.display import counted, in_bytes, in_percent
from eigenzoo.errors import RankError, UsageError

if TYPE_CHECKING:
    from eigenzoo.merge.certificate import Certificate
    from eigenzoo.merge.interference import Interference

ROUNDING = 1e-6
"""Loss that is that of float32 alone."""

MOST_LAYERS = 8
"""Layers that a table lists: those that lose most."""


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="The models: a folder, a glob, several paths, a .txt file of paths, URLs or hub ids; or a bundle and names of "
            "its models.",
            metavar="MODEL... | BUNDLE NAME...",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, options.output("The merged model to write; for models of a bundle, a file of coefficients.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How to merge: mean, linear, task_arithmetic, ties, tsv, … (docs/merge.md lists all).")
    ] = "mean",
    weights: Annotated[
        str | None,
        typer.Option(
            help="A weight per model, in their order: 1,1,-0.5. Default: 1 each. Not for method mean.",
            show_default=False,
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Number that the merged update is multiplied by.")] = 1.0,
    rank: Annotated[
        str,
        typer.Option(
            help="Rank of the merged updates: a number, a share of each layer's energy such as 0.99, or full, which loses nothing.",
            metavar="N|SHARE|full",
        ),
    ] = "full",
    space: Annotated[
        str, typer.Option(help="For methods that work entry by entry: where, in the core, columns, rows or full space.")
    ] = "core",
    keep: Annotated[
        float | None,
        typer.Option(help="Share of the largest entries to keep, for methods that trim.", show_default=False),
    ] = None,
    semantics: Annotated[
        str | None,
        typer.Option(help="Whose definition to follow where they differ: paper, mergekit or peft.", show_default=False),
    ] = None,
    t: Annotated[
        float | None, typer.Option(help="Position between two models, from 0 to 1, for slerp.", show_default=False)
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Share of each update's rank to keep, for tsv.", show_default=False)
    ] = None,
    missing: Annotated[
        str,
        typer.Option(help="Layers that some adapters lack: refuse, or zero (treat them as zero updates)."),
    ] = "refuse",
    check: Annotated[
        bool,
        typer.Option("--check", help="Print what the merge loses and how the models interfere, and write nothing."),
    ] = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge adapters into one adapter, without their base."""
    import eigenzoo as ez
    from eigenzoo.formats.output.own import recorded
    from eigenzoo.formats.output.whole import check_free, check_free_file
    from eigenzoo.formats.remote.hub_bundle import names_a_bundle
    from eigenzoo.merge.merged import MERGED
    from eigenzoo.subspace.coefficient_file import is_coefficient_file

    if output is None and not check:
        raise UsageError("--output is missing", next_step="name a folder with -o, or add --check to write nothing")
    if not models:
        raise UsageError("no models are given", next_step="name two adapters or more")
    given: dict[str, Any] = {"keep": keep, "semantics": semantics, "t": t, "share": share}
    chosen: Any = {name: value for name, value in given.items() if value is not None}
    rank_rule, numbers = parse_rank(rank), parse_weights(weights)
    in_bundle = len(models) > 1 and names_a_bundle(models[0])
    if output is not None and not check:
        if in_bundle:
            check_free_file(output, force=force, own=is_coefficient_file)
        else:
            check_free(output, force=force, foreign=recorded(MERGED))
    interference = None
    with progress_bar(quiet=quiet or json) as progress:
        merged = ez.merge(
            (ez.load(models[0]), models[1:]) if in_bundle else options.one_or_many(models),
            method,
            weights=numbers,
            scale=scale,
            rank=rank_rule,
            space=space,
            missing=missing,
            seed=seed,
            progress=progress,
            **chosen,
        )
        if output is not None and not check:
            merged.save(output, force=force)
    document = merged.certificate.to_dict()
    if json:
        print_json({**document, "output": None if output is None or check else str(output)})
        return
    render(merged.certificate, interference)
    if output is None or check:
        say("nothing was written: --check")
    else:
        say(f"merged: {output}")
        if in_bundle:
            say(f"next: eigenzoo rebuild {models[0]} {output} --like {models[1]} -o MODEL_FOLDER")


def render(certificate: Certificate, interference: Interference | None) -> None:
    """Print the sources with their shares, the layers that lose most, and the loss of the whole."""
    settings = {"semantics": certificate.semantics, "space": certificate.space}
    named = "".join(f", {name} {value}" for name, value in settings.items() if value is not None)
    say(
        f"{counted(len(certificate.models), 'model')}, {counted(len(certificate.layers), 'layer')}, "
        f"method {certificate.method}{named}, scale {certificate.scale:g}"
    )
    outside = any(source.outside is not None for source in certificate.models.values())
    print_table(
        "",
        ("model", "weight", "norm", "kept", *(["outside"] if outside else [])),
        [
            (
                name,
                f"{source.weight:g}",
                f"{source.norm:.4g}",
                in_percent(source.kept),
                *([in_percent(source.outside)] if outside else []),
            )
            for name, source in certificate.models.items()
        ],
    )
    say("kept: how much of each model's own update the merged one applies. 100 % is the model alone.")
    if outside:
        say("outside: the share of the model's energy outside the subspace. The merge never had it.")
    for warning in certificate.warnings:
        say(f"warning: {warning}")
    ranks = [layer.rank for layer in certificate.layers.values()]
    spread = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    if certificate.loss.frobenius > ROUNDING:
        worst = sorted(certificate.layers.items(), key=lambda item: -item[1].loss)[:MOST_LAYERS]
        print_table(
            "layers that lose most",
            ("layer", "rank", "loss"),
            [(name, layer.rank, in_percent(layer.loss)) for name, layer in worst],
        )
    loss = certificate.loss
    lost = (
        "nothing is lost but the rounding of the file"
        if loss.frobenius <= ROUNDING
        else f"the file loses {in_percent(loss.frobenius)} of the exact merge's norm, {in_percent(loss.spectral)} of its largest "
        "singular value"
    )
    say(f"rank {spread}, {in_bytes(certificate.bytes)} · {lost}")


def parse_weights(text: str | None) -> list[float] | None:
    """Read one weight per model.

    >>> parse_weights("1,1,-0.5")
    [1.0, 1.0, -0.5]
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{text[:60]!r} has no weights", where="--weights", rule="weights are numbers with commas, such as 1,1,-0.5"
        ) from None


def parse_rank(text: str) -> int | float | str:
    """Read the rank of a merged update.

    >>> parse_rank("16"), parse_rank("0.99"), parse_rank("full")
    (16, 0.99, 'full')
    """
    if text == "full":
        return text
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise RankError(
            f"{text[:40]!r} is not a rank", where="--rank", rule="it is a number, a share such as 0.99, or full"
        ) from None
