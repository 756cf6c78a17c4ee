"""Methods that work on singular values and vectors. They are exact in every orthonormal frame of the updates."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from eigenzoo.merge.layer_updates import LayerUpdates
from eigenzoo.merge.method import Range, method


@method("core", formula="polar([U₁ … U_T]) Σ polar([V₁ … V_T])ᵀ", source="Gargiulo et al. 2025")
def tsv(
    layer: LayerUpdates,
    *,
    share: Annotated[
        float, Range("share of each update's rank that is kept; 0 shares one rank among all models", 0, 1)
    ] = 1.0,
) -> Tensor:
    """Singular vectors of all updates, made orthogonal together."""
    updates = layer.whole() * layer.weights_T[:, None, None]
    u, values, vt = torch.linalg.svd(updates, full_matrices=False)
    limit = values.shape[1]
    kept = [max(1, min(limit, round(share * rank) if share else rank // len(layer.models))) for rank in layer.ranks]
    left = torch.cat([u[t, :, :k] for t, k in enumerate(kept)], 1)
    right = torch.cat([vt[t, :k] for t, k in enumerate(kept)], 0)
    middle = torch.cat([values[t, :k] for t, k in enumerate(kept)])
    return (_polar(left) * middle) @ _polar(right)


def _polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows or columns."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ vt
    return nearest
