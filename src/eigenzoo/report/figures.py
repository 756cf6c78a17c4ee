"""Figures of a report: which there are, what each shows, and what it says in words.

Page, static pictures and CSV are made from this one description: titles, axes, and the lines, each with its column in a table of
`eigenzoo.report.plotted` and its look in `eigenzoo.report.series`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eigenzoo.display import NONE, counted, in_bytes, in_number, in_percent
from eigenzoo.report import curves, plotted
from eigenzoo.report.document import Report, has_similarity
from eigenzoo.report.numbers import at_rank, floats, quantile
from eigenzoo.report.series import SERIES
from eigenzoo.report.similarity import clustered
from eigenzoo.report.sizes import SizeTable
from eigenzoo.report.suitability import exponents


@dataclass(frozen=True)
class Axis:
    """An axis: its label, and its scale.

    `rank` (powers of two), `count`, `bytes` (logarithmic), `share`, `log share`, `cosine` (0 to 1), `number`, `category`.
    """

    label: str
    scale: str


@dataclass(frozen=True)
class Mark:
    """A drawing of one column of a table.

    Attributes:
        kind: `line`; `curve` (a line without signs); `band` (from the column `low`); `points` (one for each layer); `bar`;
            `level` or `upright` (one value along or across the whole axis).
        table: of `plotted.TABLES`.
        column: in this table.
        look: colour, dashes, sign and name, from `SERIES`.
        label: its name in the legend. Default: the name of its look.
        low: column of a band's lower edge.
        error: column of its error bars.
    """

    kind: str
    table: str
    column: str
    look: str
    label: str = ""
    low: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        """Return its name in legends."""
        return self.label or SERIES[self.look].name


SHARE = Axis("share of variance about the mean", "share")
RANK = Axis("rank", "rank")
DIRECTION = Axis("direction", "rank")
MODELS_FITTED = Axis("models fitted", "count")
LAYERS = Axis("layer, by role and depth", "count")
NO_LABEL = Axis("", "category")

KEPT = (
    Mark("line", "heldout", "null", "null"),
    Mark("line", "heldout", "in_sample", "in_sample"),
    Mark("line", "leave_one_out", "leave_one_out", "leave_one_out"),
    Mark("line", "heldout", "heldout", "heldout"),
)


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: its place in the page, in the tidy table and among the static figures.
        title: what it is.
        what: axes and denominators.
        summary: what it says, in words and numbers; also what is read out in its stead.
        section: the section of the tidy table that holds its numbers.
        x, y: its axes.
        marks: the drawn marks, from back to front. Empty for maps, which are drawn by other functions.
        value: meaning of the colours of a heat map.
        by_layer: whether it follows the choice of a layer.
        choices: quantities to choose from, as (key, label).
        size: `wide`, `half`, `main` with a `side` beside it, or `square`.
    """

    name: str
    title: str
    what: str
    summary: str
    section: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...] = ()
    value: str = ""
    by_layer: bool = False
    choices: tuple[tuple[str, str], ...] = ()
    size: str = "wide"


def scree(report: Report) -> Figure | None:
    """The spectrum with its null bands."""
    found = curves.all_layers_spectrum(report)
    if not len(found["rank"]):
        return None
    first = in_percent(float(found["spectrum"][0]))
    null = f"; unrelated models with the same norms would give {in_percent(float(found['norm_matched'][0]))}" \
        if "norm_matched" in found else ""  # fmt: skip
    return Figure(
        "scree",
        "Scree: variance by direction",
        "Share of the layer's whole variance about the mean in each direction, largest first; both axes are logarithmic. The "
        "grey band contains 90 % of the draws for unrelated models with the same norms.",
        f"On average over layers, the first direction explains {first} of the variance of all models{null}.",
        "spectrum",
        DIRECTION,
        Axis(SHARE.label, "log share"),
        (
            Mark("band", "spectra", "layers_high", "all_models", "eight of ten layers", low="layers_low"),
            Mark("band", "spectra", "high", "null", "unrelated, 90 % of draws", low="low"),
            *(Mark("line", "spectra", name, name) for name in curves.NULLS),
            Mark("line", "spectra", "spectrum", "all_models"),
        ),
        by_layer=True,
    )


