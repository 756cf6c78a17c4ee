"""Compute curves over ranks, of one layer or averaged over all layers by number of values.

Every curve of a spectrum is a share of the layer's whole variance about the mean, never of the kept part. Averages over layers
follow the evidence: each layer counts by its number of values and not by its energy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eigenzoo.report.document import Report
from eigenzoo.report.numbers import Floats, Ranks, floats, log_ranks

Curves = dict[str, Floats]
"""Curves by name; `rank` has their x."""

NULLS = ("norm_matched", "iid", "permuted", "spectrum_matched")


def full_spectrum(layer: Mapping[str, Any]) -> Curves:
    """Return all curves of a layer's spectrum at every rank. Curves that the evidence lacks are left out."""
    values = floats(layer["explained_variance_ratio"])
    found: Curves = {"rank": np.arange(1.0, len(values) + 1), "spectrum": values}
    found |= {name: floats(layer["null"][name]) for name in (*NULLS, "low", "high") if layer["null"][name]}
    return {name: fitted(curve, len(values)) for name, curve in found.items()}


def fitted(curve: Floats, length: int) -> Floats:
    """Truncate a curve, or extend it with NaN."""
    return np.concatenate([curve[:length], np.full(max(length - len(curve), 0), np.nan)])


def with_cumulative(curves: Curves) -> Curves:
    """Add the running sums of a spectrum and of its nulls."""
    sums = {f"{name}_sum": np.cumsum(curves[name]) for name in ("spectrum", *NULLS) if name in curves}
    return {**curves, **sums}


def thinned(curves: Curves, ranks: Ranks | None = None) -> Curves:
    """Select about forty log-spaced ranks."""
    kept = log_ranks(len(curves["rank"])) if ranks is None else ranks
    return {name: curve[kept - 1] for name, curve in curves.items()}


def varying(report: Report) -> list[dict[str, Any]]:
    """Return the layers with variance. Only they have spectra."""
    return [layer for layer in report.layers.values() if layer["variance"] and layer["explained_variance_ratio"]]


def weight(layer: Mapping[str, Any]) -> float:
    """Return the weight of a layer in an average: its number of values."""
    return float(layer["num_values"] or 1)


def all_layers_spectrum(report: Report) -> Curves:
    """Return spectra averaged over all layers, with the layers' 10th and 90th percentile of the spectrum.

    A null is included only if every varying layer has it. Otherwise its average would be over other layers.
    """
    layers = varying(report)
    if not layers:
        return {"rank": floats([]), "spectrum": floats([])}
    length = max(len(layer["explained_variance_ratio"]) for layer in layers)
    known = [full_spectrum(layer) for layer in layers]
    weights = floats(map(weight, layers))
    found: Curves = {"rank": np.arange(1.0, length + 1)}
    for name in ("spectrum", *NULLS, "low", "high"):
        if all(name in curves for curves in known):
            table = np.stack([np.nan_to_num(fitted(curves[name], length)) for curves in known])
            found[name] = weights @ table / weights.sum()
            if name == "spectrum":
                found["layers_low"], found["layers_high"] = np.quantile(table, (0.1, 0.9), axis=0)
    return found


def heldout_curves(layer: Mapping[str, Any]) -> Curves:
    """Return the kept shares of the variance of fitted, held-out and unrelated models, by rank."""
    heldout = layer["heldout"]
    names = {"in_sample": "in_sample", "captured": "heldout", "null": "null"}
    return {"rank": floats(heldout["rank"]), **{to: floats(heldout[key]) for key, to in names.items()}}


def all_layers_heldout(report: Report) -> Curves:
    """Return the same curves over all layers, from the evidence's summary."""
    return heldout_curves({"heldout": report.evidence["summary"]})


def leave_one_out(layer: Mapping[str, Any]) -> Curves:
    """Return the kept share of the variance of one left-out model, by rank."""
    left = layer["heldout"]["leave_one_out"]
    return {"rank": floats(left["rank"]), "heldout": floats(left["captured"])}


def all_layers_leave_one_out(report: Report) -> Curves:
    """Return leave-one-out curves averaged over all layers, at the ranks that all of them have."""
    known = [(leave_one_out(layer), weight(layer)) for layer in varying(report)]
    known = [(curves, counts) for curves, counts in known if len(curves["rank"])]
    if not known:
        return {"rank": floats([]), "heldout": floats([])}
    shared = sorted(set.intersection(*(set(curves["rank"].tolist()) for curves, _ in known)))
    table = np.stack([_at(curves, "heldout", shared) for curves, _ in known])
    weights = floats(counts for _, counts in known)
    return {"rank": floats(shared), "heldout": weights @ table / weights.sum()}


def halves_curves(layer: Mapping[str, Any]) -> Curves:
    """Return cosines of the principal angles between the subspaces of two halves, by direction."""
    halves = layer["split_half"]
    found = {"cosine": floats(halves["cosines"])}
    found |= {name: floats(halves[name]) for name in ("low", "high")}
    found |= {"null": floats(halves["null_cosines"]), "null_high": floats(halves["null_high"])}
    length = len(found["cosine"])
    return {"rank": np.arange(1.0, length + 1), **{name: fitted(curve, length) for name, curve in found.items()}}


def all_layers_halves(report: Report) -> Curves:
    """Return cosines averaged over all layers, for each direction over the layers that have it."""
    known = [(halves_curves(layer), weight(layer)) for layer in varying(report)]
    length = max((len(curves["rank"]) for curves, _ in known), default=0)
    found: Curves = {"rank": np.arange(1.0, length + 1)}
    weights = floats(counts for _, counts in known)
    for name in ("cosine", "low", "high", "null", "null_high"):
        rows = [fitted(curves[name], length) for curves, _ in known]
        table = np.stack(rows) if rows else np.zeros((0, 0))
        there = np.isfinite(table)
        total = weights @ there
        with np.errstate(invalid="ignore"):
            found[name] = np.where(
                total > 0, weights @ np.where(there, table, 0.0) / np.where(total > 0, total, 1), np.nan
            )
    return found


def _at(curves: Curves, name: str, ranks: Sequence[float]) -> Floats:
    places = {rank: place for place, rank in enumerate(curves["rank"].tolist())}
    return floats(curves[name][places[rank]] for rank in ranks)
