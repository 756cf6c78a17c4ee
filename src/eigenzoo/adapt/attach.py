"""Attach coefficients to any torch module. Its weights become M + Σ c_k V_k, by `torch.nn.utils.parametrize`.

All parameters of the module are frozen except the coefficients and those that `besides` names, such as a head. An optimiser gets
`adapted.parameters()`. The module can still be moved, called, copied and used in any training loop.

A weight is computed in float32 or float64 and rounded once to its dtype, also under autocast. A weight that several submodules
share (an embedding that is also the output layer) stays shared. Several subspaces can be attached to one module if they have no
weight in common. Detach the last one first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eigenzoo.adapt.augment import NONE, Augmentation, padded
from eigenzoo.adapt.maps import AdaptedWeight, map_of
from eigenzoo.adapt.places import adapting, check_free, find_besides, trained_by_others
from eigenzoo.adapt.trained import MEAN, Coefficients, Start, begin, find_start, scales_of, without_autocast
from eigenzoo.errors import MismatchError, UsageError
from eigenzoo.passes.workers import Workers, opened_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.module_places import Place, find_places, sharing, weight_at
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.roles import VARIANCE


@dataclass(frozen=True)
class Adapted:
    """A module with coefficients in place of weights.

    Attributes:
        module: the module given to `attach`, changed in place.
        space: the subspace of the bases.
        start: the coefficients at which training began.
        weights: parametrizations by the names of the bundle's layers.
        places: for each layer the path of its submodule and the parameter's name.
        besides: other trained parameters by their names in the module.
        augmentation: additional random directions; their coefficients follow the zoo's.
        shared: other places with the same weight, by the names of the layers.
        trainable: parameters that `attach` froze or unfroze, and whether they were trainable before.
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
        """Yield the trained parameters."""
        yield from (weight.trained.theta for weight in self.weights.values())
        yield from self.besides.values()

    def coefficients(self) -> dict[str, Tensor]:
        """Return every layer's current coefficients."""
        return {name: weight.trained().detach().cpu() for name, weight in self.weights.items()}

    def numbers(self) -> dict[str, Tensor]:
        """Return what is trained of every layer as it is now: its coefficients, or the factors of low-rank cores."""
        return {name: weight.trained.numbers().detach().cpu() for name, weight in self.weights.items()}

    def set_coefficients(self, values: Mapping[str, Tensor]) -> None:
        """Set every layer's coefficients. Low-rank cores are set to the nearest ones of their rank.

        Raises UsageError for other layers than the module's, and MismatchError for other shapes. Then nothing has changed.
        """
        if set(values) != set(self.weights):
            raise UsageError(
                f"coefficients of the layers {', '.join(sorted(values)[:3]) or '(none)'}",
                rule=f"the module has coefficients in {len(self.weights)} layers, all of which are set",
            )
        _check_shapes(values, {name: tuple(weight.trained().shape) for name, weight in self.weights.items()})
        for name, weight in self.weights.items():
            weight.trained.set(values[name])

    @property
    def num_trained(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())


