"""Collect moments of LoRA updates from their factors, tile by tile, without a dense matrix.

Legend: N models, S size of a side, R one update's rank, P stacked ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigenzoo.errors import DataError
from eigenzoo.linalg import kernels, lora
from eigenzoo.linalg.side import SideMoment
from eigenzoo.linalg.update_tiles import Tile, products, singular_values
from eigenzoo.passes.buffers import borrow
from eigenzoo.passes.resources import Resources
from eigenzoo.subspace.moments.layer_moments import LayerMoments, from_raw_gram, round_off, shifted_to_zero
from eigenzoo.subspace.moments.sketched import SketchPlan, sketch_sides, sketched_ranks
from eigenzoo.zoo.stack import UpdateStack

TILE_RANKS = 2048
"""Largest sum of ranks in a tile. Its products of P × P values take a few tens of megabytes."""

TILE_BYTES = 64 * 2**20
"""Largest size of a tile's factors in bytes. It does not depend on the machine's memory, so that tiles are always the same."""


@dataclass(frozen=True)
class UpdateGrams:
    """⟨X_i, X_j⟩ of all updates, products of the leading rows of A, sums of entries, and singular values."""

    raw_NN: Tensor
    starts_NN: Tensor
    sums_N: Tensor
    singular_NR: Tensor


def collect_updates(
    stack: UpdateStack,
    axes: tuple[str, ...],
    center: str,
    resources: Resources,
    sketch: SketchPlan | None = None,
) -> LayerMoments:
    """Collect the moments of updates from the upper halves of two products of P × P ranks, and the sides' for truncated axes."""
    grams = update_grams(stack, resources)
    moments = replace(
        from_raw_gram(grams.raw_NN, stack.layer.num_values, round_off(stack)),
        starts_NN=grams.starts_NN,
        sums_N=grams.sums_N,
        singular_NR=grams.singular_NR,
    )
    if center == "none":
        moments = shifted_to_zero(moments)
    seed = sketch.seed if sketch else 0
    sketched = sketch_sides(stack, sketched_ranks(stack, sketch), None, seed=seed, device=resources.device)
    sides = {
        axis: sketched.get(axis) or update_side(stack, axis, resources.device)
        for axis in ("outputs", "inputs")
        if axis in axes
    }
    return replace(moments, outputs=sides.get("outputs"), inputs=sides.get("inputs"))


def update_grams(stack: UpdateStack, resources: Resources, first_new: int = 0) -> UpdateGrams:
    """Return the Grams of all updates. With `first_new`, only rows and columns from that model on are filled.

    The number of leading rows is the smallest rank. PEFT draws A row by row, so that one seed gives the same leading rows at any
    rank.

    Raises DataError, naming the model, for NaN and Inf.
    """
    num_models, num_rows = len(stack), min(stack.ranks)
    raw_NN, starts_NN = torch.zeros(2, num_models, num_models, dtype=torch.float64)
    sums_N = torch.zeros(num_models, dtype=torch.float64)
    singular_NR = torch.zeros(num_models, max(stack.ranks), dtype=torch.float64)
    old, new = tiles(stack, 0, first_new), tiles(stack, first_new, num_models)
    for number, indices in enumerate(new):
        columns = slice(indices.start, indices.stop)
        with loaded_tile(stack, indices, resources) as tile:
            sums_N[columns] = tile.sums()
            for other in (*old, *new[: number + 1]):
                rows = slice(other.start, other.stop)
                with ExitStack() as lent:
                    left = tile if other == indices else lent.enter_context(loaded_tile(stack, other, resources))
                    pair = products(left, tile, num_rows, stack.precision)
                if not torch.isfinite(pair.updates_nn).all():
                    _refuse(stack)
                if other == indices:
                    singular_NR[columns] = singular_values(tile, pair, singular_NR.shape[1])
                raw_NN[rows, columns], raw_NN[columns, rows] = pair.updates_nn, pair.updates_nn.T
                starts_NN[rows, columns], starts_NN[columns, rows] = pair.starts_nn, pair.starts_nn.T
    return UpdateGrams(raw_NN, starts_NN, sums_N, singular_NR)


def _refuse(stack: UpdateStack) -> None:
    stack.check_finite()
    raise DataError(
        "the products of its factors overflow",
        where=f"layer '{stack.layer.name}'",
        rule="energies of updates are finite in the precision of the products",
        next_step="use precision 'high', or --exclude the layer so that it is carried unchanged",
    )


@contextmanager
def loaded_tile(stack: UpdateStack, indices: range, resources: Resources) -> Iterator[Tile]:
    """Yield the factors of some models side by side on the device."""
    num_ranks = sum(stack.ranks[index] for index in indices)
    outputs, inputs = stack.layer.shape
    on_cpu = resources.device == "cpu"
    with (
        borrow(outputs, num_ranks, stack.dtype, pinned=not on_cpu) as b_OP,
        borrow(num_ranks, inputs, stack.dtype, pinned=not on_cpu) as a_PI,
    ):
        tile = stack.tile(indices, b_OP, a_PI)
        if on_cpu:
            yield tile
            return
        b_OP, a_PI = (factor.to(resources.device, non_blocking=True) for factor in (b_OP, a_PI))
    yield Tile(b_OP, a_PI, tile.ranks)


def tiles(stack: UpdateStack, start: int, stop: int) -> list[range]:
    """Split models into ranges whose factors, and the products of two ranges, fit into a tile."""
    width = max(stack.ranks)
    per_model = stack.dtype.itemsize * width * sum(stack.layer.shape)
    num_tile = max(1, min(TILE_BYTES // per_model, TILE_RANKS // width))
    return [range(first, min(first + num_tile, stop)) for first in range(start, stop, num_tile)]


def update_side(stack: UpdateStack, axis: str, device: str = "cpu") -> SideMoment:
    """Compute Σ s²B(AAᵀ)Bᵀ or its mirror Σ s²Aᵀ(BᵀB)A, about zero; as a factor if the sum of ranks is smaller than the side."""
    size = stack.layer.shape[0 if axis == "outputs" else 1]
    fits = sum(stack.ranks) < size
    moment_SS = torch.zeros(0 if fits else size, 0 if fits else size, dtype=torch.float64, device=device)
    columns: list[Tensor] = []
    for index in range(len(stack)):
        b_OR, a_RI = stack.factors(index)
        columns.append(lora.output_factor((b_OR, a_RI) if axis == "outputs" else (a_RI.T, b_OR.T)))
        # One product of many thin factors, because products with single factors are limited by memory bandwidth.
        if not fits and (index + 1 == len(stack) or sum(column.shape[1] for column in columns) >= size // 4):
            moment_SS += kernels.gram(torch.cat(columns, 1).to(device))
            columns = []
    return SideMoment(factor_SP=torch.cat(columns, 1)) if fits else SideMoment(moment_SS.cpu())