def cumulative(report: Report) -> Figure | None:
    """Running sums of the spectrum, beside what held-out models keep."""
    found = curves.with_cumulative(curves.all_layers_spectrum(report))
    if not len(found["rank"]):
        return None
    place = min(report.rank, len(found["rank"])) - 1
    summary = report.evidence["summary"]
    held = in_percent(at_rank(summary["rank"], summary["captured"], report.rank))
    null = ""
    if "norm_matched_sum" in found:
        null = f"; for as many unrelated models it is {in_percent(float(found['norm_matched_sum'][place]))}"
    return Figure(
        "cumulative",
        "Cumulative explained variance",
        "Share of the layer's whole variance about the mean in the first k directions: for all models (fitted together), models "
        "held out of a fit to the others, and unrelated models (fitted together).",
        f"The first {counted(place + 1, 'direction')} explain {in_percent(float(found['spectrum_sum'][place]))} of the variance of "
        f"all {report.evidence['num_models']:,} models and {held} of held-out models'{null}.",
        "spectrum",
        RANK,
        SHARE,
        (
            *(Mark("line", "spectra", f"{name}_sum", name) for name in curves.NULLS),
            Mark("line", "spectra", "spectrum_sum", "all_models"),
            Mark("line", "heldout", "heldout", "heldout"),
        ),
        by_layer=True,
    )


def axes(report: Report) -> Figure | None:
    """Spectra of the sides."""
    names = [axis for axis in plotted.SIDES if any(axis in layer["axes"] for layer in report.layers.values())]
    if not names:
        return None
    have = sum(bool(layer["axes"]) for layer in report.layers.values())
    return Figure(
        "axes",
        "Spectra of the layer's sides",
        "Share of the stack's energy in each direction of its outputs or inputs, with the same of unrelated noise; LoRA "
        "updates include their mean; everything else is taken about it.",
        f"{counted(have, 'layer')} of {len(report.layers)} have spectra of their {' and '.join(names)}.",
        "axes",
        DIRECTION,
        Axis("share of energy", "log share"),
        tuple(Mark("line", axis, column, column) for axis in names for column in (axis, f"{axis}_null")),
        by_layer=True,
    )


def heldout(report: Report) -> Figure | None:
    """Held-out against in-sample and chance."""
    summary = report.evidence["summary"]
    if not summary["rank"] and not any(layer["heldout"]["rank"] for layer in report.layers.values()):
        return None
    shares = [
        in_percent(at_rank(summary["rank"], summary[key], report.rank)) for key in ("in_sample", "captured", "null")
    ]
    return Figure(
        "heldout",
        "Variance kept: fitted, held-out and unrelated models",
        "Share of the models' variance about the mean that k directions keep. Held out: the models of a fold, with mean and "
        "directions from the others. In-sample: those others. Chance: unrelated models with the same norms, held out too.",
        f"At rank {report.rank} the models of a fold's fit keep {shares[0]}, held-out models {shares[1]}, unrelated held-out "
        f"models {shares[2]}.",
        "heldout",
        RANK,
        SHARE,
        KEPT,
        by_layer=True,
        size="main",
    )


def mean(report: Report) -> Figure | None:
    """The mean alone."""
    summary = report.evidence["summary"]
    if summary["mean_energy"] is None and summary["mean_heldout"] is None:
        return None
    return Figure(
        "mean",
        "The mean alone",
        "Share of the models' energy in their mean, without any direction. For a held-out model: the share that the others' mean "
        "removes. The mean of unrelated models removes nothing and adds its own small energy, so its share is below zero.",
        f"In the average layer the mean has {in_percent(summary['mean_energy'])} of the energy. From a held-out model it removes "
        f"{in_percent(summary['mean_heldout'])}, and {in_percent(summary['mean_null'])} if the models were unrelated.",
        "mean",
        NO_LABEL,
        Axis("share of energy", "share"),
        (
            Mark("bar", "mean", "in_sample", "in_sample"),
            Mark("bar", "mean", "heldout", "mean", "held out"),
            Mark("bar", "mean", "null", "null", "by chance"),
        ),
        by_layer=True,
        size="side",
    )


