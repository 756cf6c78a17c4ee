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
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator

from eigenzoo.errors import OutputError, UsageError
from eigenzoo.report import curves
from eigenzoo.report.document import Report, read_document
from eigenzoo.report.figures import all_figures
from eigenzoo.report.numbers import floats
from eigenzoo.report.payload import group_runs, role_map
from eigenzoo.report.suitability import exponents, limits

FORMATS = ("png", "svg", "pdf")

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
    "figure.dpi": 100,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.bbox": "tight",
    "savefig.dpi": 200,
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

LINES: dict[str, dict[str, Any]] = {
    "in_sample": {"label": "in-sample", "color": VERMILLION, "linestyle": "--", "marker": "s"},
    "heldout": {"label": "held out", "color": BLUE, "linestyle": "-", "marker": "o"},
    "null": {"label": "chance, held out", "color": GREY, "linestyle": ":", "marker": "x"},
    "leave_one_out": {"label": "leave-one-out", "color": GREEN, "linestyle": "-.", "marker": "D"},
    "norm_matched": {"label": "unrelated (same norms)", "color": GREY, "linestyle": ":"},
    "iid": {"label": "unrelated (iid)", "color": SKY, "linestyle": ":"},
    "permuted": {"label": "unrelated (permuted)", "color": PINK, "linestyle": "--"},
    "spectrum_matched": {"label": "unrelated (same spectra)", "color": GREEN, "linestyle": "-."},
}


@dataclass(frozen=True)
class Static:
    """A static figure: which of the page's figures it stands for, its size in inches, and how it is drawn."""

    stands_for: str
    size: tuple[float, float]
    draw: Callable[[Axes, Report], None]


def write_figures(
    document: Mapping[str, Any], folder: str | Path, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write the figures that the document has numbers for, each in each format, into a folder that is made if need be.

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
        path.write_bytes(drawn(report, path.stem, path.suffix[1:]))
    return paths


def available(report: Report) -> list[str]:
    """The static figures that the report has numbers for."""
    present = all_figures(report, None)
    return [name for name, static in STATIC.items() if static.stands_for in present]


def drawn(report: Report, name: str, kind: str) -> bytes:
    """Draw one figure; the same bytes for the same report."""
    static, out = STATIC[name], io.BytesIO()
    with _quiet(), rc_context(STYLE):
        canvas = Canvas(figsize=static.size)
        static.draw(canvas.add_subplot(), report)
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
        canvas.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """A name may hold letters that no font here has; they are then drawn as boxes, which is no reason to complain."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def _line(axes: Axes, name: str, x: Any, y: Any, **more: Any) -> None:
    if np.isfinite(floats(y)).any():
        axes.plot(x, y, **{**LINES[name], **more})


def _legend(axes: Axes, **place: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**place)


def _rank_axis(axes: Axes, largest: float) -> None:
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(12) if 2**power <= max(largest, 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
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
    _line(axes, "in_sample", rank, found["spectrum"], label="all layers, in-sample", linestyle="-", marker="o", ms=3)
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
    axes.set_ylim(bottom=0)
    axes.set(title="Variance kept, all layers", xlabel="rank", ylabel="share of variance about the mean")
    _legend(axes)


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
    axes.set_yticks(range(0, len(found["roles"]), step), [_short(role) for role in found["roles"][::step]])
    axes.set(title="Rank above chance by role and depth", xlabel="depth")
    axes.figure.colorbar(image, ax=axes, label="directions")


def _similarity(axes: Axes, report: Report) -> None:
    names, found = report.evidence["names"], report.evidence["lineage"]
    order = found["order"] if sorted(found["order"]) == list(range(len(names))) else list(range(len(names)))
    cosines = np.stack([floats(row) for row in found["cosines"]])[np.ix_(order, order)]
    step = -(-len(names) // 512)
    extent = (-0.5, len(names) - 0.5, len(names) - 0.5, -0.5)
    image = axes.imshow(
        cosines[::step, ::step], cmap=SIGNED, vmin=-1, vmax=1, interpolation="nearest", extent=extent
    )  # fmt: skip
    for _, first, last in group_runs([names[place] for place in order], found["groups"]):
        low, high = first - 0.5, last + 0.5
        axes.plot([low, high, high, low, low], [low, low, high, high, low], color=INK, lw=0.8)
    axes.set(title="Cosine between models, clustered", xlabel="model", ylabel="model")
    axes.figure.colorbar(image, ax=axes, label="cosine")


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
    axes.set_ylim(bottom=0)
    axes.grid(True, axis="y")
    _legend(axes)


def _growth_rank(axes: Axes, report: Report) -> None:
    found = report.evidence["growth"]
    num_models = floats(found["num_models"])
    ranks = curves.fitted(floats(found["var90_rank"]), len(num_models))
    axes.plot(num_models, num_models - 1, color=GREY, linestyle=":", label="most possible, N − 1")
    axes.plot(num_models, ranks, color=VERMILLION, linestyle="--", marker="s", label="for 90 % of variance, in-sample")
    axes.set(title="Rank for 90 % of the variance", xlabel="models fitted", ylabel="directions")
    axes.set_ylim(bottom=0)
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
    axes.grid(True, axis="y")
    _legend(axes)


def _function(axes: Axes, report: Report) -> None:
    assert report.function is not None
    mean, spread = report.function["mean"], report.function["spread"]
    for key, name, label in (("rebuilt", "heldout", "rebuilt"), ("random_basis", "null", "random basis")):
        ranks = sorted(mean[key], key=int)
        error = [spread[key].get(rank) or 0.0 for rank in ranks]
        style = {**LINES[name], "label": label}
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
    "scree": Static("scree", (6.4, 4.0), _scree),
    "heldout": Static("heldout", (6.4, 4.0), _heldout),
    "rolemap": Static("rolemap", (6.4, 4.0), _role_map),
    "similarity": Static("similarity", (5.6, 4.6), _similarity),
    "growthrank": Static("growthrank", (4.8, 3.6), _growth_rank),
    "growthcaptured": Static("growthcaptured", (4.8, 3.6), _growth),
    "halves": Static("halves", (6.4, 3.8), _halves),
    "suitability": Static("suitability", (6.4, 3.8), _suitability),
    "function": Static("function", (6.4, 3.8), _function),
}
