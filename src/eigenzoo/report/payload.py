"""What the page's scripts draw from: one JSON document, thinned and rounded."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from eigenzoo.report import curves
from eigenzoo.report.document import Report
from eigenzoo.report.figures import Figure
from eigenzoo.report.numbers import at_rank, floats, rounded, weighted_mean
from eigenzoo.report.series import SERIES
from eigenzoo.report.similarity import clustered
from eigenzoo.report.sizes import SizeRow, SizeTable
from eigenzoo.report.suitability import exponents
from eigenzoo.report.tables import layer_sentence

Json = dict[str, Any]

NUM_SHADES = 255
"""Steps between the least and the largest cosine of a page: one byte each."""


def payload(report: Report, figures: Mapping[str, Figure], sizes: SizeTable | None) -> Json:
    """Everything that is drawn; only what a figure needs."""
    makers = {
        "scree": ("spectra", spectra),
        "axes": ("axes", side_spectra),
        "heldout": ("heldout", heldout),
        "mean": ("mean", mean),
        "rolemap": ("rolemap", role_map),
        "similarity": ("similarity", similarity),
        "map": ("map", model_map),
        "growthrank": ("growth", growth),
        "growthcaptured": ("growth", growth),
        "halves": ("halves", halves),
        "suitability": ("suitability", suitability),
        "secondary": ("secondary", secondary),
        "function": ("function", function),
        "residuals": ("residuals", residuals),
    }
    roles = all_roles(report)
    found: Json = {
        "rank": report.rank,
        "layers": [
            {"name": name, "role": roles.index(layer["role"]), "sentence": layer_sentence(name, report)}
            for name, layer in report.layers.items()
        ],
        "by_name": [list(report.layers).index(name) for name in report.by_name],
        "figures": list(figures),
        "kinds": {name: vars(kind) for name, kind in SERIES.items()},
    }
    for figure, (key, make) in makers.items():
        if figure in figures and key not in found:
            found[key] = make(report)
    if sizes is not None:
        found["sizes"] = size_data(sizes, report)
    return found


def _rounded(found: curves.Curves) -> Json:
    return {name: rounded(values) for name, values in found.items()}


def spectra(report: Report) -> Json:
    """Spectra of all layers and of each, at about forty ranks."""
    known = [curves.all_layers_spectrum(report), *map(curves.full_spectrum, report.layers.values())]
    return _all_and_each([_rounded(curves.thinned(curves.with_cumulative(found))) for found in known])


def _all_and_each(found: list[Json]) -> Json:
    return {"all": found[0], "layers": found[1:]}


def side_spectra(report: Report) -> Json:
    """Spectra of outputs and inputs of each layer."""
    layers = []
    for layer in report.layers.values():
        sides = {}
        for axis, side in layer["axes"].items():
            values = floats(side["explained_variance_ratio"])
            found = {
                "rank": np.arange(1.0, len(values) + 1),
                "spectrum": values,
                "null": curves.fitted(floats(side.get("null")), len(values)),
            }
            sides[axis] = _rounded(curves.thinned(found)) if len(values) else {}
        layers.append(sides)
    return {"layers": layers}


def heldout(report: Report) -> Json:
    """Held-out curves of all layers and of each, with leave-one-out."""
    known = [(curves.all_layers_heldout(report), curves.all_layers_leave_one_out(report))]
    known += [(curves.heldout_curves(layer), curves.leave_one_out(layer)) for layer in report.layers.values()]
    return _all_and_each([{**_rounded(found), "leave_one_out": _rounded(left)} for found, left in known])


def mean(report: Report) -> Json:
    """The mean's shares of energy: in-sample, held out, by chance."""
    summary = report.evidence["summary"]
    layers = [
        (layer["mean_energy"], layer["mean"]["heldout"], layer["mean"]["null"]) for layer in report.layers.values()
    ]
    whole = (summary["mean_energy"], summary["mean_heldout"], summary["mean_null"])
    return _all_and_each([*map(rounded, [whole, *layers])])  # type: ignore[list-item]


def all_roles(report: Report) -> list[str]:
    """The roles in the layers' order."""
    return list(dict.fromkeys(layer["role"] for layer in report.layers.values()))