def role_map(report: Report) -> Figure | None:
    """A number of each layer, by role and depth."""
    if not report.layers:
        return None
    ranks = [layer["rank"]["auto"] for layer in report.layers.values()]
    middle, most = quantile(ranks, 0.5), quantile(ranks, 1.0)
    rank = report.rank
    return Figure(
        "rolemap",
        "Layers by role and depth",
        "One cell per role (row) and depth (column); where several layers fall into one cell it shows their average. Grey "
        "cells have no number.",
        f"The rank above chance is {in_number(middle)} in the median layer and {in_number(most)} at most, "
        f"of {max(report.evidence['num_models'] - 1, 0):,} that the models can span.",
        "layers",
        Axis("depth (block number)", "category"),
        NO_LABEL,
        value="rank above chance",
        choices=(
            ("auto", "rank above chance"),
            ("var90", "rank for 90 % of variance"),
            ("captured", f"held-out variance kept at rank {rank}"),
            ("beyond", f"held-out minus chance at rank {rank}"),
        ),
    )


def layer_ranks(report: Report) -> Figure | None:
    """Describe the kept shares of each layer at each rank."""
    if not any(layer["heldout"]["rank"] for layer in report.layers.values()):
        return None
    shares = [
        at_rank(layer["heldout"]["rank"], layer["heldout"]["captured"], report.rank) for layer in report.layers.values()
    ]
    low, high = quantile(shares, 0.1), quantile(shares, 0.9)
    return Figure(
        "layerranks",
        "Layers by rank",
        "One row per layer, by role and depth; one column per evaluated rank; colour: share of the layer's variance.",
        f"At rank {report.rank} eight of ten layers keep between {in_percent(low)} and {in_percent(high)} of held-out "
        "variance.",
        "heldout",
        Axis("rank", "category"),
        Axis(LAYERS.label, "category"),
        value="held-out variance kept",
        choices=(
            ("captured", "held-out variance kept"),
            ("beyond", "held-out minus chance"),
            ("in_sample", "in-sample variance kept"),
        ),
    )


def similarity(report: Report) -> Figure | None:
    """Cosines between the models."""
    found = report.evidence["lineage"]
    if not has_similarity(report):
        return None
    level = found["threshold"] if found["level"] is None else found["level"]
    largest = max((len(group) for group in found["groups"]), default=0)
    shown = clustered(report)
    return Figure(
        "similarity",
        "Similarity of the models",
        f"Cosine between each pair of models, from their {found['measure'] or 'weights'}, similar models side by side. "
        f"Lineage groups (told apart at a cosine of {in_number(level)}) are outlined. Colours run from {in_number(shown.low)} "
        f"to {in_number(shown.high)}, the range between different models.",
        f"{counted(len(found['groups']), 'lineage group')}, the largest with {counted(largest, 'model')}; "
        f"{counted(len(found['duplicates']), 'duplicate') if found['duplicates'] else 'no duplicates'}.",
        "similarity",
        Axis("models, similar ones side by side", "category"),
        NO_LABEL,
        value="cosine",
        size="square",
    )


def model_map(report: Report) -> Figure | None:
    """The models in their first coefficients."""
    if not report.evidence["map"]:
        return None
    shares = [in_percent(share) for share in report.evidence["map_shares"]]
    held = f" These have {', '.join(shares)} of all variance about the mean." if shares else ""
    return Figure(
        "map",
        "Map of the models",
        "Each model in two of the zoo's first coefficients, over all layers; colour and sign: lineage group. The map "
        "shows only these directions.",
        f"{counted(len(report.evidence['map']), 'model')} in the first {max(len(shares), 1)} coefficients.{held}",
        "map",
        Axis(_coefficient(0, shares), "number"),
        Axis(_coefficient(1, shares), "number"),
        choices=(("0,1", "first and second"), ("0,2", "first and third"), ("1,2", "second and third")),
        size="square",
    )


