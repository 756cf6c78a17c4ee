"""Yield all numbers of a report as rows of one long table: section, layer, model, series, x, y.

A section is a figure of the page. The figure's download has the same rows at about forty ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from eigenzoo.report.curves import Curves
from eigenzoo.report.document import Report, has_similarity
from eigenzoo.report.plotted import ALL_LAYERS, CONTROLS, SECTIONS, TABLES, shown
from eigenzoo.report.sizes import SizeTable

Cell = str | int | float | None
Row = tuple[str, str, str, str, Cell, Cell]
Maker = Callable[[Report, bool], Iterator[Row]]

HEADER = ("section", "layer", "model", "series", "x", "y")
SCALARS = ("num_values", "energy", "variance", "effective_rank", "mean_energy")


def _points(section: str, layer: str, found: Curves) -> Iterator[Row]:
    x, *columns = found
    places = [_counted(place) for place in found[x].tolist()]
    for series in columns:
        for place, value in zip(places, found[series].tolist(), strict=False):
            if value == value:
                yield section, layer, "", series, place, _counted(value) if series.endswith("_rank") else value


def _counted(value: float) -> Cell:
    """A count without a decimal point; empty where there is none."""
    return "" if value != value else int(value) if value == int(value) else value


def layers(report: Report, thin: bool = False) -> Iterator[Row]:
    """Single numbers of every layer."""
    for name, layer in report.layers.items():
        for axis, length in zip(("outputs", "inputs"), layer["shape"], strict=False):
            yield "layers", name, "", axis, "", length
        for series in SCALARS:
            yield "layers", name, "", series, "", layer[series]
        for series in ("auto", "var90"):
            yield "layers", name, "", f"rank_{series}", "", layer["rank"][series]
        yield "layers", name, "", "mean_heldout", "", layer["mean"]["heldout"]
        yield "layers", name, "", "mean_null", "", layer["mean"]["null"]
        for series in ("rank", "p_value", "ratio"):
            yield "layers", name, "", f"test_{series}", "", layer["test"][series]
        yield "layers", name, "", "verdict", "", layer["verdict"]


def plotted_rows(section: str) -> Maker:
    """The tables of a section, layer by layer."""

    def made(report: Report, thin: bool = False) -> Iterator[Row]:
        tables = [dict(TABLES[table](report)) for table in SECTIONS[section]]
        for layer in ("", ALL_LAYERS, *report.layers):
            for table in tables:
                if layer in table:
                    yield from _points(section, layer, shown(table[layer]) if thin else table[layer])

    return made


def similarity(report: Report, thin: bool = False) -> Iterator[Row]:
    """Cosines between models, each pair once; the series is the second model."""
    if not has_similarity(report):
        return
    names, cosines = report.evidence["names"], report.evidence["lineage"]["cosines"]
    for place, row in enumerate(cosines):
        for other in range(place + 1, len(row)):
            yield "similarity", "", names[place], names[other], "", row[other]


def lineage(report: Report, thin: bool = False) -> Iterator[Row]:
    """Lineage groups, duplicates, and what is captured across and within lineages."""
    found = report.evidence["lineage"]
    for number, group in enumerate(found["groups"], 1):
        for model in group:
            yield "lineage", "", model, "group", "", number
    for first, second in found["duplicates"]:
        yield "lineage", "", first, "duplicate_of", "", second
    kinds = [("across", found["across"])] if found["across"]["rank"] else []
    kinds += [(f"within_{number}", within) for number, within in enumerate(found["within"], 1)]
    for kind, record in kinds:
        for series in ("captured", "null"):
            for rank, value in zip(record.get("rank") or [], record.get(series) or [], strict=False):
                yield "lineage", "", "", f"{kind}_{series}", rank, value
        yield "lineage", "", "", f"{kind}_mean", "", record.get("mean")


def model_map(report: Report, thin: bool = False) -> Iterator[Row]:
    """The models' first coefficients and the shares of variance that they hold."""
    for model, place in report.evidence["map"].items():
        for number, value in enumerate(place, 1):
            yield "map", "", model, "coefficient", number, value
    for number, value in enumerate(report.evidence["map_shares"], 1):
        yield "map", "", "", "share", number, value


