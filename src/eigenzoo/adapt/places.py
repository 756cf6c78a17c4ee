"""Check that coefficients can replace a module's weights, and find the other parameters that are trained with them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from eigenzoo.adapt.maps import AdaptedWeight
from eigenzoo.errors import UsageError


def adapting(owner: nn.Module, leaf: str) -> AdaptedWeight | None:
    """Return the parametrization of `attach` on a parameter, if there is one."""
    if not parametrize.is_parametrized(owner, leaf):
        return None
    parametrizations = owner.parametrizations[leaf]  # type: ignore[index]
    return next((part for part in parametrizations if isinstance(part, AdaptedWeight)), None)


def check_free(module: nn.Module, path: str, leaf: str, others_trained: set[int]) -> None:
    """Raise UsageError unless a weight is a plain parameter or buffer that no other hook or parametrization changes."""
    owner, where = module.get_submodule(path), f"parameter '{path}.{leaf}'" if path else f"parameter '{leaf}'"
    if adapting(owner, leaf) is not None:
        raise UsageError(
            "is attached already",
            where=where,
            rule="a weight has the coefficients of one subspace",
            next_step="remove them with eigenzoo.adapt.detach(adapted), adapted being what the first attach returned",
        )
    parent = module.get_submodule(path.rpartition(".")[0]) if path else owner
    # Layers of PEFT have the wrapped layer as `base_layer`.
    around = parent if path and getattr(parent, "base_layer", None) is owner else owner
    is_plain = leaf in owner._parameters or leaf in owner._buffers
    if not is_plain or around is not owner:
        raise UsageError(
            f"is held by a {type(around).__name__}",
            where=where,
            rule="coefficients take the place of a plain parameter",
            next_step="take off what holds it first: torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm or prune.remove, or PEFT's merge_and_unload()",
        )
    if id(getattr(owner, leaf)) in others_trained:
        raise UsageError(
            "is trained by another attach (besides)",
            where=where,
            rule="attaches to one module have no weight in common",
            next_step="detach that one first, or leave the parameter out of its besides",
        )


def trained_by_others(module: nn.Module) -> set[int]:
    """Return the ids of the parameters of a module that other attached subspaces train."""
    others = [part for part in module.modules() if isinstance(part, AdaptedWeight)]
    return {id(parameter) for part in others for parameter in (part.trained.theta, *part.besides)}


def find_besides(module: nn.Module, patterns: Sequence[str], layers: set[str]) -> dict[str, nn.Parameter]:
    """Return by name the other parameters that match patterns. Raises UsageError for a pattern that matches none."""
    coefficients = {id(part.trained.theta) for part in module.modules() if isinstance(part, AdaptedWeight)}
    free = {
        name: parameter
        for name, parameter in module.named_parameters()
        if name not in layers and id(parameter) not in coefficients
    }
    chosen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        matched = fnmatch.filter(free, pattern)
        if not matched:
            raise UsageError(
                f"no parameter besides the bundle's layers matches {pattern!r}", next_step="see named_parameters()"
            )
        chosen |= {name: free[name] for name in matched}
    return chosen
