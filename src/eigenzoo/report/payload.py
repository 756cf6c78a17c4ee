"""Make the data of the page's scripts: one JSON document with selected ranks and rounded numbers."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from eigenzoo.report.document import Report
from eigenzoo.report.figures import Figure
from eigenzoo.report.numbers import at_rank, rounded, weighted_mean
from eigenzoo.report.plotted import ALL_LAYERS, TABLES, shown
from eigenzoo.report.series import SERIES
from eigenzoo.report.similarity import clustered
from eigenzoo.report.sizes import SizeRow, SizeTable
from eigenzoo.report.suitability import exponents
from eigenzoo.report.tables import layer_sentence

Json = dict[str, Any]

NUM_SHADES = 255
"""Steps between the least and the largest cosine of a page: one byte each."""


def payload(report: Report, figures: Mapping[str, Figure], sizes: SizeTable | None) -> Json:
    """Return the data of all figures."""
    makers = {
        "rolemap": role_map,
        "similarity": similarity,
        "map": model_map,
        "suitability": suitability,
    }
    roles = all_roles(report)
    found: Json = {
        "rank": report.rank,
        "layers": [
            {"name": name, "role": roles.index(layer["role"]), "sentence": layer_sentence(name, report)}
            for name, layer in report.layers.items()
        ],
        "by_name": [list(report.layers).index(name) for name in report.by_name],
        "figures": {name: description(figure) for name, figure in figures.items()},
        "kinds": {name: vars(kind) for name, kind in SERIES.items()},
    }
    found |= {name: make(report) for name, make in makers.items() if name in figures}
    # The page judges each layer's exponents anew at every move of a slider, so it needs all of them and no mean.
    drawn = {mark.table for name, figure in figures.items() if name != "suitability" for mark in figure.marks}
    found |= {table: table_columns(table, report) for table in TABLES if table in drawn}
    if "residuals" in figures:
        found["residual_names"] = residual_names(report)
    if sizes is not None:
        found["sizes"] = size_data(sizes, report)
    return found


def description(figure: Figure) -> Json:
    """Axes and marks of a figure, which its drawer follows."""
    marks = [{**vars(mark), "label": mark.name} for mark in figure.marks]
    return {
        "x": vars(figure.x),
        "y": vars(figure.y),
        "marks": marks,
        "value": figure.value,
        "by_layer": figure.by_layer,
    }


def table_columns(table: str, report: Report) -> Json:
    """A table of all layers and of each, at about forty ranks; layers without numbers have no columns."""
    known = {
        layer: {name: rounded(values) for name, values in shown(found).items()}
        for layer, found in TABLES[table](report)
    }
    whole = known.get("", known.get(ALL_LAYERS, {}))
    return {"all": whole, "layers": [] if "" in known else [known.get(name, {}) for name in report.layers]}


def all_roles(report: Report) -> list[str]:
    """Return the roles in the layers' order."""
    return list(dict.fromkeys(layer["role"] for layer in report.layers.values()))


def role_map(report: Report) -> Json:
    """Return the layers of each cell of role × depth, and their averages."""
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


def similarity(report: Report) -> Json:
    """Return the matrix of cosines in clustered order: one byte each, in equal steps over the range of their colours."""
    found = clustered(report)
    shades = np.round(NUM_SHADES * (found.cosines_NN - found.low) / (found.high - found.low)).clip(0, NUM_SHADES)
    return {
        "names": found.names,
        "cosines": base64.b64encode(shades.astype(np.uint8).tobytes()).decode("ascii"),
        "range": [found.low, found.high],
        "runs": found.runs,
    }


def model_map(report: Report) -> Json:
    """Return the models' first coefficients, with their lineage groups."""
    groups = report.evidence["lineage"]["groups"]
    group_of = {name: number for number, group in enumerate(groups) if len(group) > 1 for name in group}
    points = [[name, group_of.get(name), *rounded(place)] for name, place in report.evidence["map"].items()]
    return {"points": points, "shares": rounded(report.evidence["map_shares"])}


def suitability(report: Report) -> Json:
    """Return every layer's exponents."""
    return {"exponents": [rounded(exponents(layer)) for layer in report.layers.values()]}


def residual_names(report: Report) -> list[str]:
    """The models that have residuals, the largest first."""
    known = {name: model["residual"] for name, model in report.models.items() if model["residual"] is not None}
    return sorted(known, key=lambda name: -known[name])


def size_data(sizes: SizeTable, report: Report) -> Json:
    """Return one list per number over the positions of both sliders."""

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
        mean = report.function["mean"]
        ranks = sorted(mean["rebuilt"], key=int)
        rebuilt = [[int(rank), *rounded([mean["rebuilt"][rank]])] for rank in ranks]
        found["function"] = {
            "metric": report.function["metric"],
            "rebuilt": rebuilt,
            "mean": rounded([mean["mean"]])[0],
        }
    return found
