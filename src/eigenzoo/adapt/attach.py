"""Coefficients on any torch module: its weights become M + Σ c_k V_k, by `torch.nn.utils.parametrize`.

Every parameter of the module is frozen but the coefficients' own (and those that are asked for besides, a head say): an optimiser
gets `adapted.parameters()`. The module stays what it is: it can be moved, called, copied and put into any training loop.

A weight is made in float32 at least and rounded once to the dtype that it has, also under autocast. A weight that several parts of
a module share (an embedding that is the output layer too) stays shared. Several subspaces can be attached to one module where they
have no weight in common; `detach` the last one first.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eigenzoo.adapt.augment import NONE, Augmentation, padded
from eigenzoo.adapt.maps import Map, map_of
from eigenzoo.adapt.starts import MEAN, find_start
from eigenzoo.adapt.trained import Coefficients, Start, scales_of, without_autocast
from eigenzoo.errors import MismatchError, UsageError
from eigenzoo.passes.workers import Workers, opened_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.roles import VARIANCE

PREFIXES = ("base_model.model.",)
"""What PEFT puts before the names of modules."""

Place = tuple[str, str]
"""A submodule by its path, and the name of a parameter there."""


class AdaptedWeight(nn.Module):
    """The parametrization of one weight: W = (W₀ or nothing) + (M or nothing) + L(c).

    A running variance is kept above zero, as in rebuilt models. Buffers, which a batch norm has its statistics in, follow their
    coefficients, but give them no gradient: torch knows none.

    Attributes:
        layer, trained: the map L, and c.
        besides: what the same attach trains besides, which no other attach may freeze.
    """

    def __init__(
        self,
        layer: Map,
        trained: Coefficients,
        besides: tuple[nn.Parameter, ...],
        *,
        mean: bool,
        on_top: bool,
        above_zero: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.trained, self.besides, self._mean, self._on_top = layer, trained, besides, mean, on_top
        self._above_zero = above_zero

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the module computes with, in the dtype of the one that is there."""
        with without_autocast(weight.device):
            matrix = self.layer.matrix(self.trained().to(self.layer.dtype))
            if self._mean:
                matrix = matrix + self.layer.mean()
        made = matrix.reshape(weight.shape)
        made = weight + made if self._on_top else made
        if self._above_zero:
            made = made.clamp_min(torch.finfo(torch.float32).tiny)
        return (made if isinstance(weight, nn.Parameter) else made.detach()).to(weight.dtype)


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
        shared: other places of the module that have the same weight, by the names of the layers.
        trainable: which of the module's parameters `attach` froze or unfroze, and whether they were trainable before.
    """

    module: nn.Module
    space: Subspace
    start: Start
    weights: Mapping[str, AdaptedWeight]
    places: Mapping[str, Place]
    besides: Mapping[str, nn.Parameter]
    augmentation: Augmentation = NONE
    shared: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)
    trainable: tuple[tuple[nn.Parameter, bool], ...] = ()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained."""
        yield from (weight.trained.theta for weight in self.weights.values())
        yield from self.besides.values()

    def coefficients(self) -> dict[str, Tensor]:
        """Return every layer's coefficients as they are now."""
        return {name: weight.trained().detach().cpu() for name, weight in self.weights.items()}

    def set_coefficients(self, values: Mapping[str, Tensor]) -> None:
        """Put every layer's coefficients where they are given.

        Raises UsageError for other layers than the module's, and MismatchError for other shapes; nothing has changed then.
        """
        if set(values) != set(self.weights):
            raise UsageError(
                f"coefficients of the layers {', '.join(sorted(values)[:3]) or '(none)'}",
                rule=f"the module has coefficients in {len(self.weights)} layers, all of which are set",
            )
        _check_shapes(values, {name: tuple(weight.trained.start.shape) for name, weight in self.weights.items()})
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
    workers: Workers | None = None,
    progress: Progress = no_progress,
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
        workers: threads that read the bases; by default as many as torch has.
        progress: called as progress("reading bases", done, total).

    Raises MismatchError for layers that the module does not have in their shape, and UsageError for a pattern that nothing
    matches, and for a weight that is attached already or held by something else (a parametrization, a hook, a layer of PEFT).
    Whatever it raises, the module is as it was. Memory: the bundle's bases, once, on the devices of the weights, in float32 (for
    weights in float64, in that).
    """
    if space.view == "factors":
        raise UsageError(
            "view 'factors' has two layers for one weight",
            next_step="use it with PEFT (EigenzooConfig), or fit the zoo with view 'update'",
        )
    augmentation = Augmentation(augment, seed) if augment else NONE
    places = {
        name: _find(module, (names or {}).get(name, name), tuple(basis.layer.tensor_shape))
        for name, basis in space.layers.items()
    }
    kept = _kept_trainable(module)
    for path, leaf in places.values():
        _check_free(module, path, leaf, kept)
    chosen = _besides(module, besides, {f"{path}.{leaf}" if path else leaf for path, leaf in places.values()})
    with without_autocast(torch.device("cpu")):
        begun = start if isinstance(start, Start) else find_start(space, start, seed)
        _check_start(begun, {name: augmentation.shape(basis) for name, basis in space.layers.items()}, space)
        generator = torch.Generator().manual_seed(seed) if random_basis else None
        trained_besides = tuple(chosen.values())
        weights = _weights(module, space, places, begun, trained_besides, augmentation, workers, progress, generator)
    shared = {name: _others(module, place) for name, place in places.items()}
    with ExitStack() as undone:
        for name, weight in weights.items():
            for path, leaf in (places[name], *shared[name]):
                owner = module.get_submodule(path)
                parametrize.register_parametrization(owner, leaf, weight, unsafe=True)
                undone.callback(_unregister, owner, leaf)
        trained = {
            id(parameter) for weight in weights.values() for parameter in (weight.trained.theta, *weight.besides)
        }
        before = []
        for parameter in module.parameters():
            wanted = id(parameter) in trained
            if parameter.requires_grad != wanted and id(parameter) not in kept:
                before.append((parameter, parameter.requires_grad))
                undone.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(wanted)
        undone.pop_all()
    return Adapted(module, space, begun, weights, places, chosen, augmentation, shared, tuple(before))


def detach(adapted: Adapted) -> nn.Module:
    """Write the weights that the coefficients make into the module, and remove them; returns the module.

    What `attach` froze can be trained again. Raises UsageError where the module is not attached (any more).
    """
    for name, (path, leaf) in adapted.places.items():
        if _adapting(adapted.module.get_submodule(path), leaf) is not adapted.weights[name]:
            raise UsageError(
                "is not attached",
                where=f"parameter '{path}.{leaf}'" if path else f"parameter '{leaf}'",
                rule="detach is for what attach returned, once",
            )
    for name, (path, leaf) in adapted.places.items():
        parametrize.remove_parametrizations(adapted.module.get_submodule(path), leaf, leave_parametrized=True)
        for other, its_leaf in adapted.shared.get(name, ()):  # the same parameter, which holds the new values already
            _unregister(adapted.module.get_submodule(other), its_leaf)
    return _trainable_again(adapted)


def undo(adapted: Adapted) -> nn.Module:
    """Remove coefficients, and leave the weights that were there before; returns the module."""
    for name, place in adapted.places.items():
        for path, leaf in (place, *adapted.shared.get(name, ())):
            _unregister(adapted.module.get_submodule(path), leaf)
    return _trainable_again(adapted)


def _trainable_again(adapted: Adapted) -> nn.Module:
    for parameter, trainable in adapted.trainable:
        parameter.requires_grad_(trainable)
    return adapted.module


def _unregister(owner: nn.Module, leaf: str) -> None:
    parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)


def _weights(
    module: nn.Module,
    space: Subspace,
    places: Mapping[str, Place],
    begun: Start,
    besides: tuple[nn.Parameter, ...],
    augmentation: Augmentation,
    workers: Workers | None,
    progress: Progress,
    generator: torch.Generator | None,
) -> dict[str, AdaptedWeight]:
    """Read all bases, and make every layer's weight; with a generator, of random directions."""
    on_top = not begun.mean or space.view in ("delta", "update")
    weights = dict[str, AdaptedWeight]()
    dtypes = {name: torch.promote_types(_weight(module, place).dtype, torch.float32) for name, place in places.items()}
    with opened_workers(workers) as running:
        jobs = ((name, [partial(map_of, space.layers[name], dtypes[name])]) for name in places)
        for name, (layer,) in running.in_order(jobs):
            values = space.all_coefficients[name][0]
            shape, scales = augmentation.shape(space.layers[name]), scales_of(space.all_coefficients[name])
            smallest = float(scales.min()) if scales.numel() else 1.0
            trained = Coefficients(
                padded(begun.values.get(name, torch.zeros_like(values)).float(), shape), padded(scales, shape, smallest)
            )
            if generator is not None:
                layer.randomize(generator)
            augmentation.widen(layer, name)
            above_zero = VARIANCE.search(name) is not None
            weight = AdaptedWeight(layer, trained, besides, mean=begun.mean, on_top=on_top, above_zero=above_zero)
            weights[name] = weight.to(_weight(module, places[name]).device)
            progress("reading bases", len(weights), len(places))
    return weights


