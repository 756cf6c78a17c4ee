"""`eigenzoo fit ZOO -o BUNDLE`: fit models and save a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Any

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.cli.left_behind import say_hidden, say_left_files
from eigenzoo.display import counted, in_bytes, in_percent
from eigenzoo.records import plain, weighted_share
from eigenzoo.weights.roles import role

SHARES = ("mean_energy", "captured", "heldout", "null", "residual")


def command(
    zoo: options.ZooArgument,
    output: options.BundleOutput,
    opening: options.Opening,
    running: options.Running,
    rank: options.Rank = None,
    axes: options.Axes = None,
    center: options.Center = "models",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Largest size of the whole bundle, such as 20MB. The ranks with the smallest error are chosen.",
            show_default=False,
        ),
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Largest share of the energy to lose, such as 0.05.", show_default=False)
    ] = None,
    core_rank: options.CoreRank = None,
    dtype: options.Dtype = "float32",
    coefficients_dtype: options.CoefficientsDtype = "float32",
    solver: options.Solver = "exact",
    precision: options.Precision = "default",
    seed: options.Seed = 0,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit a shared subspace to a zoo and save it as a bundle, with every model's coefficients."""
    import eigenzoo as ez
    from eigenzoo.formats.output.whole import check_free
    from eigenzoo.subspace.bundles.card import foreign_to_a_bundle
    from eigenzoo.subspace.fitting.alone import against_alone
    from eigenzoo.subspace.fitting.options import resolve_options
    from eigenzoo.zoo.left_files import left_files

    check_free(output, force=force, foreign=foreign_to_a_bundle)
    rank_rule, chosen, num_bytes, cores = (
        options.parse_rank(rank),
        options.parse_axes(axes),
        options.parse_bytes(budget, "--budget"),
        options.parse_core_rank(core_rank),
    )
    # Options that contradict each other are refused before the zoo is opened.
    resolve_options(
        rank_rule, chosen, center, dtype, num_bytes, max_error, seed, solver, precision, coefficients_dtype, cores
    )
    with (
        progress_bar(quiet=quiet or json) as progress,
        running.workers() as workers,
    ):
        opened = opening.zoo(zoo, progress)
        output.parent.mkdir(parents=True, exist_ok=True)
        space = ez.fit(
            opened,
            rank_rule,
            chosen,
            center=center,
            dtype=dtype,
            coefficients_dtype=coefficients_dtype,
            budget=num_bytes,
            max_error=max_error,
            seed=seed,
            solver=solver,
            precision=precision,
            core_rank=cores,
            workers=workers,
            cache=running.cache,
            progress=progress,
            workspace=output.parent,
        )
        space.save(output, force=force)
    # The bundle does not store the duration: the same zoo gives the same bundle, to the byte.
    report = {**ez.load(output).report, **{key: space.report[key] for key in ("seconds", "peak_memory")}}
    left = left_files(opened.models)
    if json:
        beside = against_alone(report)
        report["against_alone"] = None if beside is None else plain(beside)
        print_json({**report, "not_carried": plain(left), "not_read": list(opened.hidden)})
        return
    render(report)
    say_left_files(left, len(opened))
    say_hidden(opened.hidden)
    say(f"bundle: {output}")


def render(report: Mapping[str, Any], most: int = 100) -> None:
    """Print a fit by role: in-sample and held-out share, the null, and the mean's energy."""
    say(
        f"{counted(report['num_models'], 'model')}, {counted(report['num_layers'], 'layer')}, "
        f"view {report['view']}, axes {', '.join(report['axes'])}, "
        f"center {report['center']}"
    )
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, layer in report["layers"].items():
        groups.setdefault(role(name), []).append(layer)
    largest = sorted(groups, key=lambda name: -sum(prod(layer["shape"]) for layer in groups[name]))[:most]
    shown = {name: layers for name, layers in groups.items() if name in largest}
    shown["all layers"] = list(report["layers"].values())
    print_table(
        "by role" if len(largest) == len(groups) else f"the {len(largest)} largest of {len(groups)} roles",
        ("role", "layers", "rank", "mean's energy", "variance kept", "… held out", "… null", "lost"),
        [
            (name, len(layers), _ranks(layers), *(in_percent(weighted_share(layers, key)) for key in SHARES))
            for name, layers in shown.items()
        ],
    )
    say(
        "mean's energy and lost: shares of all energy. variance kept: share of the variance about the mean, in-sample; "
        "held out: for models left out of the fit; null: for unrelated models with the same norms, in-sample: "
        "compare it with variance kept."
    )
    for note in sorted({layer["note"] for layer in report["layers"].values() if layer["note"]}):
        count = sum(layer["note"] == note for layer in report["layers"].values())
        alone = (
            " in one model: a subspace needs two or more" if note == "no variance" and report["num_models"] == 1 else ""
        )
        say(f"note: {count} of {report['num_layers']} layers: {note}{alone}")
    _render_rest(report)


