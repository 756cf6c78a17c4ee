"""Methods that need data beside the updates.

Legend: T models, O outputs, I inputs, S ranks of all updates.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.merge.layer_updates import LayerUpdates, Product
from eigenzoo.merge.method import Range, method


@method("factors", formula="(Σ w τ G)(Σ w G)⁻¹, G the moment of the layer's inputs", source="Jin et al. 2023")
def regmean(
    layer: LayerUpdates,
    *,
    shrink: Annotated[float, Range("what entries of G beside the diagonal are multiplied by", 0, 1)] = 0.9,
) -> Product | Tensor:
    """The linear layer that is nearest to all models' on their own inputs."""
    grams = [_shrunk(_gram_of(layer, model), shrink) for model in layer.context.models]
    weights = layer.weights_T.tolist()
    total = torch.stack([gram * weight for gram, weight in zip(grams, weights, strict=True)]).sum(0)
    factors = layer.factors()
    if factors is None:
        wanted = sum(weight * update @ gram for weight, update, gram in zip(weights, layer.whole(), grams, strict=True))
        return _divided(wanted, total)
    left = torch.cat([b for b, _ in factors], 1)
    right = torch.cat([weight * a @ gram for weight, (_, a), gram in zip(weights, factors, grams, strict=True)], 0)
    return Product(left, _divided(right, total))


def _gram_of(layer: LayerUpdates, model: str) -> Tensor:
    gram = layer.context.input_grams.get(model)
    if gram is None:
        raise UsageError(
            f"{model} has no moment of its inputs",
            where=f"layer '{layer.context.layer}'",
            rule="regmean needs one (I, I) matrix per layer and model",
            next_step="collect them with eigenzoo.merge.input_grams.collect, and give them as grams=",
        )
    return gram.double()


def _shrunk(gram_II: Tensor, shrink: float) -> Tensor:
    return gram_II * shrink + torch.diag(gram_II.diagonal() * (1 - shrink))


def _divided(rows_SI: Tensor, gram_II: Tensor) -> Tensor:
    """Return X G⁺ for a symmetric G. Inputs that no model has seen are left alone."""
    values, vectors = torch.linalg.eigh(gram_II)
    kept = values > values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    turned = vectors[:, kept]
    divided: Tensor = (rows_SI @ turned) / values[kept] @ turned.T
    return divided
