"""Static figures by matplotlib: for papers, and on the page where there is no JavaScript.

One colour and one sign per kind of number, all through: Okabe and Ito's palette, which the colour-blind can tell apart.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backend_bases import get_registered_canvas_class
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from eigenzoo.display import in_bytes, in_percent
from eigenzoo.errors import OutputError, UsageError
from eigenzoo.report import curves
from eigenzoo.report.document import Report, read_document
from eigenzoo.report.figures import all_figures
from eigenzoo.report.numbers import floats
from eigenzoo.report.payload import role_map
from eigenzoo.report.series import SERIES
from eigenzoo.report.similarity import clustered
from eigenzoo.report.sizes import size_table
from eigenzoo.report.suitability import exponents, limits

FORMATS = ("png", "svg", "pdf")

CENTIMETRES = 2.54
"""Of an inch, which matplotlib counts in."""

BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
GREY, INK = "#767b84", "#24262b"
SHADES = LinearSegmentedColormap.from_list("shades", ["#eef3f7", "#7fb0cf", "#004b77"])
SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "#ffffff", BLUE])

STYLE: Any = {  # matplotlib types its keys one by one
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.dpi": 200,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": "#e6e8eb",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.dpi": "figure",
    "svg.fonttype": "none",
    "svg.hashsalt": "eigenzoo",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
}

COLOURS = {
    "heldout": BLUE,
    "insample": VERMILLION,
    "orange": ORANGE,
    "null": GREY,
    "green": GREEN,
    "sky": SKY,
    "mean": PINK,
}
DASHES = {"solid": "-", "dash": "--", "longdash": "--", "dot": ":", "dashdot": "-.", "longdashdot": "-."}
SIGNS = {"circle": "o", "square": "s", "triangle-up": "^", "x": "x", "diamond": "D"}


def _style(name: str) -> dict[str, Any]:
    """Return how matplotlib draws a kind of number; the nulls of spectra are lines alone."""
    kind = SERIES[name]
    style = {"label": kind.name, "color": COLOURS[kind.colour], "linestyle": DASHES[kind.dash]}
    return style if name in curves.NULLS else {**style, "marker": SIGNS[kind.symbol]}


SMALLEST_LETTERS, LARGEST_LETTERS = 0.7, 1.6
"""Bounds of what letters are scaled by: 9 points become 6 to 14."""

MOST_NAMES = 40
"""Layers whose names can be read beside their rows."""

MOST_GROUPS = 12
"""Lineage groups that a legend holds."""


@dataclass(frozen=True)
class Static:
    """How a figure of the page is drawn for paper: its usual size in inches, and the function that draws it."""

    size: tuple[float, float]
    draw: Callable[[Axes, Report], None]


def write_figures(
    document: Mapping[str, Any],
    folder: str | Path,
    formats: Sequence[str] = ("png", "svg"),
    width: float | None = None,
) -> list[Path]:
    """Write every figure that the document has numbers for, in each format, into a folder that is made if need be.

    Args:
        width: of each figure, in centimetres; its height follows. By default 11 to 16 cm.

    Raises:
        UsageError: a format that is not png, svg or pdf; a document without evidence.
        OutputError: a file of that name exists already.
    """
    for kind in formats:
        if kind not in FORMATS:
            raise UsageError(f"figure format {kind!r}", rule=f"formats are {', '.join(FORMATS)}")
    report, folder = read_document(document), Path(folder)
    names = available(report)
    paths = [folder / f"{name}.{kind}" for name in names for kind in formats]
    for path in paths:
        if path.exists():
            raise OutputError("exists already", where=str(path), next_step="name an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.write_bytes(drawn(report, path.stem, path.suffix[1:], width))
    return paths


def available(report: Report) -> list[str]:
    """The figures that the report has numbers for, in the page's order."""
    return list(all_figures(report, size_table(report)))


def drawn(report: Report, name: str, kind: str, width: float | None = None) -> bytes:
    """Draw one figure, `width` centimetres wide; the same bytes for the same report."""
    static, out = STATIC[name], io.BytesIO()
    scale = 1.0 if width is None else width / CENTIMETRES / static.size[0]
    with _quiet(), rc_context({**STYLE, **_letters(scale)}):
        canvas = Canvas(figsize=(scale * static.size[0], scale * static.size[1]), layout="constrained")
        static.draw(canvas.add_subplot(), report)
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
        _lay_out(canvas, kind)
        canvas.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()


