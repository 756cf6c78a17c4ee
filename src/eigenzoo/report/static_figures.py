"""Draw static figures with matplotlib, for papers and for the page without JavaScript.

One colour and one sign per kind of number, all through: Okabe and Ito's palette, which the colour-blind can tell apart.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.backend_bases import get_registered_canvas_class
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from eigenzoo.display import in_bytes, in_percent
from eigenzoo.errors import OutputError, UsageError
from eigenzoo.report.curves import Curves
from eigenzoo.report.document import Report, read_document
from eigenzoo.report.figures import Figure, Mark, all_figures
from eigenzoo.report.numbers import Floats, floats
from eigenzoo.report.payload import role_map
from eigenzoo.report.plotted import ALL_LAYERS, TABLES, shown
from eigenzoo.report.series import SERIES
from eigenzoo.report.similarity import clustered
from eigenzoo.report.sizes import size_table
from eigenzoo.report.suitability import limits

FORMATS = ("png", "svg", "pdf")

CENTIMETRES = 2.54
"""Centimetres per inch, matplotlib's unit."""

BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
GREY, INK = "#767b84", "#24262b"
SHADES = LinearSegmentedColormap.from_list("shades", ["#eef3f7", "#7fb0cf", "#004b77"])
SIGNED = LinearSegmentedColormap.from_list("signed", [VERMILLION, "#ffffff", BLUE])

STYLE: Any = {  # matplotlib declares each key's type
    "axes.axisbelow": True,
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
    "ink": INK,
}
DASHES = {"solid": "-", "dash": "--", "longdash": "--", "dot": ":", "dashdot": "-.", "longdashdot": "-."}
HATCHES = {"in_sample": "//", "null": ".."}
SIGNS = {"circle": "o", "square": "s", "triangle-up": "^", "x": "x", "diamond": "D"}


def _style(name: str) -> dict[str, Any]:
    """Return how matplotlib draws a kind of number; without signs it is a line alone."""
    kind = SERIES[name]
    style = {"label": kind.name, "color": COLOURS[kind.colour], "linestyle": DASHES[kind.dash]}
    return {**style, "marker": SIGNS[kind.symbol]} if kind.symbol else style


SMALLEST_LETTERS, LARGEST_LETTERS = 0.7, 1.6
"""Bounds of the scale of letters: 9 points become 6 to 14."""

MOST_NAMES = 40
"""Largest number of layers with readable names beside their rows."""

