"""Methods that work on singular values and vectors. They are exact in every orthonormal frame of the updates.

Legend: T models, P rows and Q columns of the frame, R rank of an update, K kept directions.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from eigenzoo.linalg.core_frame import EPSILON
from eigenzoo.merge.layer_updates import LayerUpdates
from eigenzoo.merge.method import Range, method
from eigenzoo.merge.methods.elementwise import elect_by_paper


@method("core", formula="polar([U₁ … U_T]) Σ polar([V₁ … V_T])ᵀ", source="Gargiulo et al. 2025")
def tsv(
    layer: LayerUpdates,
    *,
    share: Annotated[
        float, Range("share of each update's rank that is kept; 0: all of an adapter's, 1 / T of a full weight's", 0, 1)
    ] = 0.0,
) -> Tensor:
    """Leading singular vectors of all updates, made orthogonal together."""
    left, right, middle = [], [], []
    for part, weight in zip(layer.singular_parts(), layer.weights_T.tolist(), strict=True):
        kept = _share_of(part.values.numel(), _tsv_share(layer, share))
        # Copies, so that the other vectors need no memory.
        left.append(part.left[:, :kept].clone())
        right.append(part.right[:kept].clone())
        middle.append(part.values[:kept] * weight)
    return (_polar(torch.cat(left, 1)) * torch.cat(middle)) @ _polar(torch.cat(right, 0))


def _tsv_share(layer: LayerUpdates, share: float) -> float:
    if share:
        return share
    return 1.0 if layer.factors() is not None else 1 / layer.num_models


@method("core", formula="mean(σ)·U Vᵀ of Σ w τ = U diag(σ) Vᵀ", source="Marczak et al. 2025")
def iso_c(layer: LayerUpdates) -> Tensor:
    """The sum of the updates, with all its singular values at their mean."""
    u, values, vt = _svd(layer.combined(layer.weights_T))
    return u @ vt * values.mean() if values.numel() else u @ vt


@method(
    "core",
    formula="iso_c of the leading directions of Σ w τ and of what each update has beside them",
    source="Marczak et al. 2025",
)
def iso_cts(
    layer: LayerUpdates,
    *,
    common: Annotated[float, Range("share of directions that are those of the sum", 0, 1)] = 0.8,
) -> Tensor:
    """Common directions of all updates and own ones of each, made orthogonal together, at one singular value."""
    u, values, vt = _svd(layer.combined(layer.weights_T))
    rank = values.numel()
    num_own = (rank - round(common * rank)) // layer.num_models
    num_common = rank - num_own * layer.num_models
    left, right, sizes = [u[:, :num_common]], [vt[:num_common]], [values[:num_common]]
    for update, weight in zip(layer.matrices(), layer.weights_T.tolist(), strict=True):
        if not num_own:
            break
        beside = weight * (update - left[0] @ (left[0].T @ update))
        own_u, own_values, own_vt = _svd(beside, abs(weight) * float(torch.linalg.matrix_norm(update)))
        left.append(own_u[:, :num_own].clone())
        right.append(own_vt[:num_own].clone())
        sizes.append(own_values[:num_own])
    joint = torch.cat(sizes)
    if not joint.numel():
        return torch.zeros(u.shape[0], vt.shape[1], dtype=u.dtype)
    return _polar(torch.cat(left, 1)) @ _polar(torch.cat(right, 0)) * joint.mean()


@method("core", formula="mean + λ Σ w SVD_k(τ − mean)", source="Choi et al. 2024")
def cart(
    layer: LayerUpdates,
    *,
    share: Annotated[float, Range("share of each difference's rank that is kept, at least one direction", 0, 1)] = 0.04,
    strength: Annotated[float, Range("what the sum of the differences is multiplied by", -1e3, 1e3)] = 0.1,
) -> Tensor:
    """The mean, and the leading directions of each model's difference from it."""
    mean = layer.combined(torch.full_like(layer.weights_T, 1 / layer.num_models))
    merged = mean.clone()
    for update, weight in zip(layer.matrices(), layer.weights_T.tolist(), strict=True):
        u, values, vt = _svd(update - mean, float(torch.linalg.matrix_norm(update)))
        kept = _share_of(values.numel(), share)
        merged += strength * weight * (u[:, :kept] * values[:kept]) @ vt[:kept]
    return merged


@method("core", formula="U_r · ties(U_rᵀ τ V_r) · V_rᵀ", source="arXiv 2606.03723")
def ctm(
    layer: LayerUpdates,
    *,
    directions: Annotated[int, Range("directions of both sides; 0 keeps all", 0, 2**31)] = 0,
    blend: Annotated[float, Range("how much the norms of updates weigh in the choice of directions", 0, 1)] = 0.25,
    inside: Annotated[Literal["ties", "sum"], Range("how cores are merged")] = "ties",
    keep: Annotated[float, Range("share of each core's entries that is kept, for ties", 0, 1)] = 0.2,
) -> Tensor:
    """Compress all updates to shared directions of outputs and inputs, and merge their cores there."""
    updates = layer.whole()
    norms = torch.linalg.matrix_norm(updates)
    scaled = updates * torch.where(norms > 0, norms.where(norms > 0, 1.0) ** (blend - 1), 0.0)[:, None, None]
    left = _svd(torch.cat(list(scaled), 1))[0]
    right = _svd(torch.cat(list(scaled), 0))[2]
    if directions:
        left, right = left[:, :directions], right[:directions]
    cores = left.T @ updates @ right.T
    if inside == "sum":
        return left @ (cores * layer.weights_T[:, None, None]).sum(0) @ right
    return left @ elect_by_paper(cores, layer.weights_T, keep) @ right


@method("core", formula="(Σ w τ P)(Σ P)⁺, P = τᵀτ / ‖τ‖²", source="Cheng et al. 2025")
def wudi(layer: LayerUpdates) -> Tensor:
    """The update that disturbs each model least on the directions that this model's own update acts on."""
    updates = layer.whole()
    norms = torch.linalg.matrix_norm(updates)
    units = updates * torch.where(norms > 0, 1 / norms.where(norms > 0, 1.0), 0.0)[:, None, None]
    # Σ P from a factor of it, which has the square root of its condition number.
    _, values, vt = _svd(torch.cat(list(units), 0))
    wanted = sum(
        (weight * update @ unit.T) @ unit
        for weight, update, unit in zip(layer.weights_T.tolist(), updates, units, strict=True)
    )
    merged: Tensor = ((wanted @ vt.T) / values.square()) @ vt
    return merged


def _svd(matrix: Tensor, size: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, σ and Vᵀ without what is round-off: of the matrix itself, or of terms of norm `size` that it is a difference of."""
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    largest = max(float(values[0]), size) if values.numel() else 0.0
    rank = int((values > largest * max(matrix.shape) * EPSILON).sum())
    return u[:, :rank], values[:rank], vt[:rank]


def _share_of(rank: int, share: float) -> int:
    """Return so many directions of a rank: at least one, where there is one."""
    return min(rank, max(1, round(share * rank)))


def _polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows or columns; directions that the matrix does not have stay zero."""
    u, _, vt = _svd(matrix)
    return u @ vt
