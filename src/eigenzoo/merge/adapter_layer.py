"""Merge one layer's adapters, by their factors. No update is multiplied out, but in the full space some rows at a time.

Legend: T adapters, O outputs, I inputs, S ranks of all adapters, P and Q the sides of the space that a method acts in, K kept rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.linalg.core_frame import EPSILON, core_frame, truncate
from eigenzoo.linalg.lora import Factors, inner_products
from eigenzoo.merge.certificate import LayerSums, compare
from eigenzoo.merge.layer_updates import (
    Combination,
    LayerUpdates,
    Product,
    RowWise,
    UpdatesInMemory,
    UpdatesInRows,
)
from eigenzoo.merge.request import COLUMNS, CORE, FULL, ROWS, ChooseRank, Job

AsWritten = Callable[[Tensor, Tensor], Factors]
"""Gives factors B and A as a reader of the file gets them: rounded to its dtypes."""

ROWS_BYTES = 32 * 2**20
"""Bytes of all models' rows that are multiplied out at a time in the full space."""


@dataclass(frozen=True)
class Placed:
    """One layer's updates in the space that a method acts in: X = left · values · right, where None stands for an identity."""

    updates: LayerUpdates
    left_OP: Tensor | None
    right_QI: Tensor | None
    gap: float


@dataclass(frozen=True)
class MergedLayer:
    """One merged update.

    Attributes:
        factors: B and A as a reader of the file gets them.
        sums: for the certificate.
        gap: of the frame that the method acted in; see `CoreFrame`.
    """

    factors: Factors
    sums: LayerSums
    gap: float


def place(updates: Sequence[Factors], job: Job) -> Placed:
    """Put updates into the space that the method acts in: core (P, Q), columns (P, I), rows (O, Q) or full (O, I)."""
    method, context, space = job.request.method, job.context, job.request.chosen_space or CORE
    if method.kind in ("gram", "factors"):
        return Placed(UpdatesInMemory(context, halves=updates, factors=updates), None, None, 1.0)
    if space == FULL:
        return Placed(UpdatesInRows(context, updates, ROWS_BYTES), None, None, 1.0)
    frame = core_frame(updates)
    gap = frame.gap if method.kind == "elements" else 1.0
    left, right = frame.outputs_OP, frame.inputs_IQ.T
    if space == COLUMNS:
        halves = tuple((half, other @ right) for half, other in frame.halves)
        return Placed(UpdatesInMemory(context, halves=halves, factors=updates), left, None, gap)
    if space == ROWS:
        halves = tuple((left @ half, other) for half, other in frame.halves)
        return Placed(UpdatesInMemory(context, halves=halves, factors=updates), None, right, gap)
    return Placed(UpdatesInMemory(context, halves=frame.halves, factors=updates), left, right, gap)


def merge_layer(updates: Sequence[Factors], job: Job, choose_rank: ChooseRank, as_written: AsWritten) -> MergedLayer:
    """Merge one layer's updates, given as float64 factors with their scale."""
    placed, request = place(updates, job), job.request
    result = request.method.merge(placed.updates, **request.options)
    # Round-off of sums that cancel does not show in their own size. Methods that divide by weights do not grow with them.
    weights_T = result.coefficients_T if isinstance(result, Combination) else job.context.weights_T.clamp(-1, 1)
    sizes = placed.updates.gram_TT.diagonal().clamp_min(0).sqrt()
    largest_side = max(updates[0][0].shape[0], updates[0][1].shape[1])
    round_off = float((sizes * weights_T.abs()).sum()) * abs(request.scale) * largest_side * EPSILON
    if isinstance(result, RowWise) and isinstance(placed.updates, UpdatesInRows):
        return _cut_rows(placed.updates, job, choose_rank, round_off, as_written, updates)
    merged = _as_factors(result, placed, updates, request.scale)
    cut = truncate(*merged, choose_rank, round_off)
    written = as_written(*cut.factors)
    return MergedLayer(written, compare(merged, cut.values, written, updates), placed.gap)


def _as_factors(
    result: Combination | Tensor | RowWise | Product, placed: Placed, updates: Sequence[Factors], scale: float
) -> Factors:
    """Return two factors of the merged update, of as many columns as the space has dimensions."""
    if isinstance(result, Combination):
        weights = (result.coefficients_T * scale).tolist()
        left = torch.cat([b * weight for weight, (b, _) in zip(weights, updates, strict=True)], 1)
        return left, torch.cat([a for _, a in updates], 0)
    if isinstance(result, Product):
        return result.left_OS * scale, result.right_SI
    values = result
    if isinstance(result, RowWise):
        values = torch.cat([result.apply(block) for block in placed.updates.blocks()])
    assert isinstance(values, Tensor)
    values = values * scale
    if placed.left_OP is None:
        assert placed.right_QI is not None
        return values, placed.right_QI
    if placed.right_QI is None:
        return placed.left_OP, values
    return placed.left_OP @ values, placed.right_QI


def _cut_rows(
    layer: UpdatesInRows,
    job: Job,
    choose_rank: ChooseRank,
    round_off: float,
    as_written: AsWritten,
    updates: Sequence[Factors],
) -> MergedLayer:
    """Cut a merge whose rows M are computed some at a time. Three passes over the rows; memory I², for the Gram of M's columns.

    The Gram's eigenvectors are M's right singular vectors. Values below about 1e-8 of the largest are not told from zero.
    """

    request = job.request

    def rows() -> Iterator[Tensor]:
        result = request.method.merge(layer, **request.options)
        assert isinstance(result, RowWise)
        for block in layer.blocks():
            yield result.apply(block) * request.scale

    gram_II = torch.zeros(layer.num_inputs, layer.num_inputs, dtype=torch.float64)
    for block in rows():
        gram_II.addmm_(block.T, block)
    squares, vectors = torch.linalg.eigh(gram_II)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    values = squares[squares > max(float(squares[0]) * len(squares) * EPSILON, round_off**2)].sqrt()
    kept = min(choose_rank(values), values.numel()) if values.numel() else 0
    if kept:
        root = values[:kept].sqrt()
        right = vectors[:, :kept].T
        left = torch.cat([block @ right.T for block in rows()])
        factors = left / root, right * root[:, None]
    else:
        factors = updates[0][0].new_zeros(updates[0][0].shape[0], 1), gram_II.new_zeros(1, len(gram_II))
    written = as_written(*factors)
    exact_b, exact_a = written[0].double(), written[1].double()
    lost, start = 0.0, 0
    for block in rows():
        lost += float((block - exact_b[start : start + len(block)] @ exact_a).square().sum())
        start += len(block)
    rounding = float(
        truncate(torch.cat([factors[0], -exact_b], 1), torch.cat([factors[1], exact_a], 0)).values.square().sum()
    )
    beyond = float(values[kept]) if kept < values.numel() else 0.0
    sums = LayerSums(
        rank=max(kept, 1),
        energy=float(squares.sum()),
        lost=lost,
        largest=float(values[0]) if values.numel() else 0.0,
        largest_lost=beyond + rounding**0.5,
        energies_T=layer.gram_TT.diagonal(),
        products_T=inner_products(updates, [(exact_b, exact_a)])[:, 0],
    )
    return MergedLayer(written, sums, 1.0)