def _coefficient(number: int, shares: list[str]) -> str:
    """Name a coefficient of the map, with its share of the variance where it is known."""
    return f"coefficient {number + 1}" + (f" ({shares[number]} of variance)" if number < len(shares) else "")


def growth_rank(report: Report) -> Figure | None:
    """The rank for 90 % against the number of models."""
    found = report.evidence["growth"]
    if not found["num_models"] or not found["var90_rank"]:
        return None
    return Figure(
        "growthrank",
        "Rank for 90 % of the variance",
        "Directions that explain 90 % of the fitted models' variance, by number of models. The dotted line is the largest number "
        "that N models can span (N − 1). For a shared subspace the curve levels off.",
        f"{in_number(found['var90_rank'][0])} directions for {in_number(found['num_models'][0])} models, "
        f"{in_number(found['var90_rank'][-1])} for {in_number(found['num_models'][-1])}.",
        "growth",
        MODELS_FITTED,
        Axis("directions", "count"),
        (
            Mark("line", "growth", "most_rank", "limit", "most possible, N − 1"),
            Mark("line", "growth", "var90_rank", "in_sample", "for 90 % of variance, in-sample"),
        ),
        size="half",
    )


def growth_captured(report: Report) -> Figure | None:
    """Held-out capture against the number of models."""
    found = report.evidence["growth"]
    if not found["num_models"] or not any(value is not None for value in found["captured"]):
        return None
    known = [value for value in found["captured"] if value is not None]
    at = f" at rank {found['rank']}" if found["rank"] else ""
    return Figure(
        "growthcaptured",
        f"Variance kept{at}",
        "Share of variance about the mean that is kept, by number of fitted models: for held-out models (± spread over draws), "
        "in-sample, and by chance.",
        f"Held-out models keep {in_percent(known[0])} with the fewest models and {in_percent(known[-1])} with all.",
        "growth",
        MODELS_FITTED,
        SHARE,
        (
            Mark("line", "growth", "null", "null"),
            Mark("line", "growth", "in_sample", "in_sample"),
            Mark("line", "growth", "captured", "heldout", error="spread"),
        ),
        size="half",
    )


def halves(report: Report) -> Figure | None:
    """Principal angles between two halves."""
    found = curves.all_layers_halves(report)
    if not len(found["rank"]):
        return None
    cosine, null = (in_three_digits(float(found[name][0])) for name in ("cosine", "null"))
    return Figure(
        "halves",
        "Principal angles between two halves of the zoo",
        "Cosines of the principal angles between the subspaces of two disjoint halves, largest first (1: the same direction); "
        "the band contains 90 % of the splits; dotted: unrelated subspaces of the same rank.",
        f"On average over layers, the closest pair of directions has a cosine of {cosine}. For unrelated subspaces it is {null}.",
        "halves",
        Axis("principal angle, closest first", "count"),
        Axis("cosine", "cosine"),
        (
            Mark("band", "halves", "high", "heldout", "90 % of splits", low="low"),
            Mark("band", "halves", "null_high", "null", "unrelated, to 95 % of draws", low="null"),
            Mark("line", "halves", "null", "null", "unrelated subspaces"),
            Mark("line", "halves", "cosine", "heldout", "two halves"),
        ),
        by_layer=True,
    )


def in_three_digits(value: float) -> str:
    """Write a cosine or an exponent; a dash where there is none.

    >>> in_three_digits(0.98765)
    '0.988'
    """
    return in_number(float(f"{value:.3g}")) if value == value else NONE


