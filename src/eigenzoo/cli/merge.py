"""`eigenzoo merge MODEL… -o OUT`: merge models into one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.display import counted, in_bytes, in_percent
from eigenzoo.errors import RankError, UsageError

if TYPE_CHECKING:
    from eigenzoo.merge.certificate import Certificate
    from eigenzoo.merge.choosing import ChosenMerge
    from eigenzoo.merge.interference import Interference

PER_MODEL = frozenset({"keep", "outliers"})
"""Options of methods that may be one number per model."""

ROUNDING = 1e-6
"""Loss that is that of float32 alone."""

MOST_PAIRS = 10
"""Pairs of models that a table lists: those that overlap most."""

MOST_TRIED = 5
"""Merges that a table lists: those of the best scores."""

MOST_LAYERS = 8
"""Layers that a table lists: those that lose most."""


@dataclass(frozen=True)
class MethodOptions:
    """The options of all methods, by the names that they have in `merge.methods`; None is a method's own default."""

    keep: Annotated[
        str | None,
        typer.Option(
            help="Share of the largest entries to keep, for ties, dare_linear, della and others that trim: 0.3, or one number per "
            "model: 0.3,0.5.",
            show_default=False,
        ),
    ] = None
    semantics: Annotated[
        str | None,
        typer.Option(
            help="Definition of ties, dare and della: paper, mergekit or peft. Default: paper.",
            show_default=False,
        ),
    ] = None
    combine: Annotated[
        str | None,
        typer.Option(
            help="For ties, dare_ties and della: mean or sum of the entries that agree. Default: auto.",
            show_default=False,
        ),
    ] = None
    t: Annotated[
        float | None, typer.Option(help="For slerp: position between two models, from 0 to 1.", show_default=False)
    ] = None
    rounds: Annotated[
        int | None, typer.Option(help="For karcher: largest number of iterations.", show_default=False)
    ] = None
    tolerance: Annotated[
        float | None, typer.Option(help="For karcher: length of a step at which to stop.", show_default=False)
    ] = None
    window: Annotated[
        float | None,
        typer.Option(help="For della: largest difference of a probability from --keep.", show_default=False),
    ] = None
    outliers: Annotated[
        str | None, typer.Option(help="For breadcrumbs: share of the largest entries to drop.", show_default=False)
    ] = None
    share: Annotated[
        float | None, typer.Option(help="For tsv and cart: share of each update's rank to keep.", show_default=False)
    ] = None
    common: Annotated[
        float | None,
        typer.Option(help="For iso_cts: share of directions that all models have in common.", show_default=False),
    ] = None
    strength: Annotated[
        float | None, typer.Option(help="For cart: number that the differences are multiplied by.", show_default=False)
    ] = None
    directions: Annotated[
        int | None, typer.Option(help="For ctm: directions of both sides; 0 keeps all.", show_default=False)
    ] = None
    blend: Annotated[
        float | None, typer.Option(help="For ctm: weight of the updates' norms, from 0 to 1.", show_default=False)
    ] = None
    inside: Annotated[str | None, typer.Option(help="For ctm: ties or sum of the cores.", show_default=False)] = None
    shrink: Annotated[
        float | None,
        typer.Option(
            help="For regmean: number that moments beside the diagonal are multiplied by.", show_default=False
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """Return the options that were given; several numbers as a tuple."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        for name in PER_MODEL & set(values):
            numbers = parse_numbers(values[name], f"--{name}")
            values[name] = numbers[0] if len(numbers) == 1 else numbers
        return values


def command(
    method_options: MethodOptions,
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
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe in mergekit's YAML, instead of models and method: models, base_model, merge_method, parameters, dtype.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How to merge: mean, linear, task_arithmetic, ties, tsv, … (docs/merge.md lists all). With --metric: the methods "
            "to try, comma-separated. Default: mean.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A weight per model, in their order: 1,1,-0.5. Default: 1 each. Not for method mean.",
            show_default=False,
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Number that the merged update is multiplied by.")] = 1.0,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Rank of the merged updates: a number, a share of each layer's energy such as 0.99, or full, which loses nothing. "
            "Default: full; required in space full.",
            metavar="N|SHARE|full",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Largest size of the merged adapter's weights, such as 20MB. Ranks are chosen for all layers together.",
            show_default=False,
        ),
    ] = None,
    space: Annotated[
        str, typer.Option(help="For methods that work entry by entry: where, in the core, columns, rows or full space.")
    ] = "core",
    grams: Annotated[
        Path | None,
        typer.Option(
            help="For regmean: folder with second moments of the inputs, NAME.safetensors for each model (docs/merge.md).",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="For checkpoints: the model that they were fine-tuned from. Their differences from it are merged.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the written weights: float32, float16, bfloat16 or float64. Default: the base's, or the first model's.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        str,
        typer.Option(
            help="Trained heads and biases, which are not merged: refuse adapters that differ in them, take those of the first, or "
            "those of the named model.",
            metavar="refuse|first|NAME",
        ),
    ] = "refuse",
    missing: Annotated[
        str,
        typer.Option(help="Layers that some adapters lack: refuse, or zero (treat them as zero updates)."),
    ] = "refuse",
    metric: Annotated[
        str | None,
        typer.Option(
            help="Choose method, scale and weights by this metric, as module:function. It is called with the path of a model and "
            "'validation' or 'test', and returns a score or scores by task (docs/merge.md).",
            show_default=False,
        ),
    ] = None,
    metric_arg: options.MetricArg = None,
    parent: options.Parent = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="With adapters: draw how their updates overlap, beside unrelated ones, into this .png or .svg file.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Print what the merge loses and how the models interfere, and write nothing."),
    ] = False,
    allow_pickle: options.AllowPickle = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge models into one: adapters without their base, checkpoints with it, models of a bundle by their coefficients."""
    import eigenzoo as ez
    from eigenzoo import report as pages
    from eigenzoo.cli.evaluate import load_metric
    from eigenzoo.formats.output.own import recorded
    from eigenzoo.formats.output.whole import check_free, check_free_file, new_file
    from eigenzoo.formats.remote.hub_bundle import names_a_bundle
    from eigenzoo.merge.choosing import METHODS, choose
    from eigenzoo.merge.files import MERGED
    from eigenzoo.merge.in_bundle import MergedCoefficients
    from eigenzoo.merge.input_grams import read_grams
    from eigenzoo.merge.recipe_merging import merge_recipe
    from eigenzoo.subspace.coefficient_file import is_coefficient_file
    from eigenzoo.weights.views import check_choice

    if output is None and not check:
        raise UsageError("--output is missing", next_step="name a folder with -o, or add --check to write nothing")
    check_choice(missing, ("refuse", "zero"), "missing")
    if bool(models) == (recipe is not None):
        given = "models beside a recipe" if models else "no models are given"
        raise UsageError(given, next_step="name two models or more, or a recipe with --recipe")
    models = models or []
    chosen, num_bytes = method_options.given(), options.parse_bytes(budget, "--budget")
    rank_rule, numbers = parse_rank(rank), None if weights is None else parse_numbers(weights, "--weights")
    in_bundle = len(models) > 1 and names_a_bundle(models[0])
    as_missing, choice = "zero" if missing == "zero" else "error", None
    if metric is not None and (in_bundle or recipe is not None or numbers is not None or scale != 1):
        raise UsageError(
            "--metric beside a bundle, a recipe, --weights or --scale",
            rule="it chooses method, weights and scale of a merge of models' files",
            next_step="leave one of them out",
        )
    if output is not None and not check:
        if in_bundle:
            check_free_file(output, force=force, own=is_coefficient_file)
        else:
            check_free(output, force=force, foreign=recorded(MERGED))
    if picture is not None:
        if picture.suffix not in (".png", ".svg") or in_bundle or recipe is not None or base is not None:
            raise UsageError(
                f"--picture {picture}",
                rule="the updates of adapters are drawn, into a .png or .svg file",
                next_step="leave it out",
            )
        pages.require(picture.suffix[1:])
        check_free_file(picture)
    source: Any = (ez.load(models[0]), models[1:]) if in_bundle else options.one_or_many(models)
    with progress_bar(quiet=quiet or json) as progress:
        moments = None
        if grams is not None and not in_bundle:
            source = ez.open_zoo(source, base=base, missing=as_missing, allow_pickle=allow_pickle, progress=progress)
            moments = read_grams(grams, source.names, {name: layer.shape for name, layer in source.layers.items()})
        common: dict[str, Any] = {
            "rank": rank_rule,
            "budget": num_bytes,
            "dtype": dtype,
            "heads": heads,
            "seed": seed,
        }
        if recipe is not None:
            merged: Any = merge_recipe(recipe, **common, allow_pickle=allow_pickle, progress=progress)
        else:
            if metric is not None:
                source = ez.open_zoo(
                    source, base=base, missing=as_missing, allow_pickle=allow_pickle, progress=progress
                )
                choice = choose(
                    source,
                    load_metric(metric, metric_arg),
                    methods=METHODS if method is None else method.split(","),
                    parent=parent,
                    progress=progress,
                    space=space,
                    grams=moments,
                    **common,
                    **chosen,
                )
                method, numbers, scale = choice.best.method, list(choice.best.weights or ()) or None, choice.best.scale
            merged = ez.merge(
                source,
                method or "mean",
                weights=numbers,
                scale=scale,
                space=space,
                base=None if metric is not None else base,
                missing=missing,
                grams=moments,
                interference=(check or picture is not None) and not in_bundle and base is None,
                allow_pickle=allow_pickle,
                progress=progress,
                **common,
                **chosen,
            )
        if output is not None and not check:
            if isinstance(merged, MergedCoefficients):
                merged.save(output, force=force)
            else:
                merged.save(output, force=force, progress=progress)
    interference = getattr(merged, "interference", None)
    document = merged.certificate.to_dict()
    if picture is not None and interference is not None:
        from eigenzoo.report.interference import draw_interference

        with new_file(picture) as staging:
            staging.write_bytes(draw_interference(interference.to_dict(), picture.suffix[1:]))
    if interference is not None:
        document["interference"] = interference.to_dict()
    if choice is not None:
        document["chosen"] = choice.to_dict()
    if json:
        print_json({**document, "output": None if output is None or check else str(output)})
        return
    if choice is not None:
        _render_choice(choice)
    render(merged.certificate, interference)
    if picture is not None:
        say(f"picture: {picture}")
    if output is None or check:
        say("nothing was written: --check")
    else:
        say(f"merged: {output}")
        if in_bundle:
            say(f"next: eigenzoo rebuild {models[0]} {output} --like {models[1]} -o MODEL_FOLDER")


def _render_choice(choice: ChosenMerge) -> None:
    """Print the best merges that were tried, the controls on the other part of the data, and the verdict."""
    best = sorted(choice.tried, key=lambda candidate: -candidate.score)[:MOST_TRIED]
    say(f"the best of {len(choice.tried)} merges, on the part for validation")
    print_table(
        "",
        ("method", "scale", "weights", "score"),
        [
            (
                each.method,
                f"{each.scale:.3g}",
                "" if each.weights is None else ",".join(f"{weight:g}" for weight in each.weights),
                f"{each.score:.4g}",
            )
            for each in best
        ],
    )
    say("the chosen merge and its controls, on the part for testing")
    print_table(
        "",
        ("model", "score"),
        [(name, f"{scores.mean:.4g}") for name, scores in choice.controls.items()],
    )
    if choice.nai is not None:
        say(f"normalised: {in_percent(choice.nai)} of the way from the base to each model on its own task")
    say(choice.text, style="bold")


def _render_interference(measured: Interference) -> None:
    """Print the figures of interference, each beside that of the null."""
    pairs = [(one, other) for one in range(len(measured.models)) for other in range(one)]
    pairs.sort(key=lambda pair: -measured.outputs[pair[0]][pair[1]])
    say(
        "overlap of two updates (mean squared cosine of principal angles); null: unrelated ones of the same singular values"
    )
    print_table(
        "",
        ("models", "outputs", "null", "inputs", "null"),
        [
            (
                f"{measured.models[other]}, {measured.models[one]}",
                *(
                    in_percent(rows[one][other])
                    for rows in (measured.outputs, measured.null_outputs, measured.inputs, measured.null_inputs)
                ),
            )
            for one, other in pairs[:MOST_PAIRS]
        ],
    )
    say("aligned: share of each update within the merge's leading outputs")
    print_table(
        "",
        ("model", "aligned", "null"),
        [
            (name, in_percent(own), in_percent(null))
            for name, own, null in zip(measured.models, measured.alignment, measured.null_alignment, strict=True)
        ],
    )
    say(
        f"singular task interference: {measured.interference:.3g} (null: {measured.null_interference:.3g}); 0 where updates are "
        "orthogonal"
    )


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
    if interference is not None:
        _render_interference(interference)
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
        else f"the file loses {in_percent(loss.frobenius)} of the exact merge's norm"
        + ("" if loss.spectral is None else f", {in_percent(loss.spectral)} of its largest singular value")
    )
    say(f"rank {spread}, {in_bytes(certificate.bytes)} · {lost}")


def parse_numbers(text: str, option: str) -> list[float]:
    """Read numbers with commas.

    >>> parse_numbers("1,1,-0.5", "--weights")
    [1.0, 1.0, -0.5]
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text[:60]!r} is not a number", where=option, rule="write 0.5, or 1,1,-0.5") from None


def parse_rank(text: str | None) -> int | float | str | None:
    """Read the rank of a merged update.

    >>> parse_rank("16"), parse_rank("0.99"), parse_rank("full")
    (16, 0.99, 'full')
    """
    if text is None or text == "full":
        return text
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise RankError(
            f"{text[:40]!r} is not a rank", where="--rank", rule="it is a number, a share such as 0.99, or full"
        ) from None
