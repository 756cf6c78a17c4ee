"""Coefficients on any torch module: its weights become M + Σ c_k V_k, by `torch.nn.utils.parametrize`.

Every parameter of the module is frozen but the coefficients' own (and those that are asked for besides, a head say): an optimiser
gets `adapted.parameters()`. The module stays what it is: it can be moved, called, copied and put into any training loop.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eigenzoo.adapt.augment import NONE, Augmentation, padded
from eigenzoo.adapt.maps import Map, map_of
from eigenzoo.adapt.starts import MEAN, find_start
from eigenzoo.adapt.trained import Coefficients, Start, scales_of
from eigenzoo.errors import MismatchError, UsageError
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.subspace import Subspace

PREFIXES = ("base_model.model.",)
"""What PEFT puts before the names of modules."""


class AdaptedWeight(nn.Module):
    """The parametrization of one weight: W = (W₀ or nothing) + (M or nothing) + L(c)."""

    def __init__(self, layer: Map, trained: Coefficients, *, mean: bool, on_top: bool) -> None:
        super().__init__()
        self.layer, self.trained, self._mean, self._on_top = layer, trained, mean, on_top

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the module computes with."""
        matrix = self.layer.matrix(self.trained())
        if self._mean:
            matrix = matrix + self.layer.mean()
        shaped = matrix.reshape(weight.shape).to(weight.dtype)
        return weight + shaped if self._on_top else shaped


@dataclass(frozen=True)
class Adapted:
    """A module with coefficients in place of weights.

    Attributes:
        module: the module that `attach` was given, changed in place.
        space: where the bases came from.
        start: where training began.
        weights: by the names of the bundle's layers.
        places: of each of them the submodule, by its path, and the parameter there.
        besides: other parameters that are trained, by their names in the module.
        augmentation: random directions beside the zoo's; their coefficients come after its own.
    """

    module: nn.Module
    space: Subspace
    start: Start
    weights: Mapping[str, AdaptedWeight]
    places: Mapping[str, tuple[str, str]]
    besides: Mapping[str, nn.Parameter]
    augmentation: Augmentation = NONE

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained."""
        yield from (weight.trained.theta for weight in self.weights.values())
        yield from self.besides.values()

    def coefficients(self) -> dict[str, Tensor]:
        """Return every layer's coefficients as they are now."""
        return {name: weight.trained().detach().cpu() for name, weight in self.weights.items()}

    def set_coefficients(self, values: Mapping[str, Tensor]) -> None:
        """Put every layer's coefficients where they are given."""
        for name, weight in self.weights.items():
            weight.trained.set(values[name])

    @property
    def num_trained(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())


def attach(
    module: nn.Module,
    space: Subspace,
    *,
    start: str | os.PathLike[str] | Start = MEAN,
    besides: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    random_basis: bool = False,
    seed: int = 0,
    augment: int = 0,
) -> Adapted:
    """Put a subspace's coefficients in the place of a module's weights, in place.

    Args:
        module: any torch module with the layers of the bundle under the same names (PEFT's prefix apart).
        start: see `starts.find_start`; `zero` keeps the module's own weights and trains a change of them.
        besides: patterns of the names of parameters that are trained too (`classifier.*`).
        names: of layers that the module calls otherwise than the zoo's files, the parameter's name in the module
            (`integrations.transformers_names.saved_names` for models of transformers).
        random_basis: the control: random directions of the same number and scale in the place of the zoo's, about the same start.
        seed: of start `random`, of a random basis, and of random directions besides.
        augment: so many random directions of each layer besides the zoo's, which a small zoo may lack; see `augment`.

    Raises MismatchError for layers that the module does not have in their shape, and UsageError for a pattern that nothing
    matches, or a module that is adapted already. Memory: the bundle's bases, once, on the devices of the weights.
    """
    if space.view == "factors":
        raise UsageError(
            "view 'factors' has two layers for one weight",
            next_step="use it with PEFT (EigenzooConfig), or fit the zoo with view 'update'",
        )
    seed = check_seed(seed)
    augmentation = Augmentation(augment, seed) if augment else NONE
    begun = start if isinstance(start, Start) else find_start(space, start, seed)
    places = {
        name: _find(module, (names or {}).get(name, name), tuple(basis.layer.tensor_shape))
        for name, basis in space.layers.items()
    }
    chosen = _besides(module, besides, {f"{path}.{leaf}" if path else leaf for path, leaf in places.values()})
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    weights, generator = dict[str, AdaptedWeight](), torch.Generator().manual_seed(seed)
    for name, (path, leaf) in places.items():
        owner = module.get_submodule(path)
        weight = getattr(owner, leaf)
        values = space.all_coefficients[name][0]
        shape, scales = augmentation.shape(space.layers[name]), scales_of(space.all_coefficients[name])
        smallest = float(scales.min()) if scales.numel() else 1.0
        trained = Coefficients(
            padded(begun.values.get(name, torch.zeros_like(values)).float(), shape), padded(scales, shape, smallest)
        )
        on_top = not begun.mean or space.view in ("delta", "update")
        layer = map_of(space.layers[name])
        if random_basis:
            layer.randomize(generator)
        augmentation.widen(layer, name)
        adapted = AdaptedWeight(layer, trained, mean=begun.mean, on_top=on_top).to(weight.device)
        parametrize.register_parametrization(owner, leaf, adapted, unsafe=True)
        weights[name] = adapted
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return Adapted(module, space, begun, weights, places, chosen, augmentation)


def detach(adapted: Adapted) -> nn.Module:
    """Write the weights that the coefficients make into the module, and remove them; returns the module, all of it trainable."""
    for path, leaf in adapted.places.values():
        parametrize.remove_parametrizations(adapted.module.get_submodule(path), leaf, leave_parametrized=True)
    return adapted.module.requires_grad_(True)


def _find(module: nn.Module, layer: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """Return the submodule that owns a layer's weight, and the name of the parameter there."""
    names = [layer, *(layer.removeprefix(prefix) for prefix in PREFIXES)]
    for name in dict.fromkeys([*names, *(f"{name}.weight" for name in names)]):
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        weight = getattr(owner, leaf, None)
        if isinstance(weight, Tensor):
            if tuple(weight.shape) != shape:
                raise MismatchError(
                    f"has shape {list(weight.shape)}",
                    where=f"parameter '{name}'",
                    rule=f"the bundle's layer has {list(shape)}",
                )
            return path, leaf
    raise MismatchError(
        "is not in the module",
        where=f"layer '{layer}'",
        rule="a module has all layers of the bundle, under their names",
        next_step="say with names= what the module calls them",
    )


def _besides(module: nn.Module, patterns: Sequence[str], layers: set[str]) -> dict[str, nn.Parameter]:
    free = {name: parameter for name, parameter in module.named_parameters() if name not in layers}
    chosen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        matched = fnmatch.filter(free, pattern)
        if not matched:
            raise UsageError(
                f"no parameter besides the bundle's layers matches {pattern!r}", next_step="see named_parameters()"
            )
        chosen |= {name: free[name] for name in matched}
    return chosen