def suitability(report: Report, thin: bool = False) -> Iterator[Row]:
    """Power-law exponents of the zoo and of random halves, and what the rule makes of them."""
    for name, layer in report.layers.items():
        for series in ("exponent", "xmin", "mean", "spread", "share", "q"):
            yield "suitability", name, "", series, "", layer["suitability"][series]
        for number, value in enumerate(layer["suitability"]["exponents"], 1):
            yield "suitability", name, "", "exponent_of_half", number, value
        score = layer["suitability"]["alpha_score"] or {"exponents": ()}
        for series in ("mean", "spread", "share", "q"):
            yield "suitability", name, "", f"alpha_{series}", "", score.get(series)
        for model, value in zip(report.evidence["names"], score["exponents"], strict=False):
            yield "suitability", name, model, "alpha", "", value


def function(report: Report, thin: bool = False) -> Iterator[Row]:
    """The metric of every model, their mean, and its standard error."""
    if report.function is None:
        return
    known = {"(mean)": report.function["mean"], "(standard error)": report.function["spread"]}
    for model, outcome in {**known, **report.function["models"]}.items():
        for series in CONTROLS:
            yield "function", "", model, series, "", outcome[series]
        for series in ("rebuilt", "random_basis", "alone"):
            for rank, value in outcome[series].items():
                yield "function", "", model, series, int(rank), value


def residuals(report: Report, thin: bool = False) -> Iterator[Row]:
    """The share of every model's energy outside the fitted subspace."""
    for model, record in report.models.items():
        yield "residuals", "", model, "residual", "", record["residual"]
        yield "residuals", "", model, "energy", "", record["energy"]


def rates(report: Report, thin: bool = False) -> Iterator[Row]:
    """Bytes and shares kept of sides, of models cut alone, and of the bundle."""
    found = report.rates
    if found is None:
        return
    rows = [(row["axes"], row) for row in found["rows"]]
    rows += [("alone" if row["about"] == "zero" else "alone_about_mean", row) for row in found["alone"]]
    rows += [] if found["bundle"] is None else [("bundle", found["bundle"])]
    for name, row in rows:
        for series in ("bytes", "per_model", "captured", "heldout"):
            yield "rates", "", "", f"{name}_{series}", "" if row["rank"] is None else row["rank"], row[series]


def sides(report: Report, thin: bool = False) -> Iterator[Row]:
    """Shares of fitted and held-out models that sides keep, all layers by their variance."""
    for axes, found in report.evidence["summary"]["sides"].items():
        for series in ("in_sample", "captured"):
            for rank, value in zip(found["rank"], found[series], strict=False):
                yield "sides", "", "", f"{axes}_{series}", rank, value


def size_rows(table: SizeTable) -> Iterator[Row]:
    """Yield size and loss of every rank and every threshold."""
    for kind, rows in (("rank", table.by_rank), ("threshold", table.by_threshold)):
        for row in rows:
            at = row.rank if kind == "rank" else row.threshold
            values: dict[str, Any] = {
                "bytes": row.bytes,
                "in_sample": row.in_sample,
                "heldout": row.heldout,
                "null": row.null,
                "residual": row.residual,
                "break_even_models": row.break_even_models,
            }
            for series, value in values.items():
                yield "sizes", "", "", f"{series}_by_{kind}", at, value


MAKERS: dict[str, Maker] = {
    "layers": layers,
    **{section: plotted_rows(section) for section in ("spectrum", "axes", "heldout", "mean", "halves")},
    "similarity": similarity,
    "lineage": lineage,
    "map": model_map,
    "growth": plotted_rows("growth"),
    "suitability": suitability,
    "secondary": plotted_rows("secondary"),
    "function": function,
    "residuals": residuals,
    "rates": rates,
    "sides": sides,
}