def _lay_out(canvas: Canvas, kind: str) -> None:
    """Place everything for this format, once: a canvas that still has a layout engine is drawn a second time by savefig."""
    get_registered_canvas_class(kind)(canvas)
    engine = canvas.get_layout_engine()
    assert engine is not None
    engine.execute(canvas)
    canvas.set_layout_engine(None)


def _letters(scale: float) -> dict[str, Any]:
    """Sizes of letters for a figure that is so much larger or smaller than usual: they follow within limits that can be read."""
    factor = min(max(scale, SMALLEST_LETTERS), LARGEST_LETTERS)
    sizes = ("font.size", "axes.titlesize", "legend.fontsize", "lines.linewidth", "lines.markersize")
    return {name: factor * STYLE[name] for name in sizes}


@contextmanager
def _quiet() -> Iterator[None]:
    """A name may hold letters that no font here has; they are then drawn as boxes, which is no reason to complain."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def _line(axes: Axes, name: str, x: Any, y: Any, **more: Any) -> None:
    if np.isfinite(floats(y)).any():
        axes.plot(x, y, **{**_style(name), **more})


def _legend(axes: Axes, **place: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**place)


def _rank_axis(axes: Axes, largest: float) -> None:
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(12) if 2**power <= max(largest, 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, axis="y")


def _count_axis(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True))


def _share_axis(axes: Axes) -> None:
    """Shares from zero, in percent."""
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(True, axis="y")


def _scree(axes: Axes, report: Report) -> None:
    found = curves.thinned(curves.all_layers_spectrum(report))
    rank = found["rank"]
    if "low" in found and "high" in found:
        axes.fill_between(
            rank, found["low"], found["high"], color=GREY, alpha=0.3, lw=0, label="unrelated, 90 % of draws"
        )
    for name in curves.NULLS:
        if name in found:
            _line(axes, name, rank, found[name])
    _line(axes, "all_models", rank, found["spectrum"])
    _rank_axis(axes, rank[-1])
    _log_share_axis(axes)
    axes.set(title="Scree, all layers", xlabel="direction", ylabel="share of variance about the mean")
    _legend(axes)


def _log_share_axis(axes: Axes) -> None:
    """Label shares on a log axis without TeX, which names must not reach."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high < 100 * low else (1,)
    powers = range(floor(log10(low)), ceil(log10(high)))
    ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    axes.set_yticks(
        ticks, [f"{100 * tick:.0g}%" if tick < 0.1 else f"{100 * tick:.0f}%" for tick in ticks], minor=False
    )
    axes.yaxis.set_minor_locator(NullLocator())


def _heldout(axes: Axes, report: Report) -> None:
    found, left = curves.all_layers_heldout(report), curves.all_layers_leave_one_out(report)
    for name in ("in_sample", "heldout", "null"):
        _line(axes, name, found["rank"], found[name])
    _line(axes, "leave_one_out", left["rank"], left["heldout"])
    _rank_axis(axes, max([*found["rank"], 1]))
    _share_axis(axes)
    axes.set(title="Variance kept, all layers", xlabel="rank", ylabel="share of variance about the mean")
    _legend(axes)


def _cumulative(axes: Axes, report: Report) -> None:
    found = curves.thinned(curves.with_cumulative(curves.all_layers_spectrum(report)))
    for name in curves.NULLS:
        if f"{name}_sum" in found:
            _line(axes, name, found["rank"], found[f"{name}_sum"])
    _line(axes, "all_models", found["rank"], found["spectrum_sum"])
    heldout = curves.all_layers_heldout(report)
    _line(axes, "heldout", heldout["rank"], heldout["heldout"])
    _rank_axis(axes, found["rank"][-1])
    _share_axis(axes)
    axes.set(title="Cumulative variance, all layers", xlabel="rank", ylabel="share of variance about the mean")
    _legend(axes)