def _render_rest(report: Mapping[str, Any]) -> None:
    for first, second in report["duplicates"][:10]:
        say(f"duplicates in function: {first} and {second}")
    if len(report["duplicates"]) > 10:
        say(f"… and {len(report['duplicates']) - 10} more pairs of duplicates")
    for item in report["left_out"][:10]:
        say(f"carried unchanged: {item['tensor']} ({item['reason']})")
    if len(report["left_out"]) > 10:
        say(f"… and {len(report['left_out']) - 10} more tensors carried unchanged")
    for skipped in report["skipped"]:
        say(f"skipped: {skipped['path']}: {skipped['reason']}")
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    render_bytes(report["bytes"])
    lost = f"lost: {in_percent(report['residual'])} of all energy, in-sample"
    # Only available right after fitting: a bundle does not store them.
    if "seconds" in report:
        lost += f" · {report['seconds']:.1f} s · peak memory {in_bytes(report['peak_memory'])}"
    say(lost)
    _render_alone(report)


def _render_alone(report: Mapping[str, Any]) -> None:
    """Print the bundle beside models that are cut alone."""
    from eigenzoo.subspace.fitting.alone import against_alone

    if report["residual"] <= 0 or "imported" in report or "growth" in report:
        return
    beside = against_alone(report)
    if beside is None:
        if report["num_models"] > 1 and report["view"] in ("weight", "delta"):
            say(
                "without sharing: not measured (each model cut alone by its own SVD; weights this large would take minutes)"
            )
        return
    say(f"without sharing: {' '.join(beside.sentences)}")


def render_bytes(sizes: Mapping[str, Any]) -> None:
    """Print the bytes of the analysed layers and of the whole bundle, and from how many models on it is smaller."""
    print_table(
        "",
        ("bytes", "zoo", "bundle", "ratio"),
        [
            (
                "analysed layers",
                in_bytes(sizes["zoo"]),
                in_bytes(sizes["bundle"]),
                f"{sizes['zoo'] / max(sizes['bundle'], 1):.2f}×",
            ),
            (
                "whole",
                in_bytes(sizes["whole_zoo"]),
                in_bytes(sizes["whole_bundle"]),
                f"{sizes['whole_zoo'] / max(sizes['whole_bundle'], 1):.2f}×",
            ),
        ],
    )
    if sizes["whole_bundle"] > sizes["whole_zoo"]:
        say(
            "note: this bundle is larger than the models' files. `eigenzoo plan ZOO` lists axes and ranks with their bytes."
        )
    even = sizes["break_even_models"]
    say(
        f"one more model: {in_bytes(sizes['per_model'])} · "
        + (
            f"the bundle is smaller than the models' files from {counted(even, 'model')} on"
            if even is not None
            else "the bundle is never smaller than the models' files"
        )
        + f" · moments, not counted: {in_bytes(sizes['moments'])}"
    )


def _ranks(layers: Sequence[Mapping[str, Any]]) -> str:
    """Write the rank of each axis, as a range if layers differ."""
    parts = []
    for axis in layers[0]["rank"]:
        ranks = sorted({layer["rank"][axis] for layer in layers})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        parts.append(shown if len(layers[0]["rank"]) == 1 else f"{axis} {shown}")
    return ", ".join(parts)
