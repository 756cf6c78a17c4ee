"""Methods whose result is a combination of the updates, with weights that follow from their T × T inner products.

They are exact in every form of the updates, and need none of their values.
"""

from __future__ import annotations

from typing import Annotated

import torch

from eigenzoo.errors import UsageError
from eigenzoo.merge.layer_updates import Combination, LayerUpdates
from eigenzoo.merge.method import Range, method

PARALLEL = 0.9995
"""Cosine from which two updates count as parallel: the path between them is then a line (as in mergekit)."""


@method("gram", formula="Σ τ / T", source="Wortsman et al. 2022", weighted=False)
def mean(layer: LayerUpdates) -> Combination:
    """Average of the updates."""
    return Combination(torch.full_like(layer.weights_T, 1 / len(layer.models)))


@method("gram", formula="Σ w τ / Σ w", source="Wortsman et al. 2022")
def linear(layer: LayerUpdates) -> Combination:
    """Weighted average of the updates."""
    total = float(layer.weights_T.sum())
    if total == 0:
        raise UsageError("the weights sum to 0", where="method linear", next_step="use method task_arithmetic")
    return Combination(layer.weights_T / total)


@method("gram", formula="Σ w τ", source="Ilharco et al. 2023")
def task_arithmetic(layer: LayerUpdates) -> Combination:
    """Weighted sum of the updates."""
    return Combination(layer.weights_T)


@method(
    "gram", formula="(sin((1 − t)θ) τ₁ + sin(tθ) τ₂) / sin θ", source="Shoemake 1985", models=(1, 2), weighted=False
)
def slerp(
    layer: LayerUpdates, *, t: Annotated[float, Range("position between the two models", 0, 1)] = 0.5
) -> Combination:
    """Path on a sphere between two updates."""
    ones = torch.ones_like(layer.weights_T)
    if len(layer.models) == 1:
        return Combination(ones)
    norms = layer.gram_TT.diagonal().clamp_min(0).sqrt()
    line = Combination(torch.tensor([1 - t, t], dtype=torch.float64))
    if float(norms.min()) == 0:
        return line
    cosine = (layer.gram_TT[0, 1] / norms.prod()).clamp(-1, 1)
    if abs(float(cosine)) > PARALLEL:
        return line
    angle = cosine.acos()
    return Combination(torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin())
