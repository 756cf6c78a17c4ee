"""Compute size and loss of a bundle of any rank, with one row for every position of the two sliders.

    bytes(k) = shared + per_model · N + Σ over layers (fixed + k · per_direction + k² · per_pair + N · k · per_coefficient)

A rank larger than a layer's number of directions means all of them. A layer without variance has none. Errors in-sample are exact.
Held-out and chance are interpolated linearly between the evaluated ranks, from 0 at rank 0 (the mean alone), and are constant after
the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np

from eigenzoo.report.document import Report
from eigenzoo.report.numbers import Floats, floats

THRESHOLDS: tuple[float, ...] = (*(share / 100 for share in range(1, 100)), 0.995, 0.999)
TOLERANCE = 1e-9
"""Round-off of a running sum. A threshold that is missed by at most this counts as met."""


@dataclass(frozen=True)
class SizeRow:
    """One position of a slider.

    Attributes:
        rank: the chosen rank of every layer; None if a threshold chose the ranks.
        threshold: the least kept share of each layer's variance; None if a rank was chosen.
        ranks: the ranks of the varying layers, sorted.
        in_sample, heldout, null: kept shares of all variance about the mean.
        residual: lost share of all energy, mean included, in-sample.
        per_model: bytes that one more model adds.
        break_even_models: the number of models from which on the bundle is smaller than their files; None if never.
    """

    rank: int | None
    threshold: float | None
    ranks: tuple[int, ...]
    bytes: int
    in_sample: float | None
    heldout: float | None
    null: float | None
    residual: float | None
    ratio: float | None
    per_model: int
    break_even_models: int | None


@dataclass(frozen=True)
class SizeTable:
    """Rows for every rank from 0 (the mean alone) and for every threshold."""

    whole_zoo: int
    num_models: int
    by_rank: tuple[SizeRow, ...]
    by_threshold: tuple[SizeRow, ...]


@dataclass(frozen=True)
class _Layer:
    """A layer's input of sizes. `kept_K3` has its kept shares in-sample, held out and by chance at ranks 0, 1, …."""

    fixed: int
    per_direction: int
    per_pair: int
    per_coefficient: int
    variance: float
    kept_K3: Floats

    @property
    def largest(self) -> int:
        """Return the rank at which the layer is complete."""
        return len(self.kept_K3) - 1

    def rank_for(self, threshold: float) -> int:
        """Return the least rank that keeps a share of the variance."""
        return min(int(np.searchsorted(self.kept_K3[:, 0], threshold - TOLERANCE)), self.largest)


def size_table(report: Report) -> SizeTable | None:
    """Compute every position of both sliders; None if the document has no sizes."""
    sizes = report.sizes
    if sizes is None or not sizes["layers"]:
        return None
    sizes = {**sizes, "num_models": int(sizes["num_models"] or report.evidence["num_models"])}
    layers = [_layer(report.layers.get(name), size) for name, size in sizes["layers"].items()]
    largest = max(layer.largest for layer in layers)
    energy = sum(layer["energy"] or 0.0 for layer in report.layers.values())
    by_rank = (
        _row(rank, None, [min(rank, layer.largest) for layer in layers], layers, sizes, energy)
        for rank in range(largest + 1)
    )
    by_threshold = (
        _row(None, share, [layer.rank_for(share) for layer in layers], layers, sizes, energy) for share in THRESHOLDS
    )
    return SizeTable(
        int(sizes["whole_zoo"] or 0), sizes["num_models"], tuple(by_rank), tuple(by_threshold) if largest else ()
    )


def _layer(evidence: Mapping[str, Any] | None, size: Mapping[str, Any]) -> _Layer:
    fixed, direction, pair, coefficient = (
        int(size.get(key) or 0) for key in ("fixed", "per_direction", "per_pair", "per_coefficient")
    )
    if evidence is None or not evidence["variance"]:
        return _Layer(fixed, direction, pair, coefficient, 0.0, np.zeros((1, 3)))
    values = np.nan_to_num(floats(evidence["explained_variance_ratio"]))
    sums = np.concatenate([[0.0], np.cumsum(values[values > 0])])
    heldout = evidence["heldout"]
    curves = [_between(floats(heldout["rank"]), floats(heldout[key]), len(sums)) for key in ("captured", "null")]
    return _Layer(fixed, direction, pair, coefficient, float(evidence["variance"]), np.stack([sums, *curves], axis=1))


def _between(ranks: Floats, values: Floats, length: int) -> Floats:
    """Interpolate a curve at ranks 0, 1, … from its evaluated ranks."""
    length_known = min(len(ranks), len(values))
    ranks, values = ranks[:length_known], values[:length_known]
    there = np.isfinite(values)
    if not there.any():
        return np.full(length, np.nan)
    found: Floats = np.interp(np.arange(length), [0.0, *ranks[there]], [0.0, *values[there]])
    return found


def _row(
    rank: int | None,
    threshold: float | None,
    ranks: Sequence[int],
    layers: Sequence[_Layer],
    sizes: Mapping[str, Any],
    energy: float,
) -> SizeRow:
    num_models: int = sizes["num_models"]
    basis = int(sizes["shared"] or 0) + sum(
        layer.fixed + at * layer.per_direction + at**2 * layer.per_pair for layer, at in zip(layers, ranks, strict=True)
    )
    coefficients = sum(at * layer.per_coefficient for layer, at in zip(layers, ranks, strict=True))
    per_model = int(sizes["per_model"] or 0) + coefficients
    whole, zoo = basis + num_models * per_model, int(sizes["whole_zoo"] or 0)
    variance = sum(layer.variance for layer in layers)
    in_sample, heldout, null = _shares(layers, ranks)
    return SizeRow(
        rank,
        threshold,
        tuple(sorted(at for layer, at in zip(layers, ranks, strict=True) if layer.variance)),
        whole,
        in_sample,
        heldout,
        null,
        (1 - in_sample) * variance / energy if in_sample is not None and energy else None,
        zoo / whole if whole else None,
        per_model,
        _break_even(basis, per_model, zoo / num_models if num_models else 0.0),
    )


def _shares(layers: Sequence[_Layer], ranks: Sequence[int]) -> tuple[float | None, float | None, float | None]:
    """Return the kept share of the variance, over the layers with values."""
    kept = np.array([layer.kept_K3[rank] for layer, rank in zip(layers, ranks, strict=True) if layer.variance])
    weights = floats(layer.variance for layer in layers if layer.variance)
    shares: list[float | None] = []
    for column in kept.T if len(kept) else np.zeros((3, 0)):
        there = np.isfinite(column)
        shares.append(float(np.average(column[there], weights=weights[there])) if there.any() else None)
    return shares[0], shares[1], shares[2]


def _break_even(basis: int, per_model: int, file_bytes: float) -> int | None:
    saved = file_bytes - per_model
    return floor(basis / saved) + 1 if saved > 0 else None
