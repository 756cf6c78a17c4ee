"""Merge adapters into an adapter, layer by layer and by their factors. No update is multiplied out but in `--space full`.

Legend: T adapters, O outputs, I inputs, S ranks of all adapters, P and Q the dimensions of the space a method acts in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenzoo.linalg.core_frame import EPSILON, CoreFrame, core_frame, truncate
from eigenzoo.linalg.lora import Factors, inner_products
from eigenzoo.merge.certificate import LayerSums, compare
from eigenzoo.merge.layer_updates import Combination, RowWise, UpdatesInMemory
from eigenzoo.merge.method import Method

CORE, COLUMNS, ROWS, FULL = "core", "columns", "rows", "full"
SPACES = (CORE, COLUMNS, ROWS, FULL)


@dataclass(frozen=True)
class Request:
    """The choices that apply to every layer of a merge.

    Attributes:
        method, options: the method, with all its options.
        weights_T: (T,) float64.
        scale: what the method's result is multiplied by.
        space: where entries belong to, for methods that work entry by entry.
        choose_rank: gives the rank that is kept from the singular values of a merged update.
        seed: of random masks.
    """

    method: Method
    options: Mapping[str, Any]
    weights_T: Tensor
    scale: float
    space: str
    choose_rank: Callable[[Tensor], int]
    seed: int


@dataclass(frozen=True)
class Space:
    """The space of one layer that a method acts in: X = left · values · right; None stands for an identity."""

    left_OP: Tensor | None
    right_QI: Tensor | None
    values_TPQ: Tensor
    gap: float


@dataclass(frozen=True)
class MergedLayer:
    """One merged update.

    Attributes:
        factors: B and A as they are written, in the dtypes of the file.
        sums: for the certificate.
        gap: of the frame that the method acted in.
    """

    factors: Factors
    sums: LayerSums
    gap: float


def merge_layer(
    name: str,
    models: Sequence[str],
    updates: Sequence[Factors],
    request: Request,
    dtypes: tuple[torch.dtype, torch.dtype],
    thresholds_T: Tensor | None = None,
) -> MergedLayer:
    """Merge one layer's updates, given as float64 factors with their scale."""
    left, right, gap = _merged(name, models, updates, request, thresholds_T)
    # Round-off of sums that cancel does not show in their own size.
    sizes = torch.stack([inner_products([each], [each])[0, 0] for each in updates]).clamp_min(0).sqrt()
    round_off = (
        float((sizes * request.weights_T.abs()).sum())
        * abs(request.scale)
        * max(left.shape[0], right.shape[1])
        * EPSILON
    )
    cut = truncate(left, right, request.choose_rank, round_off)
    written = cut.factors[0].to(dtypes[0]), cut.factors[1].to(dtypes[1])
    return MergedLayer(written, compare((left, right), cut.values, written, updates), gap)


def _merged(
    name: str, models: Sequence[str], updates: Sequence[Factors], request: Request, thresholds_T: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """Return two factors of the merged update, and the gap of the frame."""
    ranks = [a.shape[0] for _, a in updates]
    space = as_space(updates, request.space if request.method.kind == "elements" else CORE, request.method.kind)
    layer = UpdatesInMemory(name, models, request.weights_T, ranks, request.seed, thresholds_T, space.values_TPQ)
    result = request.method.merge(layer, **request.options)
    if isinstance(result, Combination):
        weights = (result.coefficients_T * request.scale).tolist()
        left = torch.cat([b * weight for weight, (b, _) in zip(weights, updates, strict=True)], 1)
        return left, torch.cat([a for _, a in updates], 0), 1.0
    values = torch.cat([result.apply(block) for block in layer.blocks()]) if isinstance(result, RowWise) else result
    values = values * request.scale
    left = values if space.left_OP is None else space.left_OP @ values
    right = torch.eye(values.shape[1], dtype=values.dtype) if space.right_QI is None else space.right_QI
    return left, right, space.gap


def as_space(updates: Sequence[Factors], space: str, kind: str) -> Space:
    """Return the updates in a space: core (P, Q), columns (P, I), rows (O, Q) or full (O, I)."""
    frame: CoreFrame = core_frame(updates)
    if space == CORE:
        return Space(frame.outputs_OP, frame.inputs_IQ.T, frame.cores_TPQ, frame.gap)
    if space == COLUMNS:
        return Space(frame.outputs_OP, None, frame.cores_TPQ @ frame.inputs_IQ.T, frame.gap)
    if space == ROWS:
        return Space(None, frame.inputs_IQ.T, frame.outputs_OP @ frame.cores_TPQ, frame.gap)
    return Space(None, None, torch.stack([b @ a for b, a in updates]), 1.0)
