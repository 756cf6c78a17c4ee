"""What a bundle alone tells of models that came to it when the old models' files were gone: their coefficients and energies.

Inner products of models inside the kept subspace are those of their coefficients. What two models have in common outside of it is
not known, and counts as nothing.

Legend: N models, M of them beyond the moments, K coefficients of one layer, C of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eigenzoo.errors import BundleError
from eigenzoo.subspace.coefficients import Coefficients, outside_of
from eigenzoo.subspace.moments.border import bordered
from eigenzoo.subspace.moments.duplicates import DUPLICATE
from eigenzoo.subspace.moments.layer_moments import LayerMoments

if TYPE_CHECKING:
    from eigenzoo.subspace.subspace import Subspace


def extended_inside(
    moments: LayerMoments, coefficients_NK: Tensor, energies_M: Tensor, outside_M: Tensor
) -> LayerMoments:
    """Extend the moments of the first models to all, the last M of which are known by these energies ‖X‖² and ‖X − X̂‖²."""
    num_known, num_new = moments.num_models, energies_M.numel()
    inside = coefficients_NK[num_known:].double()
    border = inside @ coefficients_NK.double().T
    places = torch.arange(num_new)
    border[places, num_known + places] += outside_M.double()
    cross = (energies_M - border[places, num_known + places] - moments.reference_energy) / 2
    return bordered(moments, border, cross, None)


def find_copies(new: Sequence[Coefficients], space: Subspace) -> list[tuple[str, str]]:
    """Return pairs of a model and a new one of the same coefficients, to 1e-5 of the model's norm.

    Only of new models that lie inside the kept subspace: of others the coefficients do not tell.
    """
    inside = [model for model in new if model.residual <= DUPLICATE]
    if not inside:
        return []
    rows_NC = torch.cat([rows.flatten(1).double() for rows in space.all_coefficients.values()], 1)
    found = []
    for model in inside:
        place = space.names.index(model.name)
        close_N = (rows_NC[:place] - rows_NC[place]).square().sum(1) <= DUPLICATE * sum(model.energies.values())
        found += [(space.names[other], model.name) for other in close_N.nonzero()[:, 0].tolist()]
    return found


def extended_by_records(space: Subspace, layer: str, moments: LayerMoments) -> LayerMoments:
    """Moments with the models that were added without them, as far as their coefficients tell."""
    added, place = space.all_stored[moments.num_models :], list(space.layers).index(layer)
    unknown = [
        record.name
        for record, stored in zip(space.manifest.models[moments.num_models :], added, strict=True)
        if stored.energies_L is None
    ]
    if unknown:
        raise BundleError(
            f"neither the moments nor its own file tell the energies of {unknown[0]!r}",
            where=str(space.path),
            rule="see docs/bundle-format.md",
        )
    energies_M = torch.stack([stored.energies_L for stored in added if stored.energies_L is not None])[:, place]
    residuals_M = torch.stack([stored.residuals_L for stored in added])[:, place].tolist()
    values_MK = space.all_coefficients[layer][moments.num_models :]
    outside_M = torch.tensor(
        [
            outside_of(space.layers[layer], *known)
            for known in zip(values_MK, residuals_M, energies_M.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    return extended_inside(moments, space.all_coefficients[layer].flatten(1), energies_M, outside_M)