def _axes(axes: Axes, report: Report) -> None:
    name, layer = next((name, layer) for name, layer in report.layers.items() if layer["axes"])
    style = {"outputs": ("heldout", BLUE), "inputs": ("in_sample", VERMILLION)}
    largest = 1
    for side, found in layer["axes"].items():
        kind, colour = style.get(side, ("leave_one_out", GREEN))
        values = floats(found["explained_variance_ratio"])
        rank = np.arange(1, len(values) + 1)
        largest = max(largest, len(values))
        _line(axes, kind, rank, values, label=side, linestyle="-", ms=3)
        null = curves.fitted(floats(found.get("null")), len(values))
        _line(axes, "null", rank, null, label=f"{side}, chance", color=colour, marker="")
    _rank_axis(axes, largest)
    if axes.lines:
        _log_share_axis(axes)
    axes.set(title=f"Sides of {_short(name)}", xlabel="direction", ylabel="share of energy")
    _legend(axes)


def _mean(axes: Axes, report: Report) -> None:
    summary = report.evidence["summary"]
    bars = [
        ("in-sample", summary["mean_energy"], VERMILLION, "//"),
        ("held out", summary["mean_heldout"], PINK, ""),
        ("by chance", summary["mean_null"], GREY, ".."),
    ]
    known = [bar for bar in bars if bar[1] is not None]
    drawn_bars = axes.bar(
        [label for label, *_ in known],
        [value for _, value, *_ in known],
        color="white",
        edgecolor=[colour for *_, colour, _ in known],
        width=0.5,
    )
    for bar, (_, _, colour, hatch) in zip(drawn_bars, known, strict=True):
        bar.set(hatch=hatch, **({} if hatch else {"facecolor": colour}))
    axes.bar_label(drawn_bars, [in_percent(value) for _, value, *_ in known], padding=2)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(title="The mean alone, all layers", ylabel="share of energy")


