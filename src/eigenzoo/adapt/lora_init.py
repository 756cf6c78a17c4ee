"""Initialise an ordinary LoRA in a zoo's subspace: factors of rank r per layer, for any trainer that supports LoRA.

    factors = lora_factors(space, rank=8)                      # {module: (B, A)}
    put_factors(peft_model, factors)                           # an ordinary LoraConfig(r=8, target_modules=…)

    start="zero"   A: the r leading input directions of the zoo's changes, orthonormal rows; B: zero. The model begins as it is, and
                   learns first where the zoo did. As EVA (Paischer et al. 2024), which takes the directions of activations
    start="mean"   B·A: the zoo's mean change, its best approximation of rank r, balanced (B = U√S, A = √S Vᵀ); where the mean has
                   a lower rank the other rows are leading input directions, and their columns of B zero

Nothing is frozen, and the bundle is not needed later. The result is an ordinary LoRA of the same size.

Legend: N models, O outputs, I inputs, R rank, J number of directions that all models' coefficients span.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eigenzoo.adapt.maps import Map, map_of
from eigenzoo.adapt.trained import MEAN, ZERO
from eigenzoo.errors import MismatchError, UsageError
from eigenzoo.linalg.lora import ROUND_OFF, Factors
from eigenzoo.passes.workers import local_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.subspace.bases.basis import LayerBasis
from eigenzoo.subspace.module_places import PREFIXES
from eigenzoo.subspace.subspace import Subspace


def lora_factors(
    space: Subspace,
    rank: int,
    *,
    start: str = ZERO,
    names: Mapping[str, str] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Factors]:
    """Return (B (O, R), A (R, I)) in float32 by module, without the scale of LoRA.

    Args:
        space: a bundle of LoRA updates (view `update`), of changes (`delta`), or of weights. For weights, changes are relative to
            the zoo's mean, which is then not available as a start.
        rank: R.
        start: `zero` or `mean`.
        names: names of layers in the module; see `attach.attach`.
        progress: called as progress("finding factors", done, total).

    Only linear layers have factors. Convolutions, embeddings and biases are left out. Input directions are those of
    N MᵀM + Σ_n L(c_n)ᵀL(c_n), the second moment of changes whose coefficients are centred. Cost of a layer: min(N, K) products of
    O·I² or, through factors, less; and an eigendecomposition of I³. Raises UsageError for a rank larger than a layer.
    """
    if start not in (ZERO, MEAN) or (start == MEAN and space.view == "weight"):
        raise UsageError(
            f"the start {start!r}",
            where=str(space.path),
            rule=f"choose {ZERO}, or {MEAN} for views update and delta: the mean of whole weights is not a change of a model",
        )
    if space.view == "factors":
        raise UsageError("view 'factors' has no updates", next_step="fit the zoo with view 'update'")
    chosen = {}
    for name, basis in space.layers.items():
        if basis.layer.kind != "update" and (len(basis.layer.tensor_shape) != 2 or not name.endswith(".weight")):
            continue
        if not 1 <= rank <= min(basis.layer.shape):
            raise UsageError(
                f"rank {rank}",
                where=f"layer '{name}'",
                rule=f"its matrix of {list(basis.layer.shape)} has at most that",
            )
        values = space.all_coefficients[name].double()
        chosen[name] = partial(_layer_factors, basis, values, rank, start, has_mean=space.view != "weight")
    with local_workers() as workers:
        factors_by_layer = workers.each("finding factors", lambda name: chosen[name](), chosen, progress, what="layer")
        return {_module((names or {}).get(name, name)): factors for name, factors in factors_by_layer}


def _layer_factors(basis: LayerBasis, values: Tensor, rank: int, start: str, *, has_mean: bool) -> Factors:
    """Read one layer's basis, and return B and A."""
    layer = map_of(basis, torch.float64)
    mean_OI = layer.mean() if has_mean else None
    directions_RI = _leading(layer, values, mean_OI, rank)
    if start == MEAN and mean_OI is not None:
        b_OR, a_RI = _of_mean(mean_OI, directions_RI)
    else:
        b_OR, a_RI = directions_RI.new_zeros(basis.layer.shape[0], rank), directions_RI
    return b_OR.float(), a_RI.float().contiguous()


