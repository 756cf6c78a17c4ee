"""Borders: the moments of a stack that has grown, from those of its first models and one read of it.

Legend: N old models, M new ones, R the reference (see `moments`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eigenzoo.linalg import lora
from eigenzoo.linalg.gram import center_gram
from eigenzoo.subspace.moments import (
    LayerMoments,
    entry_dimensions,
    from_raw_gram,
    leading_rows,
    squared_variances,
    update_grams,
    update_traits,
)
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack


def extend(moments: LayerMoments, stack: Stack) -> LayerMoments:
    """Extend the moments of a stack's first models to all of it: exact, one read and M·(N + M)·D products."""
    if isinstance(stack, UpdateStack):
        return _extend_updates(moments, stack)
    num_old, num_all = moments.num_models, len(stack)
    border = torch.zeros(num_all - num_old, num_all, dtype=torch.float64)
    cross = torch.zeros(num_all - num_old, dtype=torch.float64)
    shift = torch.zeros_like(cross)
    sums_N = torch.zeros(num_all, dtype=torch.float64)
    squares = 0.0
    for block in stack.blocks():
        sums_N += block.rows.sum(1, dtype=torch.float64)
        squares += squared_variances(block.rows - block.rows.mean(0))
        reference = block.rows[: moments.num_reference].mean(0, dtype=torch.float64)
        rows = block.rows.sub_(reference.to(block.rows.dtype))
        border += (rows[num_old:] @ rows.T).double()
        cross += (rows[num_old:] @ reference.to(rows.dtype)).double()
        if moments.removed is not None:
            shift += rows[num_old:].double() @ _shift_of(reference, moments.removed, stack)
    grown = bordered(moments, border, cross, shift if moments.shift_N is not None else None)
    return replace(grown, sums_N=sums_N, entries=entry_dimensions(center_gram(grown.gram_NN), squares))


def _shift_of(reference: Tensor, removed: Tensor, stack: DenseStack) -> Tensor:
    """R − M over one block of whole output rows."""
    return (reference.view(-1, stack.layer.shape[1]) - removed).view(-1)


def _extend_updates(moments: LayerMoments, stack: UpdateStack) -> LayerMoments:
    """The borders of both Grams of the updates, from factors; their traits, which cost little, anew."""
    num_old, num_all = moments.num_models, len(stack)
    num_rows = min(stack.ranks)
    new = [stack.factors(place) for place in range(num_old, num_all)]
    raw_NN, starts_NN = torch.zeros(2, num_all, num_all, dtype=torch.float64)
    raw_NN[:num_old, :num_old] = moments.raw_NN
    for place in range(num_all):
        factors = [stack.factors(place)]
        for gram_NN, products in (
            (raw_NN, lora.inner_products(new, factors)[:, 0]),
            (starts_NN, (leading_rows(new, num_rows) @ leading_rows(factors, num_rows).T)[:, 0]),
        ):
            gram_NN[num_old:, place] = products
            gram_NN[place, num_old:] = products
    if moments.starts_NN is not None and min(stack.ranks[:num_old]) == num_rows:
        starts_NN[:num_old, :num_old] = moments.starts_NN
    else:
        # A new model of lower rank leaves fewer rows that all have: the old models' products are of too many.
        starts_NN = update_grams(stack)[1]
    traits = {**update_traits(stack), "starts_NN": starts_NN}
    if moments.shift_N is None:
        return replace(from_raw_gram(raw_NN, moments.num_values), **traits)
    return replace(moments, **_zero_centered(raw_NN), num_reference=num_all, **traits)


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