def _check_start(begun: Start, shapes: Mapping[str, tuple[int, ...]], space: Subspace) -> None:
    """Raise unless a start names layers of the subspace, in the shapes of their coefficients, with random directions or without."""
    unknown = sorted(set(begun.values) - set(shapes))
    if unknown:
        raise UsageError(
            f"a start for {unknown[0]!r}, which is no layer of the subspace",
            where=str(space.path),
            next_step="see layers",
        )
    plain = {name: space.layers[name].coefficient_shape for name in begun.values}
    _check_shapes(
        begun.values,
        {name: shapes[name] if values.shape == shapes[name] else plain[name] for name, values in begun.values.items()},
    )


def _check_shapes(values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, found in values.items():
        if tuple(found.shape) != tuple(shapes[name]):
            raise MismatchError(
                f"coefficients of shape {list(found.shape)}",
                where=f"layer '{name}'",
                rule=f"its coefficients have {list(shapes[name])}",
            )


def _weight(module: nn.Module, place: Place) -> Tensor:
    weight: Tensor = getattr(module.get_submodule(place[0]), place[1])
    return weight


def _find(module: nn.Module, layer: str, shape: tuple[int, ...]) -> Place:
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


def _adapting(owner: nn.Module, leaf: str) -> AdaptedWeight | None:
    """Return what `attach` has put on a parameter."""
    if not parametrize.is_parametrized(owner, leaf):
        return None
    found = owner.parametrizations[leaf]  # type: ignore[index]
    return next((part for part in found if isinstance(part, AdaptedWeight)), None)


def _check_free(module: nn.Module, path: str, leaf: str, kept: set[int]) -> None:
    """Raise UsageError unless a weight is a plain parameter (or buffer) of a module that nothing else has its hands on."""
    owner, where = module.get_submodule(path), f"parameter '{path}.{leaf}'" if path else f"parameter '{leaf}'"
    if _adapting(owner, leaf) is not None:
        raise UsageError(
            "is attached already",
            where=where,
            rule="a weight has the coefficients of one subspace",
            next_step="remove them with eigenzoo.adapt.detach(adapted), adapted being what the first attach returned",
        )
    parent = module.get_submodule(path.rpartition(".")[0]) if path else owner
    # Layers of PEFT have the one that they are put around as `base_layer`.
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
    if id(getattr(owner, leaf)) in kept:
        raise UsageError(
            "is trained by another attach (besides)",
            where=where,
            rule="attaches to one module have no weight in common",
            next_step="detach that one first, or leave the parameter out of its besides",
        )


def _kept_trainable(module: nn.Module) -> set[int]:
    """What other attaches train in a module, by its ids."""
    others = [part for part in module.modules() if isinstance(part, AdaptedWeight)]
    return {id(parameter) for part in others for parameter in (part.trained.theta, *part.besides)}


def _others(module: nn.Module, place: Place) -> tuple[Place, ...]:
    """Return the other places of a module that have the very same parameter."""
    weight = _weight(module, place)
    found = [
        (path, leaf)
        for path, part in module.named_modules()
        for leaf, parameter in part._parameters.items()
        if parameter is weight
    ]
    owner = module.get_submodule(place[0])
    return tuple((path, leaf) for path, leaf in found if module.get_submodule(path) is not owner or leaf != place[1])


def _besides(module: nn.Module, patterns: Sequence[str], layers: set[str]) -> dict[str, nn.Parameter]:
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