MOST_GROUPS = 12
"""Largest number of lineage groups in a legend."""


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
    figures = all_figures(report, size_table(report))
    paths = [folder / f"{name}.{kind}" for name in figures for kind in formats]
    for path in paths:
        if path.exists():
            raise OutputError("exists already", where=str(path), next_step="name an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.write_bytes(drawn(report, figures[path.stem], path.suffix[1:], width))
    return paths


def drawn(report: Report, figure: Figure, kind: str, width: float | None = None) -> bytes:
    """Draw one figure, `width` centimetres wide; the same bytes for the same report."""
    size, out = SIZES.get(figure.name, USUAL), io.BytesIO()
    scale = 1.0 if width is None else width / CENTIMETRES / size[0]
    with _quiet(), rc_context({**STYLE, **_letters(scale)}):
        canvas = Canvas(figsize=(scale * size[0], scale * size[1]), layout="constrained")
        OWN.get(figure.name, _draw)(canvas.add_subplot(), figure, report)
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
    """Return sizes of letters for a figure of another size. They are scaled within readable limits."""
    factor = min(max(scale, SMALLEST_LETTERS), LARGEST_LETTERS)
    sizes = ("font.size", "axes.titlesize", "legend.fontsize", "lines.linewidth", "lines.markersize")
    return {name: factor * STYLE[name] for name in sizes}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide matplotlib's warnings about letters without a glyph, which are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def _draw(axes: Axes, figure: Figure, report: Report) -> None:
    """Draw a figure that is described by marks."""
    first: dict[str, tuple[str, Curves]] = {}
    for mark in figure.marks:
        if (
            mark.table not in first
        ):  # the average over layers where there is one; of sides, the first layer that has them
            first[mark.table] = next(((name, shown(found)) for name, found in TABLES[mark.table](report)), ("", {}))
    ends = [1.0]
    for mark in figure.marks:
        found = _each_layer(report, mark.table) if mark.kind == "points" else first[mark.table][1]
        values = found.get(mark.column, floats([]))
        if np.isfinite(values).any():
            x = next(iter(found.values()))
            ends.append(float(np.nanmax([*x, 1])))
            MARKS[mark.kind](axes, mark, x, found)
    if figure.name == "suitability":
        limit = limits(report.evidence["suitability"]["thresholds"])
        axes.axhspan(limit["low"], limit["high"], color=GREEN, alpha=0.12, lw=0, label="suitable")
    _scale(axes, "x", figure.x.scale, max(ends))
    _scale(axes, "y", figure.y.scale, max(ends))
    layer = next(iter(first.values()))[0] if figure.by_layer else ""
    _name(axes, figure, ", all layers" if layer == ALL_LAYERS else layer and f": {_short(layer)}")
    if "bar" not in {mark.kind for mark in figure.marks} and axes.get_legend_handles_labels()[0]:
        beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(**(beside if "level" in {mark.kind for mark in figure.marks} else {}))


def _each_layer(report: Report, table: str) -> Curves:
    """The single values of every layer, by the layer's number."""
    found = [values for _, values in TABLES[table](report)]
    columns = {name: floats(values[name][0] for values in found) for name in found[0]}
    return {
        "layer": np.arange(1.0, len(found) + 1),
        **{key: column for key, column in columns.items() if key != "rank"},
    }


def _line(axes: Axes, mark: Mark, x: Floats, found: Curves) -> None:
    style = {**_style(mark.look), "label": mark.name}
    if mark.kind == "curve":
        style["marker"] = ""
    if mark.kind == "points":
        style |= {"linestyle": "", "elinewidth": 0.8} if mark.error else {"linestyle": ""}
    if mark.error:
        axes.errorbar(x, found[mark.column], yerr=np.nan_to_num(found[mark.error]), **style)
    else:
        axes.plot(x, found[mark.column], **style)


def _band(axes: Axes, mark: Mark, x: Floats, found: Curves) -> None:
    colour = COLOURS[SERIES[mark.look].colour]
    axes.fill_between(x, found[mark.low], found[mark.column], color=colour, alpha=0.22, lw=0, label=mark.name)


def _bar(axes: Axes, mark: Mark, x: Floats, found: Curves) -> None:
    colour, values = COLOURS[SERIES[mark.look].colour], found[mark.column]
    if len(values) > 1 or np.isfinite(x).all():
        axes.bar(x, values, color=colour, alpha=0.75)
        return
    hatch = HATCHES.get(mark.look)
    bar = axes.bar(
        [mark.name], values, edgecolor=colour, facecolor="white" if hatch else colour, hatch=hatch, width=0.5
    )
    axes.bar_label(bar, [in_percent(value) for value in values], padding=2)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.margins(y=0.12)


def _across(axes: Axes, mark: Mark, x: Floats, found: Curves) -> None:
    draw = axes.axvline if mark.kind == "upright" else axes.axhline
    draw(float(found[mark.column][0]), lw=1.2, **{**_style(mark.look), "label": mark.name})


MARKS = {
    "line": _line,
    "curve": _line,
    "points": _line,
    "band": _band,
    "bar": _bar,
    "level": _across,
    "upright": _across,
}


def _scale(axes: Axes, which: str, scale: str, largest: float) -> None:
    """Set ticks and ends of an axis for a scale of `figures.Axis`."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if scale == "rank":
        axes.set_xscale("log", base=2)
        ticks = [2**power for power in range(12) if 2**power <= largest]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    elif scale == "bytes":
        axes.set_xscale("log")
        found = _log_ticks(*axes.get_xlim(), 10.0**4)
        ticks_of_bytes = found if len(found) > 1 else list(axes.get_xlim())  # sizes that are nearly the same
        axes.set_xticks(ticks_of_bytes, [in_bytes(tick) for tick in ticks_of_bytes])
        axes.minorticks_off()
    elif scale == "count":
        axis.set_major_locator(MaxNLocator(integer=True))
    elif scale == "share":
        axis.set_major_formatter(PercentFormatter(1.0))
    elif scale == "log share" and axes.lines:  # labelled without TeX, which names must not reach
        axes.set_yscale("log")
        ticks_of_shares = _log_ticks(*axes.get_ylim(), 1000)
        labels = [f"{100 * tick:.0g}%" if tick < 0.1 else f"{100 * tick:.0f}%" for tick in ticks_of_shares]
        axes.set_yticks(ticks_of_shares, labels, minor=False)
        axes.yaxis.set_minor_locator(NullLocator())
    if which == "y":
        axes.grid(True, axis="y")
        if scale in ("share", "count") and axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
        if scale == "cosine":
            axes.set_ylim(0, 1.03)


def _log_ticks(low: float, high: float, most: float) -> list[float]:
    """Ticks at 1, 2 and 5 times powers of ten; at the powers alone where the axis spans more than a factor."""
    powers = range(floor(log10(low)), ceil(log10(high)))
    steps = (1, 2, 5) if high < most * low else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _name(axes: Axes, figure: Figure, of: str = "") -> None:
    """Write the title, in lines that fit, and the axes' labels."""
    columns = int(72 * axes.figure.bbox.width / axes.figure.dpi / (0.62 * float(rcParams["axes.titlesize"])))
    title = textwrap.fill(_short(figure.title, 80) + of, columns)
    axes.set(title=title, xlabel=figure.x.label, ylabel=figure.y.label)


def _heat(axes: Axes, figure: Figure, table: Floats, **more: Any) -> Any:
    """Draw a heat map with its scale of colours."""
    image = axes.imshow(table, **{"cmap": SHADES, "interpolation": "nearest", "aspect": "auto", **more})
    _name(axes, figure)
    return axes.figure.colorbar(image, ax=axes, label=figure.value)


def _layer_ranks(axes: Axes, figure: Figure, report: Report) -> None:
    ranks = sorted({rank for layer in report.layers.values() for rank in layer["heldout"]["rank"]})
    table = np.full((len(report.layers), len(ranks)), np.nan)
    for row, layer in enumerate(report.layers.values()):
        for rank, value in zip(layer["heldout"]["rank"], floats(layer["heldout"]["captured"]), strict=False):
            table[row, ranks.index(rank)] = value
    bar = _heat(axes, figure, table, vmin=0)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    if len(report.layers) <= MOST_NAMES:
        axes.set_yticks(range(len(report.layers)), [_short(name, 28) for name in report.layers])
        axes.tick_params(axis="y", labelsize=float(rcParams["font.size"]) * min(0.8, 25 / len(report.layers)))
        axes.set_ylabel("")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _role_map(axes: Axes, figure: Figure, report: Report) -> None:
    found = role_map(report)
    table = np.full((len(found["roles"]), len(found["depths"])), np.nan)
    for row, column, _, _, auto, *_ in found["cells"]:
        table[row, column] = np.nan if auto is None else auto
    _heat(axes, figure, table).locator = MaxNLocator(integer=True)
    depths = ["–" if depth is None else str(depth) for depth in found["depths"]]
    step = max(1, len(depths) // 16)
    axes.set_xticks(range(0, len(depths), step), depths[::step])
    step = max(1, len(found["roles"]) // 24)
    axes.set_yticks(range(0, len(found["roles"]), step), [_short(role, 36) for role in found["roles"][::step]])
    axes.tick_params(axis="y", labelsize=float(rcParams["font.size"]) * min(1.0, 14 / len(found["roles"][::step])))


def _similarity(axes: Axes, figure: Figure, report: Report) -> None:
    found = clustered(report)
    num, step = len(found.names), -(-len(found.names) // 512)
    _heat(
        axes,
        figure,
        found.cosines_NN[::step, ::step],
        cmap=SIGNED if found.low < 0 else SHADES,
        vmin=found.low,
        vmax=found.high,
        aspect="equal",
        extent=(0.5, num + 0.5, num + 0.5, 0.5),
    )
    for _, first, last in found.runs:
        start, end = first + 0.5, last + 1.5
        axes.plot([start, end, end, start, start], [start, start, end, end, start], color=INK, lw=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _map(axes: Axes, figure: Figure, report: Report) -> None:
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
    _name(axes, figure)
    if len(known) <= MOST_GROUPS:
        axes.legend()


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


OWN = {"layerranks": _layer_ranks, "rolemap": _role_map, "similarity": _similarity, "map": _map}
"""Drawers of maps, which no marks describe."""

USUAL = (6.4, 4.0)
SIZES = {
    "mean": (4.4, 3.6),
    "layerranks": (6.4, 5.6),
    "similarity": (5.6, 4.6),
    "map": (5.6, 4.6),
    "growthrank": (4.8, 3.6),
    "growthcaptured": (4.8, 3.6),
}
"""Sizes in inches of figures that are not of the usual one."""
