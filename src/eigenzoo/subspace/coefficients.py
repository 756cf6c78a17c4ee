"""One model's coordinates in a subspace, and the model that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eigenzoo.formats.bundle.contents import Template
from eigenzoo.subspace.bases.basis import Projection


@dataclass(frozen=True)
class Coefficients:
    """One model's coordinates in a subspace.

    Attributes:
        name: the model's name.
        values: per layer, (K,) numbers or a (P, Q) core, float32.
        residuals: per layer ‖X − X̂‖² / ‖X‖², the share of its energy that is outside the subspace; above 1 for a small
            update in a zoo of a large mean.
        residual: the same over all layers; the layers' plain mean where a bundle was saved without its moments.
        energies: per layer ‖X‖², center included; empty where a bundle was saved without its moments.
        template: what a rebuilt model needs besides.
    """

    name: str
    values: Mapping[str, Tensor]
    residuals: Mapping[str, float]
    residual: float
    energies: Mapping[str, float]
    template: Template

    def to_dict(self) -> dict[str, Any]:
        """Return the residuals as plain JSON values."""
        layers = {layer: {"residual": value} for layer, value in self.residuals.items()}
        return {"residual": self.residual, "layers": layers}


def coefficients_of(name: str, projections: Mapping[str, Projection], template: Template) -> Coefficients:
    """Put one model's projections together with what makes it a complete model again."""
    energy = sum(projection.energy for projection in projections.values())
    outside = sum(projection.outside for projection in projections.values())
    return Coefficients(
        name,
        {layer: projection.coefficients.float() for layer, projection in projections.items()},
        {
            layer: projection.outside / projection.energy if projection.energy > 0 else 0.0
            for layer, projection in projections.items()
        },
        outside / energy if energy > 0 else 0.0,
        {layer: projection.energy for layer, projection in projections.items()},
        template,
    )
