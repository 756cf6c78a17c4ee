"""Projecting: coefficients of models in a subspace's layers, layers side by side."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from eigenzoo.passes.workers import opened_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.subspace.bases.basis import LayerBasis, Projection
from eigenzoo.subspace.coefficients import Coefficients, coefficients_of
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zoo import Zoo


def project_layers(
    layers: Mapping[str, LayerBasis], zoo: Zoo, progress: Progress = no_progress
) -> dict[str, list[Projection]]:
    """Project every model of an opened zoo (see `Subspace.open`), layer by layer."""
    found: dict[str, list[Projection]] = {}
    with opened_workers(None) as workers:
        tasks = ((name, [partial(_project_layer, basis, zoo, name)]) for name, basis in layers.items())
        for name, (projections,) in workers.in_order(tasks):
            found[name] = projections
            progress("projecting layers", len(found), len(layers))
    return found


def with_templates(zoo: Zoo, found: Mapping[str, list[Projection]]) -> dict[str, Coefficients]:
    """Put the projections of a zoo's models together with what makes them complete models again."""
    return {
        name: coefficients_of(
            name, {layer: projections[place] for layer, projections in found.items()}, ZooTemplate(zoo, place)
        )
        for place, name in enumerate(zoo.names)
    }


def _project_layer(basis: LayerBasis, zoo: Zoo, name: str) -> list[Projection]:
    return basis.project_all(zoo.stack(name))
