"""Convert another tool's factor to a layer of a bundle: its mean and directions are the basis, its loadings the coefficients.

    directions are    form      a factor is
    whole factors     flat      mean + Σ c_k V_k                    (vLoRA)
    along one side    tucker    C · Vᵀ for A, U · C for B, no mean  (components and loadings)

Directions that are not orthonormal are replaced by orthonormal ones, V = R·Q, and the coefficients c by c·R. As c·V = (c·R)·Q,
rebuilt factors do not change.

Legend: N models, K directions, D values of one flattened factor, S values of a side, R rank of the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor

from eigenzoo.errors import DataError
from eigenzoo.formats.bundle.manifest import LayerRecord
from eigenzoo.formats.subspaces.factors import ForeignFactor
from eigenzoo.records import Layer, LayerFit
from eigenzoo.subspace.bases.basis import FLAT, TUCKER, WholeTensorWriter, deviation_from_identity
from eigenzoo.subspace.bases.flat import ORTHONORMAL
from eigenzoo.subspace.bundles.storage import layer_record
from eigenzoo.weights.unfolding import unfolded_shape, unfolding


@dataclass(frozen=True)
class ImportedLayer:
    """One factor in a bundle: its record and fit, all models' coefficients (N, …) and energies, and its directions' deviation."""

    record: LayerRecord
    fit: LayerFit
    coefficients: Tensor
    energies_N: Tensor
    deviation: float


def factor_layer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Layer:
    """Describe a factor as a layer."""
    dtype_name = str(dtype).removeprefix("torch.")
    return Layer(
        name, "dense", unfolded_shape(shape), shape, unfolding(shape), dtype_name, prod(shape) * dtype.itemsize
    )


def scaled(factor: ForeignFactor, scale: float) -> ForeignFactor:
    """Return a factor times a number. Its mean and loadings are multiplied, and its directions are not."""
    mean = None if factor.mean is None else factor.mean * scale
    return ForeignFactor(mean, factor.directions, factor.loadings * scale)


def orthonormalized(directions_KS: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return orthonormal directions Q (K', S), the matrix R (K, K') with V = R·Q, and the deviation of V from orthonormal.

    Directions that are orthonormal up to float32 round-off are not changed. The deviation of more than S directions counts as
    infinite. Their Gram, larger than they are, is not computed, because only a hostile file has so many.
    """
    num_directions, size = directions_KS.shape
    deviation = inf if num_directions > size else deviation_from_identity(directions_KS @ directions_KS.T)
    if deviation <= ORTHONORMAL:
        return directions_KS, torch.eye(directions_KS.shape[0], dtype=directions_KS.dtype), deviation
    q_SK, r_KK = torch.linalg.qr(directions_KS.T)
    signs_K = torch.where(r_KK.diagonal() < 0, -1.0, 1.0).to(q_SK)  # so that no direction changes its sign
    return (q_SK * signs_K).T.contiguous(), (r_KK * signs_K[:, None]).T, deviation


def import_flat(layer: Layer, factor: ForeignFactor, writer: WholeTensorWriter) -> ImportedLayer:
    """Import mean, whole-factor directions and loadings."""
    assert factor.mean is not None
    directions_KD, turn_KK, deviation = orthonormalized(factor.directions)
    coefficients_NK = factor.loadings @ turn_KK
    ranks = {"models": directions_KD.shape[0]}
    _check_range(layer, factor.mean, coefficients_NK)
    writer.append(f"{layer.name}/mean", factor.mean.float().view(layer.shape))
    if ranks["models"]:
        writer.append(f"{layer.name}/models", directions_KD.float().view(-1, *layer.shape))
    along_K = directions_KD @ factor.mean
    center_energy = float(factor.mean.square().sum())
    energies_N = (center_energy + 2 * coefficients_NK @ along_K + coefficients_NK.square().sum(1)).clamp_min(0)
    center_K = coefficients_NK.mean(0)
    mean_energy = max(center_energy + float(2 * center_K @ along_K + center_K.square().sum()), 0.0)
    variance = float((coefficients_NK - center_K).square().sum())
    record = layer_record(layer, FLAT, ranks, has_mean=True)
    fit = _fit(layer, ranks, energies_N, variance, mean_energy)
    return ImportedLayer(record, fit, coefficients_NK, energies_N, deviation)


def import_side(layer: Layer, factor: ForeignFactor, writer: WholeTensorWriter) -> ImportedLayer:
    """Import directions along the inputs of A or the outputs of B, and loadings as cores."""
    directions_KS, turn_KK, deviation = orthonormalized(factor.directions)
    cores_NKR = torch.einsum("nkr,kq->nqr", factor.loadings, turn_KK)
    axis = "inputs" if layer.name.endswith("lora_A") else "outputs"
    ranks = {axis: directions_KS.shape[0]}
    if ranks[axis] == directions_KS.shape[1]:
        # Directions that span the whole side need no basis.
        cores_NKR, ranks = torch.einsum("nkr,ks->nsr", cores_NKR, directions_KS), {}
    elif ranks[axis]:
        writer.append(f"{layer.name}/{axis}", directions_KS.T.float().contiguous())
    _check_range(layer, cores_NKR)
    cores = cores_NKR.mT if axis == "inputs" else cores_NKR
    energies_N = cores.flatten(1).square().sum(1)
    variance = float((cores - cores.mean(0)).square().sum())
    record = layer_record(layer, TUCKER, ranks, has_mean=False)
    shown = {side: ranks.get(side, layer.shape[index]) for index, side in enumerate(("outputs", "inputs"))}
    fit = _fit(layer, shown, energies_N, variance, float(cores.mean(0).square().sum()))
    return ImportedLayer(record, fit, cores.contiguous(), energies_N, deviation)


def _check_range(layer: Layer, *values: Tensor) -> None:
    """Raise DataError for numbers that are infinite in float32, though finite in the file or before they are scaled."""
    if not all(bool(torch.isfinite(tensor.float()).all()) for tensor in values):
        raise DataError(
            "a mean or coefficients too large for float32",
            where=f"layer '{layer.name}'",
            rule="bundles hold float32",
            next_step="check the scale that the adapter or alpha gives",
        )


def _fit(layer: Layer, ranks: Mapping[str, int], energies_N: Tensor, variance: float, mean_energy: float) -> LayerFit:
    energy = float(energies_N.sum())
    return LayerFit(
        shape=layer.shape,
        rank=dict(ranks),
        reason=dict.fromkeys(ranks, "imported"),
        energy=energy,
        variance=variance,
        captured=None,
        heldout=None,
        null=None,
        mean_energy=min(len(energies_N) * mean_energy / energy, 1.0) if energy > 0 else 0.0,
        residual=0.0,
        note="imported: what was kept of the originals' variance is not known",
    )
