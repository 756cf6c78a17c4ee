"""Make tables of a user's metric for original, rebuilt and control models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eigenzoo.display import NONE, in_number
from eigenzoo.report.document import Report
from eigenzoo.report.tables import Table, table

SINGLE = {
    "original": "the original models",
    "parent": "the parent",
    "mean": "the models' mean",
    "head_only": "the mean with each model's own head",
}


def outcomes(record: dict[str, Any], secondary_rank: int | None) -> Iterator[tuple[str, float | None]]:
    """Return the outcomes of a record with their labels, in the order of the table."""
    for key, label in SINGLE.items():
        yield label, record[key]
    for key, label in (("rebuilt", "rebuilt"), ("random_basis", "random basis"), ("alone", "each cut alone")):
        for rank in sorted(record[key], key=int):
            yield f"{label}, rank {rank}", record[key][rank]
    after = "" if secondary_rank is None else f", rank {secondary_rank}"
    yield f"secondary directions only{after}", record["secondary"]


def function_table(report: Report) -> Table | None:
    """Make the table of the metric averaged over models, with its standard error and its difference from the originals."""
    function = report.function
    if function is None:
        return None
    original = function["mean"]["original"]
    spread = dict(outcomes(function["spread"], function["secondary_rank"]))
    rows = []
    for label, value in outcomes(function["mean"], function["secondary_rank"]):
        if value is not None:
            error = spread.get(label)
            of_original = NONE if not original else f"{100 * value / original:.1f} %"
            rows.append((label, in_number(value), NONE if error is None else f"± {in_number(error)}", of_original))
    kind = "held out of the fit" if function["heldout"] else "that are not all held out of the fit"
    columns = ("models", "mean of the metric", "standard error", "of the originals' mean")
    note = f"Averages over {function['num_models']:,} models {kind}; {function['num_fitted']:,} models were fitted."
    return table(f"Metric {function['metric']}", columns, rows, note=note)


def function_model_table(report: Report) -> Table | None:
    """Make the table of every model's metric."""
    function = report.function
    if function is None or not function["models"]:
        return None
    labels: dict[str, None] = {}
    found = {}
    for name, record in function["models"].items():
        found[name] = dict(outcomes(record, function["secondary_rank"]))
        labels |= dict.fromkeys(label for label, value in found[name].items() if value is not None)
    rows = [(name, *(in_number(values.get(label)) for label in labels)) for name, values in found.items()]
    return table("Metric by model", ("model", *labels), rows)