def _layer_ranks(axes: Axes, report: Report) -> None:
    ranks = sorted({rank for layer in report.layers.values() for rank in layer["heldout"]["rank"]})
    table = np.full((len(report.layers), len(ranks)), np.nan)
    for row, layer in enumerate(report.layers.values()):
        for rank, value in zip(layer["heldout"]["rank"], floats(layer["heldout"]["captured"]), strict=False):
            table[row, ranks.index(rank)] = value
    image = axes.imshow(table, cmap=SHADES, vmin=0, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    if len(report.layers) <= MOST_NAMES:
        axes.set_yticks(range(len(report.layers)), [_short(name, 28) for name in report.layers])
        axes.tick_params(axis="y", labelsize=float(rcParams["font.size"]) * min(0.8, 25 / len(report.layers)))
    else:
        _count_axis(axes.yaxis)
        axes.set_ylabel("layer, by role and depth")
    axes.set(title="Held-out variance kept by each layer", xlabel="rank")
    axes.figure.colorbar(image, ax=axes, label="share of the layer's variance", format=PercentFormatter(1.0))


def _role_map(axes: Axes, report: Report) -> None:
    found = role_map(report)
    table = np.full((len(found["roles"]), len(found["depths"])), np.nan)
    for row, column, _, _, auto, *_ in found["cells"]:
        table[row, column] = np.nan if auto is None else auto
    image = axes.imshow(table, cmap=SHADES, aspect="auto", interpolation="nearest")
    depths = ["–" if depth is None else str(depth) for depth in found["depths"]]
    step = max(1, len(depths) // 16)
    axes.set_xticks(range(0, len(depths), step), depths[::step])
    step = max(1, len(found["roles"]) // 24)
    axes.set_yticks(range(0, len(found["roles"]), step), [_short(role, 36) for role in found["roles"][::step]])
    axes.tick_params(axis="y", labelsize=float(rcParams["font.size"]) * min(1.0, 14 / len(found["roles"][::step])))
    axes.set(title="Rank above chance by role and depth", xlabel="depth")
    axes.figure.colorbar(image, ax=axes, label="directions", ticks=MaxNLocator(integer=True))


def _similarity(axes: Axes, report: Report) -> None:
    found = clustered(report)
    num, step = len(found.names), -(-len(found.names) // 512)
    image = axes.imshow(
        found.cosines_NN[::step, ::step],
        cmap=SIGNED if found.low < 0 else SHADES,
        vmin=found.low,
        vmax=found.high,
        interpolation="nearest",
        extent=(0.5, num + 0.5, num + 0.5, 0.5),
    )
    for _, first, last in found.runs:
        start, end = first + 0.5, last + 1.5
        axes.plot([start, end, end, start, start], [start, start, end, end, start], color=INK, lw=0.8)
    _count_axis(axes.xaxis)
    _count_axis(axes.yaxis)
    axes.set(title="Cosine between models, clustered", xlabel="model", ylabel="model")
    axes.figure.colorbar(image, ax=axes, label="cosine, over the range between different models")


def _map(axes: Axes, report: Report) -> None:
    groups = [group for group in report.evidence["lineage"]["groups"] if len(group) > 1]
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    signs, colours = "osD^PX*p", (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, INK)
    known: dict[int, list[Any]] = {}
    for name, place in report.evidence["map"].items():
        known.setdefault(group_of.get(name, -1), []).append([*place, None, None][:2])
    for group, places in sorted(known.items()):
        points = np.stack([floats(place) for place in places])
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": GREY, "label": "on its own"}
        if group >= 0:
            style = {"color": colours[group % len(colours)], "marker": signs[group % len(signs)]}
            style["label"] = f"group {group + 1}"
        axes.scatter(points[:, 0], points[:, 1], s=24, **style)
    shares = [in_percent(share) for share in report.evidence["map_shares"]]
    labels = [
        f"coefficient {number}" + (f" ({shares[number - 1]} of variance)" if len(shares) >= number else "")
        for number in (1, 2)
    ]
    axes.set(title="Map of the models", xlabel=labels[0], ylabel=labels[1])
    if len(known) <= MOST_GROUPS:
        _legend(axes)


def _growth(axes: Axes, report: Report) -> None:
    found = report.evidence["growth"]
    num_models = found["num_models"]
    known = {
        key: curves.fitted(floats(found[key]), len(num_models)) for key in ("captured", "in_sample", "null", "spread")
    }
    _line(axes, "in_sample", num_models, known["in_sample"])
    _line(axes, "heldout", num_models, known["captured"])
    spread = np.nan_to_num(known["spread"])
    axes.fill_between(num_models, known["captured"] - spread, known["captured"] + spread, color=BLUE, alpha=0.15, lw=0)
    _line(axes, "null", num_models, known["null"])
    at = f" at rank {found['rank']}" if found["rank"] else ""
    axes.set(title=f"Variance kept{at}", xlabel="models fitted", ylabel="share of variance about the mean")
    _share_axis(axes)
    _count_axis(axes.xaxis)
    _legend(axes)


def _growth_rank(axes: Axes, report: Report) -> None:
    found = report.evidence["growth"]
    num_models = floats(found["num_models"])
    ranks = curves.fitted(floats(found["var90_rank"]), len(num_models))
    axes.plot(num_models, num_models - 1, color=GREY, linestyle=":", label="most possible, N − 1")
    axes.plot(num_models, ranks, color=VERMILLION, linestyle="--", marker="s", label="for 90 % of variance, in-sample")
    axes.set(title="Rank for 90 % of the variance", xlabel="models fitted", ylabel="directions")
    axes.set_ylim(bottom=0)
    _count_axis(axes.xaxis)
    _count_axis(axes.yaxis)
    axes.grid(True, axis="y")
    _legend(axes)


def _halves(axes: Axes, report: Report) -> None:
    found = curves.all_layers_halves(report)
    if np.isfinite(found["low"]).any():
        axes.fill_between(
            found["rank"], found["low"], found["high"], color=BLUE, alpha=0.15, lw=0, label="90 % of splits"
        )
    axes.plot(found["rank"], found["cosine"], color=BLUE, marker="o", label="two halves")
    _line(axes, "null", found["rank"], found["null"], label="unrelated subspaces")
    axes.set(title="Halves: principal angles, all layers", xlabel="direction", ylabel="cosine", ylim=(0, 1.03))
    _count_axis(axes.xaxis)
    axes.grid(True, axis="y")
    _legend(axes)


def _suitability(axes: Axes, report: Report) -> None:
    found = [floats(exponents(layer)) for layer in report.layers.values()]
    means, spreads = (
        floats(getattr(values, of)() if len(values) else None for values in found) for of in ("mean", "std")
    )
    limit = limits(report.evidence["suitability"]["thresholds"])
    axes.axhspan(limit["low"], limit["high"], color=GREEN, alpha=0.12, lw=0, label="suitable")
    axes.errorbar(
        range(1, len(means) + 1),
        means,
        yerr=spreads,
        color=BLUE,
        marker="o",
        linestyle="",
        elinewidth=0.8,
        label="a layer",
    )
    axes.set(title="Power-law exponent by layer", xlabel="layer, by role and depth", ylabel="exponent")
    _count_axis(axes.xaxis)
    axes.grid(True, axis="y")
    _legend(axes)


def _secondary(axes: Axes, report: Report) -> None:
    layers = range(1, len(report.layers) + 1)
    for name, key in (("in_sample", "in_sample"), ("heldout", "captured"), ("null", "null")):
        _line(axes, name, layers, floats(layer["secondary"][key] for layer in report.layers.values()), linestyle="")
    axes.set(
        title="What the next directions hold",
        xlabel="layer, by role and depth",
        ylabel="share of variance about the mean",
    )
    _count_axis(axes.xaxis)
    _share_axis(axes)
    _legend(axes)


def _sizes(axes: Axes, report: Report) -> None:
    table = size_table(report)
    assert table is not None
    bytes_of = [row.bytes for row in table.by_rank]
    for name, key in (("null", "null"), ("all_models", "in_sample"), ("heldout", "heldout")):
        _line(axes, name, bytes_of, 1 - floats(getattr(row, key) for row in table.by_rank), marker="")
    axes.set_xscale("log")
    if table.whole_zoo:
        axes.axvline(table.whole_zoo, color=GREY, linestyle=":", lw=1.2, label="the models' files")
    low, high = axes.get_xlim()
    powers = range(floor(log10(low)), ceil(log10(high)))
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]
    axes.set_xticks(ticks, [in_bytes(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(title="Error against size", xlabel="bytes of the whole bundle", ylabel="share of all variance lost")
    _share_axis(axes)
    _legend(axes)


def _residuals(axes: Axes, report: Report) -> None:
    found = sorted(
        (model["residual"] for model in report.models.values() if model["residual"] is not None), reverse=True
    )
    axes.bar(range(1, len(found) + 1), found, color=VERMILLION, alpha=0.75)
    axes.set(
        title="Residual of each model", xlabel="models, largest residual first", ylabel="share of the model's energy"
    )
    _count_axis(axes.xaxis)
    _share_axis(axes)


def _function(axes: Axes, report: Report) -> None:
    assert report.function is not None
    mean, spread = report.function["mean"], report.function["spread"]
    for key, name, label in (("rebuilt", "heldout", "rebuilt"), ("random_basis", "null", "random basis")):
        ranks = sorted(mean[key], key=int)
        error = [spread[key].get(rank) or 0.0 for rank in ranks]
        style = {**_style(name), "label": label}
        axes.errorbar([int(rank) for rank in ranks], floats(mean[key][rank] for rank in ranks), yerr=error, **style)
    controls = {"original": INK, "parent": GREEN, "mean": PINK, "head_only": VERMILLION, "secondary": SKY}
    dashes = ["-", "--", "-.", ":", (0, (5, 1))]
    for (key, colour), dash in zip(controls.items(), dashes, strict=True):
        if mean[key] is not None:
            axes.axhline(mean[key], color=colour, linestyle=dash, lw=1, label=key.replace("_", " "))
    _rank_axis(axes, max([int(rank) for rank in mean["rebuilt"]], default=1))
    axes.set(title=_short(report.function["metric"], 60), xlabel="rank", ylabel="mean over models ± standard error")
    _legend(axes, loc="center left", bbox_to_anchor=(1, 0.5))


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


STATIC: dict[str, Static] = {
    "scree": Static((6.4, 4.0), _scree),
    "cumulative": Static((6.4, 4.0), _cumulative),
    "axes": Static((6.4, 4.0), _axes),
    "heldout": Static((6.4, 4.0), _heldout),
    "mean": Static((4.4, 3.6), _mean),
    "rolemap": Static((6.4, 4.0), _role_map),
    "layerranks": Static((6.4, 5.6), _layer_ranks),
    "similarity": Static((5.6, 4.6), _similarity),
    "map": Static((5.6, 4.6), _map),
    "growthrank": Static((4.8, 3.6), _growth_rank),
    "growthcaptured": Static((4.8, 3.6), _growth),
    "halves": Static((6.4, 3.8), _halves),
    "sizes": Static((6.4, 4.0), _sizes),
    "suitability": Static((6.4, 3.8), _suitability),
    "secondary": Static((6.4, 3.8), _secondary),
    "function": Static((6.4, 3.8), _function),
    "residuals": Static((6.4, 3.8), _residuals),
}
"""One for each figure of the page, by its name there."""
