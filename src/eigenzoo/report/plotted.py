"""Numbers that figures plot: tables of columns, for all layers and for each, from which page, pictures and CSV are made.

The first column of a table is its x. A table yields `ALL_LAYERS` first where it has an average over layers, then every layer;
a table of the whole zoo yields one entry, named by an empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from eigenzoo.report import curves
from eigenzoo.report.curves import Curves
from eigenzoo.report.document import Report
from eigenzoo.report.numbers import floats
from eigenzoo.report.sizes import SizeTable, size_table
from eigenzoo.report.suitability import exponents

Entries = Iterator[tuple[str, Curves]]

ALL_LAYERS = "(all layers)"
SIDES = ("outputs", "inputs")
BOTH = "outputs,inputs"
CONTROLS = ("original", "parent", "mean", "head_only", "secondary")
"""Values of a metric that have no rank."""


def spectra(report: Report) -> Entries:
    """Spectra, their nulls, and the running sums of both."""
    yield ALL_LAYERS, curves.with_cumulative(curves.all_layers_spectrum(report))
    for name, layer in report.layers.items():
        yield name, curves.with_cumulative(curves.full_spectrum(layer))


def side(axis: str) -> Callable[[Report], Entries]:
    """Spectra of the layers that have one of this side."""

    def made(report: Report) -> Entries:
        for name, layer in report.layers.items():
            found = layer["axes"].get(axis)
            values = floats(found and found["explained_variance_ratio"])
            if len(values):
                null = curves.fitted(floats(found.get("null")), len(values))
                yield name, {"rank": np.arange(1.0, len(values) + 1), axis: values, f"{axis}_null": null}

    return made


def heldout(report: Report) -> Entries:
    """Variance kept of fitted, held-out and unrelated models."""
    yield ALL_LAYERS, curves.all_layers_heldout(report)
    for name, layer in report.layers.items():
        yield name, curves.heldout_curves(layer)


def leave_one_out(report: Report) -> Entries:
    """Variance kept of one left-out model."""
    known = [(ALL_LAYERS, curves.all_layers_leave_one_out(report))]
    known += [(name, curves.leave_one_out(layer)) for name, layer in report.layers.items()]
    for name, found in known:
        yield name, {"rank": found["rank"], "leave_one_out": found["heldout"]}


def mean(report: Report) -> Entries:
    """The mean alone, as shares of energy; without a place."""

    def shares(in_sample: float | None, held: float | None, null: float | None) -> Curves:
        return {
            "rank": floats([None]),
            "in_sample": floats([in_sample]),
            "heldout": floats([held]),
            "null": floats([null]),
        }

    summary = report.evidence["summary"]
    yield ALL_LAYERS, shares(summary["mean_energy"], summary["mean_heldout"], summary["mean_null"])
    for name, layer in report.layers.items():
        yield name, shares(layer["mean_energy"], layer["mean"]["heldout"], layer["mean"]["null"])


def halves(report: Report) -> Entries:
    """Cosines of the principal angles between two halves of the zoo."""
    yield ALL_LAYERS, curves.all_layers_halves(report)
    for name, layer in report.layers.items():
        yield name, curves.halves_curves(layer)


def growth(report: Report) -> Entries:
    """Rank and variance kept, by number of models; N models span at most N − 1 directions."""
    found = report.evidence["growth"]
    counts = floats(found["num_models"])
    keys = ("var90_rank", "captured", "in_sample", "null", "spread")
    columns = {key: curves.fitted(floats(found[key]), len(counts)) for key in keys}
    yield "", {"num_models": counts, **columns, "most_rank": counts - 1}


def secondary(report: Report) -> Entries:
    """Return the kept shares of the directions after the first k."""
    for name, layer in report.layers.items():
        found = layer["secondary"]
        yield name, {key: floats([found[key]]) for key in ("rank", "in_sample", "captured", "null")}


def halves_exponents(report: Report) -> Entries:
    """Mean and spread of a layer's power-law exponents."""
    for name, layer in report.layers.items():
        found = floats(exponents(layer))
        numbers = [found.mean(), found.std()] if len(found) else [None, None]
        yield (
            name,
            {key: floats([value]) for key, value in zip(("rank", "mean", "spread"), (None, *numbers), strict=True)},
        )