def role_map(report: Report) -> Json:
    """Cells of role × depth: which layers fall into each, and their averages."""
    depths = sorted({layer["depth"] for layer in report.layers.values() if layer["depth"] is not None})
    columns: list[int | None] = [*depths]
    if any(layer["depth"] is None for layer in report.layers.values()):
        columns.append(None)
    roles = all_roles(report)
    cells: dict[tuple[int, int], list[int]] = {}
    numbers = []
    for place, layer in enumerate(report.layers.values()):
        cells.setdefault((roles.index(layer["role"]), columns.index(layer["depth"])), []).append(place)
        held = layer["heldout"]
        captured, null = (at_rank(held["rank"], held[key], report.rank) for key in ("captured", "null"))
        beyond = captured - null if captured is not None and null is not None else None
        numbers.append((layer["rank"]["auto"], layer["rank"]["var90"], captured, beyond))
    table = []
    for (row, column), places in cells.items():
        averages = [weighted_mean([numbers[place][key] for place in places], [1.0] * len(places)) for key in range(4)]
        table.append([row, column, len(places), places[0], *rounded(averages)])
    return {"roles": roles, "depths": columns, "cells": table}


NUM_SHADES = 255
"""Steps between the least and the largest cosine of a page: one byte each."""


def similarity(report: Report) -> Json:
    """The matrix of cosines in clustered order: one byte each, in equal steps over the range of their colours."""
    found = clustered(report)
    shades = np.round(NUM_SHADES * (found.cosines_NN - found.low) / (found.high - found.low)).clip(0, NUM_SHADES)
    return {
        "names": found.names,
        "cosines": base64.b64encode(shades.astype(np.uint8).tobytes()).decode("ascii"),
        "range": [found.low, found.high],
        "runs": found.runs,
    }


def model_map(report: Report) -> Json:
    """The models' first coefficients, with their lineage groups."""
    groups = report.evidence["lineage"]["groups"]
    group_of = {name: number for number, group in enumerate(groups) if len(group) > 1 for name in group}
    points = [[name, group_of.get(name), *rounded(place)] for name, place in report.evidence["map"].items()]
    return {"points": points, "shares": rounded(report.evidence["map_shares"])}


def growth(report: Report) -> Json:
    """Growth as it is."""
    found = report.evidence["growth"]
    keys = ("num_models", "var90_rank", "captured", "in_sample", "null", "spread")
    return {key: rounded(found[key]) for key in keys}


def halves(report: Report) -> Json:
    """Cosines of all layers and of each."""
    known = [curves.all_layers_halves(report), *map(curves.halves_curves, report.layers.values())]
    return _all_and_each([_rounded(curves.thinned(found)) for found in known])


def suitability(report: Report) -> Json:
    """Every layer's exponents."""
    return {"exponents": [rounded(exponents(layer)) for layer in report.layers.values()]}


def secondary(report: Report) -> Json:
    """What the directions after the first k keep."""
    known = [layer["secondary"] for layer in report.layers.values()]
    return {key: rounded(record[key] for record in known) for key in ("in_sample", "captured", "null")}


def function(report: Report) -> Json:
    """The metric's averages and standard errors."""
    assert report.function is not None
    found: Json = {"metric": report.function["metric"]}
    for key in ("mean", "spread"):
        record = report.function[key]
        found[key] = {
            name: rounded([record[name]])[0] for name in ("original", "parent", "mean", "head_only", "secondary")
        }
        for name in ("rebuilt", "random_basis"):
            found[key][name] = [[int(rank), *rounded([record[name][rank]])] for rank in sorted(record[name], key=int)]
    return found


def residuals(report: Report) -> Json:
    """Residuals, largest first."""
    known = [(model["residual"], name) for name, model in report.models.items() if model["residual"] is not None]
    known.sort(key=lambda item: -item[0])
    return {"names": [name for _, name in known], "residual": rounded(residual for residual, _ in known)}


def size_data(sizes: SizeTable, report: Report) -> Json:
    """Both sliders' places, one list per number."""

    def rows(of: tuple[SizeRow, ...]) -> Json:
        return {
            "at": [row.threshold if row.rank is None else row.rank for row in of],
            "ranks": [[row.ranks[0], row.ranks[len(row.ranks) // 2], row.ranks[-1]] if row.ranks else [] for row in of],
            "bytes": [row.bytes for row in of],
            "per_model": [row.per_model for row in of],
            "break_even": [row.break_even_models for row in of],
            **{
                key: rounded(getattr(row, key) for row in of)
                for key in ("in_sample", "heldout", "null", "residual", "ratio")
            },
        }

    found: Json = {
        "whole_zoo": sizes.whole_zoo,
        "num_models": sizes.num_models,
        "by_rank": rows(sizes.by_rank),
        "by_threshold": rows(sizes.by_threshold),
    }
    if report.function is not None:
        found["function"] = function(report)
    return found
