"""The loss of a merge, and the part of each source that is left, in the file as it is written.

Legend: M the merged update that the method defines, M̂ the one in the file (cut to a rank, rounded to its dtype), τ a
source's update.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from eigenzoo.linalg.lora import Factors, inner_products, singular_values
from eigenzoo.merge.request import Request
from eigenzoo.passes.machine import peak_memory
from eigenzoo.records import plain


@dataclass(frozen=True)
class LayerCertificate:
    """One layer.

    Attributes:
        rank: of M̂.
        loss: ‖M − M̂‖ / ‖M‖, in the Frobenius norm; 0 where M is zero.
        spectral: the same of the largest singular values; None where they are not computed.
    """

    rank: int
    loss: float
    spectral: float | None


@dataclass(frozen=True)
class SourceCertificate:
    """One source, over all layers.

    Attributes:
        weight: as it was given.
        norm: ‖τ‖.
        kept: ⟨τ, M̂⟩ / ‖τ‖²: 1 where the merge does along τ what τ does alone. None for a zero update.
        outside: of a model of a bundle, the share of its energy that its coefficients do not have; else None.
    """

    weight: float
    norm: float
    kept: float | None
    outside: float | None = None


@dataclass(frozen=True)
class Loss:
    """‖M − M̂‖ / ‖M‖ over all layers; `spectral` compares the largest singular values of all layers.

    `spectral` is None for full weights with layers too large for it.
    """

    frobenius: float
    spectral: float | None


@dataclass(frozen=True)
class Certificate:
    """A merge, as its file has it.

    Attributes:
        method, semantics, space, scale, options: what was asked for; semantics and space are None where a method has no choice.
        models: by name.
        layers: by name.
        norm: ‖M‖, over all layers.
        loss: over all layers.
        bytes: of the weights file.
        seconds, peak_memory: of the merge; peak_memory is that of the process, in bytes.
        warnings: what the reader has to know.
    """

    method: str
    semantics: str | None
    space: str | None
    scale: float
    options: Mapping[str, Any]
    models: Mapping[str, SourceCertificate]
    layers: Mapping[str, LayerCertificate]
    norm: float
    loss: Loss
    bytes: int
    seconds: float
    peak_memory: int
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Certificate({self.method}, {len(self.models)} models, {len(self.layers)} layers, "
            f"loss={self.loss.frobenius:.3g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {**plain(self), "num_layers": len(self.layers)}


@dataclass(frozen=True)
class LayerSums:
    """The terms of one layer in sums over layers.

    Attributes:
        rank: of M̂.
        energy, lost: ‖M‖² and ‖M − M̂‖².
        largest, largest_lost: largest singular values of M and of M − M̂; None where they are not computed.
        energies_T: ‖τ_t‖².
        products_T: ⟨τ_t, M̂⟩.
    """

    rank: int
    energy: float
    lost: float
    largest: float | None
    largest_lost: float | None
    energies_T: Tensor
    products_T: Tensor

    @property
    def loss(self) -> float:
        """‖M − M̂‖ / ‖M‖; 0 where M is zero."""
        return sqrt(self.lost / self.energy) if self.energy > 0 else 0.0

    @property
    def spectral(self) -> float | None:
        """The loss of the largest singular value; 0 where M is zero, None where it is not computed."""
        if self.largest is None or self.largest_lost is None:
            return None
        return self.largest_lost / self.largest if self.largest > 0 else 0.0


def compare(merged: Factors, values: Tensor, written: Factors, sources: Sequence[Factors]) -> LayerSums:
    """Compare M, of these singular values, with M̂ and with the sources. Cost (O + I)·S² + S³ for S columns of both."""
    written = written[0].double(), written[1].double()
    difference = singular_values((torch.cat([merged[0], -written[0]], 1), torch.cat([merged[1], written[1]], 0)))
    return LayerSums(
        rank=written[1].shape[0],
        energy=float(values.square().sum()),
        lost=float(difference.square().sum()),
        largest=_first(values),
        largest_lost=_first(difference),
        energies_T=torch.stack([inner_products([source], [source])[0, 0] for source in sources]),
        products_T=inner_products(sources, [written])[:, 0],
    )


def _first(values: Tensor) -> float:
    return float(values[0]) if values.numel() else 0.0


def certify(
    request: Request,
    weights: Mapping[str, float],
    layers: Mapping[str, LayerSums],
    num_bytes: int,
    started: float,
    *,
    warnings: Sequence[str] = (),
    outside: Mapping[str, float] | None = None,
) -> Certificate:
    """Return the certificate of a merge.

    Args:
        request: what was done; of a recipe, with the first layer.
        weights: by model.
        layers: the terms of each layer.
        num_bytes: of the weights file.
        started: when it began, by `time.perf_counter`.
        outside: by model; see `SourceCertificate`.
    """
    sums = list(layers.values())
    energy, lost = sum(layer.energy for layer in sums), sum(layer.lost for layer in sums)
    energies = torch.stack([layer.energies_T for layer in sums]).sum(0).tolist()
    products = torch.stack([layer.products_T for layer in sums]).sum(0).tolist()
    models = {
        name: SourceCertificate(
            weight,
            sqrt(max(own, 0.0)),
            product / own if own > 0 else None,
            None if outside is None else outside[name],
        )
        for (name, weight), own, product in zip(weights.items(), energies, products, strict=True)
    }
    return Certificate(
        method=request.method.name,
        semantics=request.options.get("semantics"),
        space=request.chosen_space,
        scale=request.scale,
        options=request.options,
        models=models,
        layers={name: LayerCertificate(layer.rank, layer.loss, layer.spectral) for name, layer in layers.items()},
        norm=sqrt(energy),
        loss=Loss(sqrt(lost / energy) if energy > 0 else 0.0, _spectral(sums)),
        bytes=num_bytes,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        warnings=tuple(warnings),
    )


def _spectral(sums: Sequence[LayerSums]) -> float | None:
    largest = [layer.largest for layer in sums if layer.largest is not None]
    lost = [layer.largest_lost for layer in sums if layer.largest_lost is not None]
    if len(largest) < len(sums) or len(lost) < len(sums):
        return None
    return max(lost) / max(largest) if max(largest) > 0 else 0.0