def metric(series: str) -> Callable[[Report], Entries]:
    """The metric's mean over models by rank, and its standard error."""

    def made(report: Report) -> Entries:
        assert report.function is not None
        found, spread = report.function["mean"][series], report.function["spread"][series]
        ranks = sorted(found, key=int)
        yield (
            "",
            {
                "rank": floats(map(int, ranks)),
                series: floats(found[rank] for rank in ranks),
                "spread": floats(spread.get(rank) or 0.0 for rank in ranks),
            },
        )

    return made


def metric_controls(report: Report) -> Entries:
    """The metric's mean over models of the controls that have no rank."""
    assert report.function is not None
    found = report.function["mean"]
    yield "", {"rank": floats([None]), **{name: floats([found[name]]) for name in CONTROLS}}


def lost(report: Report) -> Entries:
    """Share of variance lost, by bytes of the bundle, and the bytes of the models' files."""
    table: SizeTable | None = size_table(report)
    assert table is not None
    rows = table.by_rank
    shares = {key: 1 - floats(getattr(row, key) for row in rows) for key in ("in_sample", "heldout", "null")}
    yield "", {"bytes": floats(row.bytes for row in rows), **shares, "whole_zoo": floats([table.whole_zoo or None])}


def rates(axes: str) -> Callable[[Report], Entries]:
    """Share of held-out models' variance that sides lose, by the bytes of the bundle."""

    def made(report: Report) -> Entries:
        yield "", _lost([row for row in (report.rates or {"rows": []})["rows"] if row["axes"] == axes], "heldout")

    return made


def cut_alone(about: str) -> Callable[[Report], Entries]:
    """Share of the variance that models cut alone lose, by the bytes of all of them."""

    def made(report: Report) -> Entries:
        yield "", _lost([row for row in (report.rates or {"alone": []})["alone"] if row["about"] == about], "captured")

    return made


def this_bundle(report: Report) -> Entries:
    """The bundle that the report is of."""
    own = (report.rates or {"bundle": None})["bundle"]
    yield "", _lost([own] if own is not None else [], "heldout")


def _lost(rows: list[dict[str, Any]], kept: str) -> Curves:
    known = [row for row in rows if row[kept] is not None]
    return {"bytes": floats(row["bytes"] for row in known), "lost": floats(1 - row[kept] for row in known)}


def kept_by_sides(axes: str) -> Callable[[Report], Entries]:
    """Share of variance that sides keep of fitted and held-out models."""

    def made(report: Report) -> Entries:
        found = report.evidence["summary"]["sides"].get(axes) or {"rank": [], "in_sample": [], "captured": []}
        yield "", {key: floats(found[key]) for key in ("rank", "in_sample", "captured")}

    return made


def residuals(report: Report) -> Entries:
    """Residuals of the models, largest first."""
    known = sorted(
        (model["residual"] for model in report.models.values() if model["residual"] is not None), reverse=True
    )
    yield "", {"model": np.arange(1.0, len(known) + 1), "residual": floats(known)}


TABLES: dict[str, Callable[[Report], Entries]] = {
    "spectra": spectra,
    **{axis: side(axis) for axis in SIDES},
    "heldout": heldout,
    "leave_one_out": leave_one_out,
    "mean": mean,
    "halves": halves,
    "growth": growth,
    "secondary": secondary,
    "exponents": halves_exponents,
    **{series: metric(series) for series in ("rebuilt", "random_basis", "alone")},
    "controls": metric_controls,
    "lost": lost,
    **{f"rates_{axes}": rates(axes) for axes in (*SIDES, BOTH)},
    **{f"alone_{about}": cut_alone(about) for about in ("zero", "mean")},
    "bundle": this_bundle,
    **{f"kept_{axes}": kept_by_sides(axes) for axes in (*SIDES, BOTH)},
    "residuals": residuals,
}
SECTIONS = {
    "spectrum": ("spectra",),
    "axes": SIDES,
    "heldout": ("heldout", "leave_one_out"),
    "mean": ("mean",),
    "halves": ("halves",),
    "growth": ("growth",),
    "secondary": ("secondary",),
}
"""Sections of the CSV that are tables as they are."""


def shown(found: Curves) -> Curves:
    """A table as figures show it: spectra at about forty ranks."""
    return curves.thinned(found) if "rank" in found else found
