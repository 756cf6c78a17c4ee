"""Project models onto a subspace layer by layer: their coefficients and residuals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from torch import Tensor

from eigenzoo.display import counted, in_percent, one_line
from eigenzoo.formats.bundle.contents import Template
from eigenzoo.linalg import lora
from eigenzoo.passes.workers import opened_workers
from eigenzoo.records import Progress, finite, no_progress
from eigenzoo.subspace.bases.basis import LayerBasis, Projection
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zoo import Zoo


@dataclass(frozen=True)
class Coefficients:
    """One model's coordinates in a subspace.

    Attributes:
        name: the model's name.
        values: per layer, (K,) numbers or a (P, Q) core, float32.
        residuals: per layer ‖X − X̂‖² / ‖X‖², the share of its energy outside the subspace. Above 1 for a small update in a
            zoo with a large mean. Infinite for a zero layer that is rebuilt as nonzero.
        residual: the same over all layers; the unweighted mean over layers if the bundle was saved without moments.
        energies, outside: per layer ‖X‖², center included, and ‖X − X̂‖²; empty if the bundle was saved without moments.
        template: all other contents of a rebuilt model.
    """

    name: str
    values: Mapping[str, Tensor]
    residuals: Mapping[str, float]
    residual: float
    energies: Mapping[str, float]
    outside: Mapping[str, float]
    template: Template

    def __repr__(self) -> str:
        numbers = sum(values.numel() for values in self.values.values())
        size = f"{counted(len(self.values), 'layer')}, {counted(numbers, 'number')}"
        return one_line(f"Coefficients({self.name!r}, {size}): {in_percent(self.residual)} lies outside the subspace")

    def to_dict(self) -> dict[str, Any]:
        """Return the residuals as plain JSON values, infinite ones as None."""
        layers = {layer: {"residual": finite(value)} for layer, value in self.residuals.items()}
        return {"residual": finite(self.residual), "layers": layers}


def share_of(outside: float, energy: float) -> float:
    """Return `outside` as a share of the energy. If the energy is zero, any other loss is infinite.

    >>> share_of(1.0, 4.0), share_of(1.0, 0.0), share_of(0.0, 0.0)
    (0.25, inf, 0.0)
    """
    if energy > 0:
        return outside / energy
    return inf if outside > 0 else 0.0


def coefficients_of(name: str, projections: Mapping[str, Projection], template: Template) -> Coefficients:
    """Combine one model's projections with the template that makes it a complete model."""
    energies = {layer: projection.energy for layer, projection in projections.items()}
    outside = {layer: projection.outside for layer, projection in projections.items()}
    return Coefficients(
        name,
        {layer: projection.coefficients.float() for layer, projection in projections.items()},
        {layer: share_of(outside[layer], energies[layer]) for layer in projections},
        share_of(sum(outside.values()), sum(energies.values())),
        energies,
        outside,
        template,
    )


def outside_of(basis: LayerBasis, values: Tensor, residual: float, energy: float) -> float:
    """Return ‖X − X̂‖² of a stored layer. For a zero layer the share is undefined, and ‖X̂‖² is returned."""
    if isfinite(residual):
        return residual * energy
    rebuilt = basis.rebuild(values)
    return lora.energy(rebuilt) if isinstance(rebuilt, tuple) else float(rebuilt.double().square().sum())


def project_layers(
    layers: Mapping[str, LayerBasis], zoo: Zoo, progress: Progress = no_progress
) -> dict[str, list[Projection]]:
    """Project every model of an opened zoo (see `Subspace.open`), layer by layer."""

    def project(name: str) -> list[Projection]:
        return layers[name].project_all(zoo.stack(name))

    with opened_workers(None) as workers:
        return dict(workers.each("projecting layers", project, layers, progress, what="layer"))


def with_templates(zoo: Zoo, projections_by_layer: Mapping[str, list[Projection]]) -> dict[str, Coefficients]:
    """Combine the projections of a zoo's models with the templates that make them complete models."""
    return {
        name: coefficients_of(
            name,
            {layer: projections[index] for layer, projections in projections_by_layer.items()},
            ZooTemplate(zoo, index),
        )
        for index, name in enumerate(zoo.names)
    }
