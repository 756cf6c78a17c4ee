"""Sketch the moments of a stack's sides. The operator for `linalg.sketch` is summed over the models one by one.

    full weights:   S·Q = Σ (X_n − M) ((X_n − M)ᵀ Q)          updates:   S·Q = Σ F_n (F_nᵀ Q),   F_n = B_n (A_n A_nᵀ)^½

and their mirrors for the inputs. Neither an O × O or I × I matrix nor a dense update is formed.

Legend: N models, O outputs, I inputs, S size of a side, L columns of a sketch, P columns of models on a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.linalg import kernels, lora
from eigenzoo.linalg.side import SideMoment
from eigenzoo.linalg.sketch import PASSES, Krylov, num_columns
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack

CHUNK_VALUES = 2**20
"""Number of values from which the center is removed in float64 at once."""


@dataclass(frozen=True)
class SketchPlan:
    """The ranks of the sides to sketch, and the seed of the test matrices."""

    ranks: Mapping[str, int]
    seed: int = 0


def sketched_ranks(stack: Stack, plan: SketchPlan | None) -> dict[str, int]:
    """Return the ranks of the sides of a plan for which a sketch is cheaper than the exact moment.

    It is not cheaper if all test columns are at least half as many as the side's size or as all models' columns.
    """
    if plan is None:
        return {}
    chosen = {}
    for axis, rank in plan.ranks.items():
        size, other = stack.layer.shape if axis == "outputs" else stack.layer.shape[::-1]
        brought = sum(stack.ranks) if isinstance(stack, UpdateStack) else len(stack) * other
        if min(size, brought) > 2 * PASSES * num_columns(rank):
            chosen[axis] = rank
    return chosen


def sketch_sides(
    stack: Stack,
    ranks: Mapping[str, int],
    removed: Tensor | None,
    *,
    seed: int = 0,
    passes: int = PASSES,
    device: str = "cpu",
) -> dict[str, SideMoment]:
    """Sketch the moments of `outputs`, `inputs` or both, each for a rank.

    Args:
        stack: full weights, taken about `removed`, or updates, taken about zero.
        ranks: a rank per axis.
        removed: M, broadcastable over (O, I); not used for updates.
        seed: seed of the test matrices, which otherwise depend only on the side's size and rank.
        passes: number of reads of the weights, for both axes together.
        device: device of the products with the weights. All else runs on the CPU.

    Returns:
        For each axis a moment with its whole trace and a bound of the part outside of it.

    Cost, per axis: 4·passes·D·N·L products (updates: 4·passes·S·P·L), and 2·passes·L·S numbers besides one model's matrix.
    Products run in the stack's dtype and are summed in float64; the center is removed in float64.
    """
    sizes = {"outputs": stack.layer.shape[0], "inputs": stack.layer.shape[1]}
    sketches = {
        axis: Krylov(sizes[axis], num_columns(rank), passes=passes, seed=seed, dtype=stack.dtype)
        for axis, rank in ranks.items()
    }
    trace = 0.0
    for number in range(passes if sketches else 0):
        blocks = {axis: sketch.block() for axis, sketch in sketches.items()}
        rounded = {axis: block_SL.to(device, stack.dtype) for axis, block_SL in blocks.items()}
        products = {axis: torch.zeros_like(block_SL, device=device) for axis, block_SL in blocks.items()}
        for columns, energy in _columns(stack, rounded, removed):
            trace += 0.0 if number else energy
            for axis, columns_SP in ((axis, columns_SP.to(device)) for axis, columns_SP in columns.items()):
                products[axis] += kernels.product(columns_SP, kernels.product(columns_SP.T, rounded[axis]))
        for axis, sketch in sketches.items():
            sketch.take(products[axis].cpu())
    return {axis: sketch.moment(trace) for axis, sketch in sketches.items()}


def _columns(
    stack: Stack, blocks: Mapping[str, Tensor], removed: Tensor | None
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Read the stack once. Yield for each axis matrices C (S × P) with S = Σ C·Cᵀ, and their energy."""
    if isinstance(stack, UpdateStack):
        yield from _update_columns(stack, blocks)
        return
    for index in range(len(stack)):
        matrix_OI, energy = _centered(stack, index, removed)
        yield {axis: matrix_OI if axis == "outputs" else matrix_OI.T for axis in blocks}, energy


def _centered(stack: DenseStack, index: int, removed: Tensor | None) -> tuple[Tensor, float]:
    """Return one model's X − M in the stack's dtype, and ‖X − M‖², without a second matrix in memory."""
    matrix_OI = stack.matrix(index)
    center = torch.zeros(1, 1, dtype=torch.float64) if removed is None else removed
    rows = max(1, CHUNK_VALUES // matrix_OI.shape[1])
    energy = 0.0
    for start in range(0, matrix_OI.shape[0], rows):
        part = matrix_OI[start : start + rows]
        exact = part.double() - center.expand(matrix_OI.shape)[start : start + rows]
        energy += float(exact.square().sum())
        part.copy_(exact)
    return matrix_OI, energy


def _update_columns(stack: UpdateStack, blocks: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Yield the factors of several updates side by side, because products with single factors are limited by memory bandwidth."""
    widest = max(block_SL.shape[1] for block_SL in blocks.values())
    gathered: dict[str, list[Tensor]] = {axis: [] for axis in blocks}
    width, energy = 0, 0.0
    for index in range(len(stack)):
        b_OR, a_RI = stack.factors(index)
        for axis, factors in gathered.items():
            factors.append(lora.output_factor((b_OR, a_RI) if axis == "outputs" else (a_RI.T, b_OR.T)))
        width, energy = width + b_OR.shape[1], energy + lora.energy((b_OR, a_RI))
        if width >= widest or index + 1 == len(stack):
            yield {axis: torch.cat(factors, 1).to(stack.dtype) for axis, factors in gathered.items()}, energy
            gathered, width, energy = {axis: [] for axis in blocks}, 0, 0.0
