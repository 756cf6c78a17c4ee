"""`eigenzoo merge MODEL… -o OUT`: merge models into one."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
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


@dataclass(frozen=True)
class Unused:
    """Options that one way of merging does not use.

    Attributes:
        way: for the message: `beside --recipe`.
        options: their names.
        rule, next_step: why, and what to do beside leaving the option out.
    """

    way: str
    options: Collection[str]
    rule: str
    next_step: str = ""

    def check(self, given: Collection[str]) -> None:
        """Raise UsageError for the first option that was given and is not used."""
        for name in self.options:
            if name in given:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{option} {self.way}",
                    where="eigenzoo merge",
                    rule=self.rule,
                    next_step=f"leave out {option}{self.next_step}",
                )


OF_METHODS = tuple(field.name for field in fields(MethodOptions))
OF_METRICS = ("metric_arg", "parent")

BESIDE_RECIPE = Unused(
    "beside --recipe",
    ("method", "weights", "scale", "space", *OF_METHODS, "grams", "base", "missing", "metric", *OF_METRICS, "picture"),
    "a recipe names the models, the method and its parameters itself",
    ", and write it in the recipe if it has such a parameter",
)
OF_A_BUNDLE = Unused(
    "for models of a bundle",
    ("rank", "budget", "dtype", "base", "heads", "missing", "grams", "metric", *OF_METRICS, "picture", "allow_pickle"),
    "their merge is a file of coefficients: its rank, dtype, heads and layers are those of the bundle",
    ", or merge the models' own files",
)
BESIDE_METRIC = Unused("beside --metric", ("weights", "scale"), "the metric chooses method, weights and scale")
WITHOUT_METRIC = Unused("without --metric", OF_METRICS, "only a choice by a metric uses it", ", or add --metric")


def given_options(values: Mapping[str, Any]) -> set[str]:
    """Return the names of the options of `command` whose values are not the default."""
    own = {
        name
        for name, parameter in inspect.signature(command).parameters.items()
        if name in values and name != "method_options" and values[name] != parameter.default
    }
    return own | {name for name, value in vars(values["method_options"]).items() if value is not None}


def check_models(models: list[str]) -> None:
    """Raise UsageError for what cannot be meant as a model: one path twice, or a number of an option before it."""
    seen: dict[str, str] = {}
    for model in models:
        path = model if "://" in model else os.path.normpath(model)
        if path in seen:
            raise UsageError(
                f"{model!r} is named twice", next_step="name each model once, and give it a larger weight (--weights)"
            )
        seen[path] = model
        if is_number(model) and not os.path.lexists(model):
            raise UsageError(
                f"{model!r} is not a model",
                rule="several numbers of an option are one word, with commas",
                next_step="write --weights 1,1",
            )


def is_number(text: str) -> bool:
    """Tell whether a text is a number.

    >>> is_number("-0.5"), is_number("code")
    (True, False)
    """
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_picture(picture: Path, of_checkpoints: bool) -> None:
    """Raise UsageError for a picture of another format, or of what has no updates to draw."""
    from eigenzoo import report as pages
    from eigenzoo.formats.output.whole import check_free_file

    if picture.suffix not in (".png", ".svg"):
        raise UsageError(
            f"{picture} ends in {picture.suffix!r}",
            where="--picture",
            rule="overlaps are drawn into a .png or .svg file",
            next_step=f"write {picture.with_suffix('.png')}",
        )
    if of_checkpoints:
        raise UsageError(
            "--picture beside --base",
            rule="the updates of adapters are drawn, not checkpoints",
            next_step="leave it out",
        )
    pages.require(picture.suffix[1:])
    check_free_file(picture)


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
            help="How to merge: mean, linear, task_arithmetic, ties, tsv, … (docs/merge.md lists all). Default: mean. With "
            "--metric: the methods to try, comma-separated. Default then: task_arithmetic,ties,tsv,iso_c,model_stock,karcher,cart, "
            "and regmean with --grams.",
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
    parent: Annotated[
        Path | None,
        typer.Option(
            help="With --metric: the model that the adapters or checkpoints were trained from, as a control. It is a whole model, "
            "not an adapter. Default: --base.",
            show_default=False,
        ),
    ] = None,
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
    given_names = given_options(locals())
    import eigenzoo as ez
    from eigenzoo.cli.evaluate import load_metric
    from eigenzoo.formats.output.own import recorded
    from eigenzoo.formats.output.whole import check_free, check_free_file, new_file
    from eigenzoo.formats.remote.hub_bundle import names_a_bundle
    from eigenzoo.merge.choosing import choose
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
    check_models(models)
    chosen, num_bytes = method_options.given(), options.parse_bytes(budget, "--budget")
    rank_rule, numbers = parse_rank(rank), None if weights is None else parse_numbers(weights, "--weights")
    in_bundle = bool(models) and (len(models) > 1 or os.path.isdir(models[0])) and names_a_bundle(models[0])
    if in_bundle and len(models) == 1:
        names = ez.load(models[0]).names
        raise UsageError(
            "this is a bundle, and none of its models is named",
            where=models[0],
            rule=f"it has {len(names)}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}",
            next_step=f"name those to merge: eigenzoo merge {models[0]} NAME NAME",
        )
    ways = {
        BESIDE_RECIPE: recipe is not None,
        OF_A_BUNDLE: in_bundle,
        BESIDE_METRIC: metric,
        WITHOUT_METRIC: not metric,
    }
    for way, applies in ways.items():
        if applies:
            way.check(given_names)
    as_missing, choice = "zero" if missing == "zero" else "error", None
    if output is not None and not check:
        if in_bundle:
            check_free_file(output, force=force, own=is_coefficient_file)
        else:
            check_free(output, force=force, foreign=recorded(MERGED))
    if picture is not None:
        check_picture(picture, base is not None)
    source: Any = (ez.load(models[0]), models[1:]) if in_bundle else options.one_or_many(models)
    # A module or metric that prints must not print into the document.
    with (
        contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext(),
        progress_bar(quiet=quiet or json) as progress,
    ):
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
                    methods=None if method is None else [name.strip() for name in method.split(",")],
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
    if check and interference is None:
        say("interference: not measured, only for adapters' own files")
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
    for note in choice.notes:
        say(f"note: {note}")
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
    num = len(certificate.models)
    say(
        "kept: how much of each model's own update the merged one applies. 100 % is the model alone; a plain mean of "
        f"{counted(num, 'unrelated model')} of one size keeps {in_percent(1 / num)} of each."
    )
    if outside:
        say("norm and kept are those of the rebuilt models, not of the models' files.")
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
        else f"the file loses {in_percent(loss.frobenius)} of the exact merge's norm "
        f"({in_percent(loss.frobenius**2)} of its energy)"
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