def attach(
    module: nn.Module,
    space: Subspace,
    *,
    start: str | os.PathLike[str] | Start = MEAN,
    besides: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    prefix: str | None = None,
    random_basis: bool = False,
    seed: int = 0,
    augment: int = 0,
    workers: Workers | None = None,
    progress: Progress = no_progress,
) -> Adapted:
    """Replace a module's weights by a subspace's coefficients, in place.

    Args:
        module: any torch module with the layers of the bundle under the same names (PEFT's prefix apart), or all of them after one
            prefix: a bundle of encoders fits a task model that holds the encoder as `bert`.
        start: see `starts.find_start`; `zero` keeps the module's own weights and trains a change of them.
        besides: name patterns of other parameters to train (`classifier.*`).
        names: parameter names in the module by layer names, where they differ (`integrations.transformers_names.saved_names` for
            models of transformers).
        prefix: the prefix of the module's names (`bert.`). Default: the only prefix that makes all layers names of the module.
        random_basis: as a control, use random directions of the same number and scale, about the same start.
        seed: seed of start `random`, of a random basis, and of additional random directions.
        augment: number of additional random directions of each layer, for small zoos; see `augment`.
        workers: number of threads that read the bases. Default: torch's number of threads.
        progress: called as progress("reading bases", done, total).

    Raises MismatchError for layers that the module does not have in their shape, or has under several prefixes. Raises UsageError
    for a pattern that matches nothing, and for a weight that is already attached or belongs to something else (a parametrization,
    a hook, a layer of PEFT). After an error the module is unchanged. Memory: the bundle's bases, once, on the devices of the
    weights, in float32, or float64 for float64 weights.
    """
    if space.view == "factors":
        raise UsageError(
            "view 'factors' has two layers for one weight",
            next_step="use it with PEFT (EigenzooConfig), or fit the zoo with view 'update'",
        )
    seed = check_seed(seed)
    augmentation = Augmentation(augment, seed) if augment else NONE
    shapes = {name: tuple(basis.layer.tensor_shape) for name, basis in space.layers.items()}
    places = find_places(module, shapes, names or {}, prefix)
    others_trained, owners = trained_by_others(module), dict[int, str]()
    for name, (path, leaf) in places.items():
        check_free(module, path, leaf, others_trained)
        first = owners.setdefault(id(weight_at(module, (path, leaf))), name)
        if first != name:
            raise UsageError(
                f"is the same parameter as layer '{first}'",
                where=f"layer '{name}'",
                rule="a weight that the module shares has the coefficients of one layer",
                next_step="fit the zoo without one of the two (exclude)",
            )
    chosen = find_besides(module, besides, {f"{path}.{leaf}" if path else leaf for path, leaf in places.values()})
    with without_autocast(torch.device("cpu")):
        begun = start if isinstance(start, Start) else find_start(space, start, seed)
        _check_start(begun, {name: augmentation.shape(basis) for name, basis in space.layers.items()}, space)
        generator = torch.Generator().manual_seed(seed) if random_basis else None
        trained_besides = tuple(chosen.values())
        weights = _weights(module, space, places, begun, trained_besides, augmentation, workers, progress, generator)
    shared = {name: sharing(module, place) for name, place in places.items()}
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
            if parameter.requires_grad != wanted and id(parameter) not in others_trained:
                before.append((parameter, parameter.requires_grad))
                undone.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(wanted)
        undone.pop_all()
    return Adapted(module, space, begun, weights, places, chosen, augmentation, shared, tuple(before))


def detach(adapted: Adapted) -> nn.Module:
    """Write the adapted weights into the module, remove the coefficients, and return the module.

    Frozen parameters become trainable again. Raises UsageError if the module is not attached.
    """
    for name, (path, leaf) in adapted.places.items():
        if adapting(adapted.module.get_submodule(path), leaf) is not adapted.weights[name]:
            raise UsageError(
                "is not attached",
                where=f"parameter '{path}.{leaf}'" if path else f"parameter '{leaf}'",
                rule="detach is for what attach returned, once",
            )
    for name, (path, leaf) in adapted.places.items():
        parametrize.remove_parametrizations(adapted.module.get_submodule(path), leaf, leave_parametrized=True)
        for other, its_leaf in adapted.shared.get(name, ()):  # the same parameter, which already has the new values
            _unregister(adapted.module.get_submodule(other), its_leaf)
    return _trainable_again(adapted)


def undo(adapted: Adapted) -> nn.Module:
    """Remove coefficients, restore the original weights, and return the module."""
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
    """Read all bases and make every layer's weight, with random directions if a generator is given."""
    on_top = not begun.mean or space.view in ("delta", "update")
    weights = dict[str, AdaptedWeight]()
    dtypes = {
        name: torch.promote_types(weight_at(module, place).dtype, torch.float32) for name, place in places.items()
    }
    with opened_workers(workers) as running:
        jobs = ((name, [partial(map_of, space.layers[name], dtypes[name])]) for name in places)
        for name, (layer,) in running.in_order(jobs):
            basis, rows = space.layers[name], space.all_coefficients[name]
            shape = augmentation.shape(basis)
            values = padded(begun.values.get(name, torch.zeros_like(rows[0])).float(), shape)
            # Random sides have the mean beside them.
            form, zoo = (augmentation.form(basis, mean=mean) for mean in (begun.mean and generator is None, True))
            if form is not None and zoo is not None:
                values, scales = begin(values, padded(rows, (len(rows), *shape)), form, zoo)
            else:
                scales = scales_of(rows)
                scales = padded(scales, shape, float(scales.min()) if scales.numel() else 1.0)
            trained = Coefficients(values, scales, form)
            if generator is not None:
                layer.randomize(generator)
            augmentation.widen(layer, name)
            above_zero = VARIANCE.search(name) is not None
            weight = AdaptedWeight(layer, trained, besides, mean=begun.mean, on_top=on_top, above_zero=above_zero)
            weights[name] = weight.to(weight_at(module, places[name]).device)
            progress("reading bases", len(weights), len(places))
    return weights


def _check_start(begun: Start, shapes: Mapping[str, tuple[int, ...]], space: Subspace) -> None:
    """Raise unless a start has layers of the subspace in the shapes of their coefficients, with or without random directions."""
    unknown = sorted(set(begun.values) - set(shapes))
    if unknown:
        raise UsageError(
            f"a start for {unknown[0]!r}, which is not a layer of the subspace",
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