def put_factors(module: nn.Module, factors: Mapping[str, Factors], adapter: str = "default") -> tuple[str, ...]:
    """Write factors into a PEFT model's LoRA, in place, with B divided by the adapter's scale. Return the changed modules.

    Args:
        module: the result of `get_peft_model`. Its LoRA layers have `lora_A[adapter]`, `lora_B[adapter]` and `scaling[adapter]`.
        factors: factors by module. Those of modules that the adapter does not target are ignored, and the adapter's other modules
            are unchanged.
        adapter: the adapter's name.

    Raises MismatchError for factors of another shape than the adapter's, or if no module takes any. Then nothing has changed.
    """
    changed = []
    written: list[tuple[Tensor, Tensor]] = []
    for path, owner in module.named_modules():
        name = _module(path)
        layer: Any = owner
        if name not in factors or adapter not in getattr(owner, "lora_A", ()):
            continue
        for part, values in (("lora_B", factors[name][0] / layer.scaling[adapter]), ("lora_A", factors[name][1])):
            weight: Tensor = getattr(layer, part)[adapter].weight
            if weight.shape != values.shape:
                raise MismatchError(
                    f"has shape {list(weight.shape)}",
                    where=f"{part} of '{path}'",
                    rule=f"the factors have {list(values.shape)}",
                    next_step="ask for factors of the rank r of the LoraConfig",
                )
            written.append((weight, values))
        changed.append(name)
    if not changed:
        raise MismatchError(
            f"no module has an adapter {adapter!r} and factors",
            rule=f"factors are for {', '.join(list(factors)[:3])}, …",
            next_step="name these as target_modules of the LoraConfig",
        )
    with torch.no_grad():
        for weight, values in written:
            weight.copy_(values)
    return tuple(changed)


def _module(name: str) -> str:
    """Return a module's name without PEFT's prefix and without its weight's name."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name.removesuffix(".weight")


def _leading(layer: Map, values: Tensor, mean_OI: Tensor | None, rank: int) -> Tensor:
    """Return the leading input directions (R, I) of N MᵀM + Σ_n L(c_n)ᵀL(c_n), by J singular vectors of all coefficients."""
    rows = values.flatten(1)
    _, singular_J, right_JK = torch.linalg.svd(rows, full_matrices=False)
    inputs = layer.shape[1]
    moment_II = torch.zeros(inputs, inputs, dtype=torch.float64)
    if mean_OI is not None:
        moment_II += len(rows) * mean_OI.T @ mean_OI
    for size, direction_K in zip(singular_J.tolist(), right_JK, strict=True):
        coefficients = size * direction_K.view(values.shape[1:])
        factors = layer.factors(coefficients, False)
        if factors is None:
            matrix_OI = layer.matrix(coefficients)
            moment_II += matrix_OI.T @ matrix_OI
        else:
            moment_II += factors[1].T @ (factors[0].T @ factors[0]) @ factors[1]
    vectors_II: Tensor = torch.linalg.eigh(moment_II)[1]
    return vectors_II.flip(1).T[:rank].contiguous()


def _of_mean(mean_OI: Tensor, directions_RI: Tensor) -> Factors:
    """Return the balanced factors of the mean at this rank, filled up with directions without an effect if its rank is lower."""
    left_OJ, singular_J, right_JI = torch.linalg.svd(mean_OI, full_matrices=False)
    rank = len(directions_RI)
    used = min(rank, int((singular_J > ROUND_OFF**0.5 * singular_J[0]).sum()))
    roots_J = singular_J[:used].sqrt()
    b_OR = mean_OI.new_zeros(mean_OI.shape[0], rank)
    b_OR[:, :used] = left_OJ[:, :used] * roots_J
    kept_JI = right_JI[:used]
    others = directions_RI - directions_RI @ kept_JI.T @ kept_JI
    # The first directions may lie in the span of the mean's rows, so the leading directions of the remainder are taken.
    rest = torch.linalg.svd(others, full_matrices=False)[2][: rank - used]
    return b_OR, torch.cat([roots_J[:, None] * kept_JI, rest])
