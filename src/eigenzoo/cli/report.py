"""`eigenzoo report ZOO|BUNDLE -o FILE`: write the evidence as a page, a table, or figures."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import as_json, progress_bar, say
from eigenzoo.cli.evaluate import load_metric
from eigenzoo.cli.evidence import Axes, Rank, Suitability
from eigenzoo.errors import UsageError

if TYPE_CHECKING:
    from eigenzoo.zoo.zoo import Zoo

FIGURES = ("png", "svg")
KIND_OF_FIGURES = "figures"
"""Kind of output in the record of a folder of figures; see `formats.output.own`."""

FORMATS = ("html", "md", "json", "csv", *FIGURES)


def command(
    zoo: options.ZooOrBundleArgument,
    output: Annotated[
        Path,
        options.output(
            "The file to write, such as report.html; its suffix names the format. With --format png or svg, a folder of figures."
        ),
    ],
    opening: options.Opening,
    running: options.Running,
    format: Annotated[
        str | None,
        typer.Option(
            help="Format: html (a page), md (text and tables), csv (every number), json (the document), png or svg (a folder "
            "with every figure). Default: the suffix of --output.",
            show_default=False,
        ),
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            help="Width of the figures in centimetres, from 6 to 100, for png and svg. 8.5 fits a column of a journal. "
            "Default: 11 to 16.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[str | None, options.METRIC] = None,
    metric_arg: options.MetricArg = None,
    models: options.HeldOutModels = None,
    parent: options.Parent = None,
    axes: Axes = None,
    rank: Rank = None,
    center: options.Center = "models",
    suitability: Suitability = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the evidence as one page, as tables (csv, json, md) or as figures for a paper (png, svg)."""
    import eigenzoo as ez
    from eigenzoo import report as pages
    from eigenzoo.evidence.presentation import present
    from eigenzoo.formats.remote.address import shown_url

    chosen = choose_format(output, format)
    check_width(width, chosen)
    check_output(output, chosen, force)
    pages.require(chosen)
    rank_rule, sides = options.parse_rule(rank), options.parse_axes(axes) or ()
    measure = None if metric is None else load_metric(metric, metric_arg)
    with progress_bar(quiet=quiet) as progress, running.workers() as workers:
        source = opening.zoo_or_bundle(zoo, progress)
        if measure is not None and not isinstance(source, ez.Subspace):
            raise UsageError(
                "--metric does not apply to a zoo",
                rule="models are rebuilt from a bundle",
                next_step="run `eigenzoo fit` and name the bundle",
            )
        evidence = ez.evidence(
            source,
            axes=sides,
            rank=rank_rule,
            center=center,
            seed=seed,
            suitability=suitability,
            workers=workers,
            cache=running.cache,
            progress=progress,
        )
        plan = None
        if not isinstance(source, ez.Subspace):
            plan = ez.plan(
                source,
                axes=None if with_sides(source, sides) else ("models",),
                workers=workers,
                cache=running.cache,
                progress=progress,
            )
        function = None
        if measure is not None and isinstance(source, ez.Subspace):
            held_out = source.open(models, allow_pickle=opening.allow_pickle) if models else None
            function = ez.evaluate(source, measure, held_out, parent=parent, seed=seed, progress=progress)
    document = present(
        evidence,
        source,
        title=Path(shown_url(zoo[0])).resolve().name,
        command=shlex.join(["eigenzoo", *(shown_url(word) for word in sys.argv[1:])]),
        date=date.today().isoformat(),
        function=function,
        plan=plan,
    )
    written = write(document, output, chosen, force, width)
    say(evidence.verdict.text)
    say(f"{written}: {output}")


def with_sides(zoo: Zoo, sides: Sequence[str]) -> bool:
    """Whether the report compares the sides too: of small adapters, whose factors are read fast, and where they are asked for."""
    from eigenzoo.subspace.fitting.tucker_fit import LARGEST_HELD_OUT

    small = all(max(layer.shape) <= LARGEST_HELD_OUT for layer in zoo.layers.values())
    return bool(sides) or (zoo.view == "update" and small)


def choose_format(output: Path, chosen_format: str | None) -> str:
    """Return the given format, else that of the file's suffix.

    >>> choose_format(Path("zoo.md"), None)
    'md'
    """
    if chosen_format is None and not output.suffix:
        raise UsageError(
            "the output has no suffix, so its format is unknown",
            where=f"--output {output}",
            next_step=f"write {output}.html for a page, or add --format png for a folder of figures",
        )
    chosen = chosen_format if chosen_format is not None else output.suffix.lstrip(".").lower()
    chosen = {"htm": "html", "markdown": "md"}.get(chosen, chosen)
    if chosen not in FORMATS:
        raise UsageError(
            f"{chosen!r} is not a format of a report", where=str(output), rule=f"the formats are {', '.join(FORMATS)}"
        )
    return chosen


def check_width(width: float | None, format: str) -> None:
    """Raise for a width out of range, or for a format without a width, before any work."""
    from eigenzoo.report import check_width as check_range

    if width is None:
        return
    if format not in FIGURES:
        raise UsageError(f"--width with format {format}", rule="only png and svg figures have a width")
    check_range(width)


def check_output(output: Path, format: str, force: bool) -> None:
    """Raise for an output that exists, before any work."""
    from eigenzoo.formats.output.own import recorded
    from eigenzoo.formats.output.whole import check_free, check_free_file
    from eigenzoo.report.recognising import is_report

    if format in FIGURES:
        check_free(output, force=force, foreign=recorded(KIND_OF_FIGURES))
    else:
        check_free_file(output, force=force, own=partial(is_report, format=format))


def write(document: Mapping[str, Any], output: Path, format: str, force: bool, width: float | None = None) -> str:
    """Render a document, write it completely or not at all, and print the path."""
    from eigenzoo import report as pages
    from eigenzoo.formats.output.own import recorded, write_record
    from eigenzoo.formats.output.whole import new_folder, write_file
    from eigenzoo.report.recognising import is_report

    if format in FIGURES:
        with new_folder(output, force=force, foreign=recorded(KIND_OF_FIGURES)) as folder:
            figures = pages.write_figures(document, folder, (format,), width)
            write_record(folder, KIND_OF_FIGURES)
        return f"{len(figures)} {format} figures"
    render = {"html": pages.render_html, "md": pages.render_markdown, "csv": pages.render_csv, "json": as_json}
    write_file(output, render[format](document), force=force, own=partial(is_report, format=format))
    return f"report ({format})"
