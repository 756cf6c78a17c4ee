"""Borders: the moments of a stack that has grown, from those of its first models and one read of it.

Legend: N old models, M new ones, R the reference (see `moments`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eigenzoo.linalg import kernels
from eigenzoo.linalg.block_sums import sample
from eigenzoo.linalg.gram import center_gram
from eigenzoo.subspace.moments import LayerMoments, entry_dimensions, from_raw_gram, round_off
from eigenzoo.subspace.resources import Resources
from eigenzoo.subspace.update_moments import update_grams
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack


def extend(moments: LayerMoments, stack: Stack) -> LayerMoments:
    """Extend the moments of a stack's first models to all of it: exact, one read and M·(N + M)·D products."""
    if isinstance(stack, UpdateStack):
        return _extend_updates(moments, stack)
    num_old, num_all, first = moments.num_models, len(stack), moments.num_reference
    border_MN = torch.zeros(num_all - num_old, num_all, dtype=torch.float64)
    cross_M, shift_M = torch.zeros(2, num_all - num_old, dtype=torch.float64)
    sums_N = torch.zeros(num_all, dtype=torch.float64)
    squares = 0.0
    for block in stack.blocks():
        rows = block.rows
        rounded_D = kernels.mean_rows(rows[:first])
        kernels.subtract(rows, rounded_D)
        # R is the exact mean: what rounding left of it in the rows is taken into account in the products.
        rest_D = kernels.mean_rows(rows[:first])
        left = torch.cat([rows[num_old:], torch.stack([rest_D, rounded_D, torch.ones_like(rest_D)])])
        products = kernels.long_product(left, rows)
        own = kernels.long_gram(left[-3:])
        along_N = products[-3]
        border_MN += products[:-3] - along_N - along_N[num_old:, None] + own[0, 0]
        cross_M += (products[-2] + along_N)[num_old:] - own[0, 1] - own[0, 0]
        sums_N += products[-1] + own[1, 2]
        if moments.removed is not None:
            reference_D = rounded_D.double() + rest_D.double()
            shift_M += (rows[num_old:].double() - rest_D) @ _shift_of(reference_D, moments.removed, stack)
        chosen = rows[sample(num_all)] - kernels.mean_rows(rows)
        squares += float(kernels.column_energies(chosen).double().square().sum())
    grown = bordered(moments, border_MN, cross_M, shift_M if moments.shift_N is not None else None)
    grown = replace(grown, round_off=max(moments.round_off, round_off(stack)))
    return replace(grown, sums_N=sums_N, entries=entry_dimensions(center_gram(grown.gram_NN), squares))


def _shift_of(reference: Tensor, removed: Tensor, stack: DenseStack) -> Tensor:
    """R − M over one block of whole output rows."""
    return (reference.view(-1, stack.layer.shape[1]) - removed).view(-1)


def _extend_updates(moments: LayerMoments, stack: UpdateStack) -> LayerMoments:
    """The borders of both Grams of the updates, from factors; their traits, which cost little, anew."""
    num_old = moments.num_models
    # A new model of lower rank leaves fewer leading rows that all have: the old models' products are of too many.
    starts_NN, singular_NR, sums_N = moments.starts_NN, moments.singular_NR, moments.sums_N
    if starts_NN is None or singular_NR is None or sums_N is None or min(stack.ranks[:num_old]) != min(stack.ranks):
        grams = update_grams(stack, Resources())
    else:
        grams = update_grams(stack, Resources(), num_old)
        grams.raw_NN[:num_old, :num_old] = moments.raw_NN
        grams.starts_NN[:num_old, :num_old] = starts_NN
        grams.singular_NR[:num_old, : singular_NR.shape[1]] = singular_NR
        grams.sums_N[:num_old] = sums_N
    if moments.shift_N is None:
        grown = from_raw_gram(grams.raw_NN, moments.num_values, max(moments.round_off, round_off(stack)))
    else:
        grown = replace(moments, **_zero_centered(grams.raw_NN), num_reference=len(stack))
    return replace(grown, starts_NN=grams.starts_NN, singular_NR=grams.singular_NR, sums_N=grams.sums_N)


def _zero_centered(raw_NN: Tensor) -> dict[str, Any]:
    about_mean = from_raw_gram(raw_NN, 0)
    return {
        "gram_NN": about_mean.gram_NN,
        "cross_N": about_mean.cross_N,
        "reference_energy": about_mean.reference_energy,
        "shift_N": about_mean.cross_N,
        "shift_energy": about_mean.reference_energy,
    }


def bordered(moments: LayerMoments, border: Tensor, cross: Tensor, shift: Tensor | None) -> LayerMoments:
    """Put a border (M, N + M) around the Gram; what the border does not tell of the new models is dropped."""
    num_old = moments.num_models
    top = torch.cat([moments.gram_NN, border[:, :num_old].T], 1)
    gram_NN = torch.cat(
        [top, torch.cat([border[:, :num_old], (border[:, num_old:] + border[:, num_old:].T) / 2], 1)], 0
    )
    shift_N = torch.cat([moments.shift_N, shift]) if moments.shift_N is not None and shift is not None else None
    return replace(
        moments,
        gram_NN=gram_NN,
        cross_N=torch.cat([moments.cross_N, cross]),
        shift_N=shift_N,
        entries=None,
        sums_N=None,
        singular_NR=None,
        starts_NN=None,
    )