def size_curve(report: Report, sizes: SizeTable | None) -> Figure | None:
    """Error against bytes."""
    if sizes is None or not any(row.bytes for row in sizes.by_rank):
        return None
    row = sizes.by_rank[min(report.rank, len(sizes.by_rank) - 1)]
    kept = [in_percent(None if share is None else 1 - share) for share in (row.in_sample, row.heldout)]
    return Figure(
        "sizes",
        "Error against size",
        "Share of the zoo's whole variance about the mean that is lost, against all bytes of the bundle; one point per "
        "rank, the same in every layer, from rank 0 (the mean alone). The vertical line is the size of the models' files.",
        f"At rank {row.rank} the bundle takes {in_bytes(row.bytes)} of {in_bytes(sizes.whole_zoo)} and loses {kept[0]} of "
        f"the variance of all models, {kept[1]} of held-out models'. All layers count together here, each by its variance.",
        "sizes",
        Axis("bytes of the whole bundle", "bytes"),
        Axis("share of all variance lost", "share"),
        (
            Mark("curve", "lost", "null", "null"),
            Mark("curve", "lost", "in_sample", "all_models"),
            Mark("curve", "lost", "heldout", "heldout"),
            Mark("upright", "lost", "whole_zoo", "limit", "the models' files"),
        ),
    )


def rate_curve(report: Report, sizes: SizeTable | None) -> Figure | None:
    """Error against bytes of all axes, and of models cut alone."""
    rates = report.rates
    if rates is None or not (rates["alone"] or rates["rows"] or rates["bundle"]):
        return None
    models = (Mark("curve", "lost", "heldout", "axis_models"),) if sizes is not None else ()
    return Figure(
        "rates",
        "Error against size, with and without sharing",
        "Share of the variance about the mean that is lost of models left out of the fit, against the bytes of all "
        f"{counted(rates['num_models'], 'model')}; one point per rank. Each model cut alone by its own SVD is the control without "
        "sharing: it is not fitted to other models, so it loses as much of new ones.",
        " ".join(rates["sentences"]) or "Models cut alone were not measured.",
        "rates",
        Axis("bytes of all models", "bytes"),
        Axis("share of variance lost, held out", "share"),
        (
            *models,
            *(Mark("line", f"rates_{axes}", "lost", axes) for axes in plotted.SIDES),
            Mark("line", f"rates_{plotted.BOTH}", "lost", "both"),
            Mark("line", "alone_zero", "lost", "alone"),
            Mark("line", "alone_mean", "lost", "alone_mean"),
            Mark("line", "bundle", "lost", "bundle"),
        ),
    )


def side_shares(report: Report) -> Figure | None:
    """The share of held-out models that sides keep, beside axis models."""
    sides = report.evidence["summary"]["sides"]
    if not sides:
        return None
    said = [
        f"{axes.replace(',', ' and ')} {in_percent(at_rank(found['rank'], found['captured'], report.rank))}"
        for axes, found in sides.items()
    ]
    return Figure(
        "sides",
        "What sides keep of held-out models",
        "Share of the variance about the mean of models left out of the fit, by the directions kept of each layer's outputs, "
        "inputs, or both; layers weighted by their variance. Axis models: layers weighted by their number of values.",
        f"At rank {report.rank}: {', '.join(said)}.",
        "sides",
        RANK,
        SHARE,
        (
            *(Mark("line", f"kept_{axes}", "captured", axes) for axes in plotted.SIDES),
            Mark("line", f"kept_{plotted.BOTH}", "captured", "both"),
            Mark("line", "heldout", "heldout", "axis_models"),
        ),
    )


def suitability(report: Report) -> Figure | None:
    """Power-law exponents by layer."""
    means = [float(floats(found).mean()) for found in map(exponents, report.layers.values()) if found]
    if not means:
        return None
    return Figure(
        "suitability",
        "Power-law exponent of each layer's spectrum",
        "One mark per layer, by role and depth: mean over random halves of the zoo, with their spread (standard deviation); the "
        "band contains the exponents that count as suitable.",
        f"{len(means)} of {counted(len(report.layers), 'layer')} have exponents, from {in_three_digits(min(means))} to "
        f"{in_three_digits(max(means))}.",
        "suitability",
        LAYERS,
        Axis("exponent", "number"),
        (Mark("points", "exponents", "mean", "heldout", "a layer", error="spread"),),
    )


