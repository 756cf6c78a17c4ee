"""Methods whose result is a combination of the updates, with weights that follow from their T × T inner products.

They are exact in every form of the updates, and need none of their values.

Legend: T models.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.merge.layer_updates import Combination, LayerUpdates
from eigenzoo.merge.method import Range, method

PARALLEL = 0.9995
"""Cosine from which the path between two updates is a line (as in mergekit)."""

SMALL = 1e-6
"""Denominators below this count as zero: at opposite updates the rule of Model Stock has no finite answer."""


@method("gram", formula="Σ τ / T", source="Wortsman et al. 2022", weighted=False)
def mean(layer: LayerUpdates) -> Combination:
    """Average of the updates."""
    return Combination(torch.full_like(layer.weights_T, 1 / layer.num_models))


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
    layer: LayerUpdates, *, t: Annotated[float, Range("position between two models, from 0 to 1", 0, 1)] = 0.5
) -> Combination:
    """Path on a sphere between two updates."""
    return _on_the_path(layer.gram_TT, t, 1 - PARALLEL**2)


@method("gram", formula="slerp at t = w₂ / (w₁ + w₂)", source="mergekit", models=(1, 2))
def nuslerp(layer: LayerUpdates) -> Combination:
    """Path on a sphere between two updates, at a position that follows from their weights."""
    total = float(layer.weights_T.sum())
    t = 0.5 if abs(total) < SMALL or layer.num_models == 1 else float(layer.weights_T[1]) / total
    return _on_the_path(layer.gram_TT, t, 1e-16)


def _on_the_path(gram_TT: Tensor, t: float, parallel: float) -> Combination:
    """Return the point at t of the path between two updates; a line where sin² of their angle is at most `parallel`."""
    if len(gram_TT) == 1:
        return Combination(torch.ones(1, dtype=torch.float64))
    line = Combination(torch.tensor([1 - t, t], dtype=torch.float64))
    norms = _norms(gram_TT)
    if float(norms.min()) == 0:
        return line
    cosine = (gram_TT[0, 1] / norms.prod()).clamp(-1, 1)
    if float(1 - cosine.square()) <= parallel:
        return line
    angle = cosine.acos()
    return Combination(torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin())


@method("gram", formula="mean norm × Karcher mean of τ / ‖τ‖", source="mergekit; Karcher 1977")
def karcher(
    layer: LayerUpdates,
    *,
    rounds: Annotated[int, Range("largest number of iterations", 1, 10_000)] = 10,
    tolerance: Annotated[float, Range("length of a step at which to stop", 0, 1)] = 1e-5,
) -> Combination:
    """Mean of the updates' directions on the sphere, times their mean norm."""
    norms = _norms(layer.gram_TT)
    total = float(layer.weights_T.sum())
    if total == 0:
        raise UsageError("the weights sum to 0", where="method karcher", rule="it is an average")
    shares = layer.weights_T / total
    # Directions of updates that are zero do not count, but their norms do.
    present = norms > tolerance
    if not bool(present.any()):
        return Combination(torch.zeros_like(norms))
    units = torch.where(present, 1 / norms.where(present, torch.ones_like(norms)), 0.0)
    gram = layer.gram_TT * units * units[:, None]
    weights = torch.where(present, shares, 0.0)
    weights = weights / weights.sum()
    point = weights / _length(weights, gram) if _length(weights, gram) >= tolerance else _first(present)
    for _ in range(rounds):
        cosines = (gram @ point).clamp(-1, 1)
        angles = torch.where(present, cosines.acos(), 0.0)
        factors = torch.where(angles < tolerance, 0.0, weights * angles / angles.sin().where(angles >= tolerance, 1.0))
        step = factors - (factors * cosines).sum() * point
        length = _length(step, gram)
        if length < tolerance:
            break
        point = length.cos() * point + length.sin() / length * step
        point = point / _length(point, gram)
    return Combination((shares * norms).sum() * point * units)


def _first(present: Tensor) -> Tensor:
    """Choose the first update, which is present."""
    chosen = torch.zeros(len(present), dtype=torch.float64)
    chosen[int(present.nonzero()[0, 0])] = 1
    return chosen


def _length(weights_T: Tensor, gram_TT: Tensor) -> Tensor:
    return (weights_T @ gram_TT @ weights_T).clamp_min(0).sqrt()


@method("gram", formula="t·mean, t = T cos θ / (1 + (T − 1) cos θ)", source="Jang et al. 2024", weighted=False)
def model_stock(layer: LayerUpdates) -> Combination:
    """Average of the updates, shortened by how much they differ in direction."""
    num = layer.num_models
    if num == 1:
        return Combination(torch.ones(1, dtype=torch.float64))
    norms = _norms(layer.gram_TT)
    products = norms * norms[:, None]
    cosines = (layer.gram_TT / products.where(products > 0, torch.ones_like(products))).clamp(-1, 1)
    above = torch.triu_indices(num, num, 1)
    cosine = float(cosines[above[0], above[1]].mean())
    denominator = 1 + (num - 1) * cosine
    t = 0.0 if abs(denominator) < SMALL else num * cosine / denominator
    return Combination(torch.full((num,), t / num, dtype=torch.float64))


def _norms(gram_TT: Tensor) -> Tensor:
    return gram_TT.diagonal().clamp_min(0).sqrt()
