"""Held-out capture of form `tucker`: fit bases and cores on most models, and see what they hold of the others.

The models axis alone needs none of this: there everything follows from the Gram (`linalg.heldout`).

Legend: N models, P kept outputs, Q kept inputs, K shared cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from eigenzoo.linalg.heldout import NUM_FOLDS, deal
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.subspace.bases.tucker import collect_cores
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.stack import Stack

LARGEST_SIDE = 2048
"""Beyond this many outputs or inputs a second eigendecomposition costs seconds per layer, and held-out is left to `project`;
a sketch has no such limit."""


def tucker_capture(
    stack: Stack,
    moments: LayerMoments,
    ranks: Mapping[str, int],
    collect: Callable[[Stack], LayerMoments],
    *,
    seed: int,
) -> float | None:
    """Share of held-out models' centred energy that bases and cores of the same ranks, fitted to the others, capture.

    One fold of five (by a seeded permutation) is held out: a second pass over the weights, and a second
    eigendecomposition of each side (where `collect` sketches, a second sketch). None for fewer than five models, for sides above
    `LARGEST_SIDE` that are not sketched, and without variance.
    """
    num_models = len(stack)
    if num_models < NUM_FOLDS or moments.variance == 0 or _is_large(moments, ranks):
        return None
    held, *rest = deal(num_models, NUM_FOLDS, seed)
    fitted = torch.cat(rest)
    part = stack.subset(fitted.tolist())
    part_moments = collect(part)
    bases = {
        axis: side.eigenvectors().basis(ranks[axis])
        for axis, side in (("outputs", part_moments.outputs), ("inputs", part_moments.inputs))
        if side is not None and axis in ranks
    }
    outputs_OP, inputs_IQ = bases.get("outputs"), bases.get("inputs")
    cores = collect_cores(stack, moments, outputs_OP, inputs_IQ).cores_NPQ.flatten(1)
    # Everything so far is about the mean of all models; the fitted ones' own mean is what a held-out model is seen from.
    cores = cores - cores[fitted].mean(0)
    total = _centered_energy(moments.centered_NN, fitted, held)
    if "models" in ranks:
        return float(_inside(cores[fitted], cores[held], ranks["models"]) / total)
    return float(cores[held].square().sum() / total)


def _is_large(moments: LayerMoments, ranks: Mapping[str, int]) -> bool:
    sides = {"outputs": moments.outputs, "inputs": moments.inputs}
    exact = (side for axis, side in sides.items() if axis in ranks and side is not None and side.outside is None)
    return any(side.size > LARGEST_SIDE for side in exact)


def _centered_energy(gram_NN: Tensor, fitted: Tensor, held: Tensor) -> Tensor:
    """Σ‖x_h − mean of the fitted‖² over held-out models, from the Gram."""
    block = gram_NN[fitted][:, fitted]
    return (gram_NN.diagonal()[held] - 2 * gram_NN[fitted][:, held].mean(0) + block.mean()).clamp_min(0).sum()


def _inside(fitted_ND: Tensor, held_ND: Tensor, rank: int) -> Tensor:
    """Energy of held-out rows in the leading directions of the fitted ones."""
    values_K, vectors_NK = eigenpairs(fitted_ND @ fitted_ND.T)
    directions_KD = (vectors_NK / values_K.sqrt()).T[:rank] @ fitted_ND
    return (held_ND @ directions_KD.T).square().sum()