def secondary(report: Report) -> Figure | None:
    """Describe the directions after the first k."""
    known = [layer["secondary"] for layer in report.layers.values() if layer["secondary"]["rank"] is not None]
    if not known:
        return None
    middle = [in_percent(quantile((record[key] for record in known), 0.5)) for key in ("in_sample", "captured", "null")]
    return Figure(
        "secondary",
        "The next directions",
        "The directions that follow those above chance, about as many again in each layer: share of the layer's variance about the "
        "mean.",
        f"In the median layer they keep {middle[0]} in-sample, {middle[1]} of held-out models, {middle[2]} by chance.",
        "secondary",
        LAYERS,
        SHARE,
        (
            Mark("points", "secondary", "in_sample", "in_sample"),
            Mark("points", "secondary", "captured", "heldout"),
            Mark("points", "secondary", "null", "null"),
        ),
    )


def function_curve(report: Report) -> Figure | None:
    """The metric against rank."""
    function = report.function
    if function is None or not function["mean"]["rebuilt"]:
        return None
    rebuilt = function["mean"]["rebuilt"]
    most = max(rebuilt, key=int)
    return Figure(
        "function",
        f"Metric {function['metric']} against rank",
        f"Mean over {function['num_models']:,} models ± standard error; horizontal lines: controls without a rank.",
        f"The originals reach {in_number(function['mean']['original'])}, rebuilt from {most} directions "
        f"{in_number(rebuilt[most])}, from the mean alone {in_number(function['mean']['mean'])}.",
        "function",
        RANK,
        Axis("mean over models ± standard error", "number"),
        (
            *(Mark("level", "controls", name, name) for name in plotted.CONTROLS),
            Mark("line", "random_basis", "random_basis", "null", "random basis", error="spread"),
            Mark("line", "alone", "alone", "alone", "each cut alone to that rank", error="spread"),
            Mark("line", "rebuilt", "rebuilt", "heldout", "rebuilt", error="spread"),
        ),
    )


def residuals(report: Report) -> Figure | None:
    """Residuals of the models, sorted."""
    known = [model["residual"] for model in report.models.values() if model["residual"] is not None]
    if not known:
        return None
    return Figure(
        "residuals",
        "Residual of each model",
        "Share of the model's own energy outside the fitted subspace, in-sample, largest first.",
        f"{in_percent(quantile(known, 0.5))} in the median of {counted(len(known), 'model')}, {in_percent(max(known))} at most.",
        "residuals",
        Axis("models, largest residual first", "count"),
        Axis("share of the model's energy", "share"),
        (Mark("bar", "residuals", "residual", "in_sample", "residual"),),
    )


SIMPLE: dict[str, Callable[[Report], Figure | None]] = {
    "scree": scree,
    "cumulative": cumulative,
    "axes": axes,
    "heldout": heldout,
    "sides": side_shares,
    "mean": mean,
    "rolemap": role_map,
    "layerranks": layer_ranks,
    "similarity": similarity,
    "map": model_map,
    "growthrank": growth_rank,
    "growthcaptured": growth_captured,
    "halves": halves,
    "suitability": suitability,
    "secondary": secondary,
    "function": function_curve,
    "residuals": residuals,
}


def all_figures(report: Report, sizes: SizeTable | None) -> dict[str, Figure]:
    """The figures that the document has numbers for."""
    found = {name: make(report) for name, make in SIMPLE.items()} | {
        "sizes": size_curve(report, sizes),
        "rates": rate_curve(report, sizes),
    }
    return {name: figure for name, figure in found.items() if figure is not None}
