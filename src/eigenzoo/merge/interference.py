"""How much updates get in each other's way, beside what unrelated updates of the same singular values do.

Three figures, each an average over layers, weighted by the layers' values:

* overlap: of two updates' output (or input) spaces, the mean squared cosine of their principal angles: 1 where one holds the other;
* singular task interference (Gargiulo et al. 2025): ‖(UᵀU − 1) Σ (VᵀV − 1)‖₁ of all updates' singular vectors side by side, over
  the sum of their singular values. 0 where updates are orthogonal;
* alignment (Marczak et al. 2025): of a source with the merge, ‖Π X‖ / ‖X‖, with Π on the merge's leading outputs, as many as leave
  out 5 % of its norm.

The null draws updates with the same singular values and random vectors, and treats them in the same way, the merge included.

Legend: T updates, O outputs, I inputs, R one update's rank, S ranks of all updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenzoo.linalg.core_frame import truncate
from eigenzoo.linalg.lora import Factors
from eigenzoo.records import plain

LEFT_OUT = 0.05
"""Share of the merge's norm that the leading outputs of `alignment` leave out, as in the paper."""

Merge = Callable[[Sequence[Factors]], Factors]
"""Merges updates; the result's factors."""


@dataclass(frozen=True)
class Interference:
    """Interference of T models; each figure beside that of the null.

    Attributes:
        models: names.
        outputs, inputs: overlap of each pair (T, T), of spaces of outputs and of inputs.
        null_outputs, null_inputs: the same of the null.
        interference, null_interference: singular task interference.
        alignment, null_alignment: by model.
    """

    models: tuple[str, ...]
    outputs: tuple[tuple[float, ...], ...]
    inputs: tuple[tuple[float, ...], ...]
    null_outputs: tuple[tuple[float, ...], ...]
    null_inputs: tuple[tuple[float, ...], ...]
    interference: float
    null_interference: float
    alignment: tuple[float, ...]
    null_alignment: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        document: dict[str, Any] = plain(self)
        return document


@dataclass(frozen=True)
class LayerInterference:
    """The figures of one layer, those of the updates and those of the null."""

    outputs_TT: Tensor
    inputs_TT: Tensor
    interference: float
    alignment_T: Tensor


def measure(updates: Sequence[Factors], merge: Merge) -> LayerInterference:
    """Measure one layer's updates. Cost (O + I)·S² + S³."""
    parts = [_singular(each) for each in updates]
    lefts, rights = [left for left, _, _ in parts], [right for _, _, right in parts]
    values_S = torch.cat([values for _, values, _ in parts])
    left_OS, right_IS = torch.cat(lefts, 1), torch.cat(rights, 1)
    crossed = (_off_identity(left_OS) * values_S) @ _off_identity(right_IS)
    nuclear, total = float(torch.linalg.svdvals(crossed).sum()), float(values_S.sum())
    return LayerInterference(
        _overlaps(lefts), _overlaps(rights), nuclear / total if total > 0 else 0.0, _alignment(parts, merge(updates))
    )


def random_like(updates: Sequence[Factors], generator: torch.Generator) -> list[Factors]:
    """Draw updates with the same singular values and independent, uniformly random singular vectors."""
    drawn = []
    for left, values, right in map(_singular, updates):
        vectors = [
            torch.linalg.qr(torch.randn(side.shape, dtype=torch.float64, generator=generator))[0]
            for side in (left, right)
        ]
        drawn.append((vectors[0] * values, vectors[1].T.contiguous()))
    return drawn


def _singular(update: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (O, R), the singular values, and V (I, R) of an update, without those that are round-off."""
    (left, right), values = truncate(*update)
    if not values.numel():
        return left[:, :0], values, right.T[:, :0]
    root = values.sqrt()
    return left / root, values, (right / root[:, None]).T


def _off_identity(vectors: Tensor) -> Tensor:
    gram = vectors.T @ vectors
    return gram - torch.eye(len(gram), dtype=gram.dtype)


def _overlaps(bases: Sequence[Tensor]) -> Tensor:
    """Return mean squared cosines of principal angles, (T, T); 0 beside an update that is zero."""
    return torch.tensor(
        [[float((a.T @ b).square().sum()) / max(min(a.shape[1], b.shape[1]), 1) for b in bases] for a in bases],
        dtype=torch.float64,
    )


def _alignment(parts: Sequence[tuple[Tensor, Tensor, Tensor]], merged: Factors) -> Tensor:
    left, values, _ = _singular(merged)
    tails = values.square().flip(0).cumsum(0).flip(0)
    leading = left[:, : int((tails > LEFT_OUT**2 * tails[0]).sum())] if values.numel() else left
    shares = []
    for outputs, own, _ in parts:
        total = float(own.square().sum())
        inside = float((leading.T @ (outputs * own)).square().sum())
        shares.append((inside / total) ** 0.5 if total > 0 else 0.0)
    return torch.tensor(shares, dtype=torch.float64)


def average(
    names: Sequence[str], layers: Mapping[str, tuple[LayerInterference, LayerInterference]], sizes: Mapping[str, int]
) -> Interference:
    """Average layers, weighted by their sizes. Each has its own figures and those of its null."""
    total = sum(sizes.values())

    def over_layers(which: int, field: str) -> Any:
        return sum(getattr(pair[which], field) * (sizes[name] / total) for name, pair in layers.items())

    def rows(which: int, field: str) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(row) for row in over_layers(which, field).tolist())

    return Interference(
        tuple(names),
        rows(0, "outputs_TT"),
        rows(0, "inputs_TT"),
        rows(1, "outputs_TT"),
        rows(1, "inputs_TT"),
        float(over_layers(0, "interference")),
        float(over_layers(1, "interference")),
        tuple(over_layers(0, "alignment_T").tolist()),
        tuple(over_layers(1, "alignment_T").tolist()),
    )
