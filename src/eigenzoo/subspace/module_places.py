"""Find a bundle's layers in a torch module: the place of each layer's weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain

from torch import Tensor, nn

from eigenzoo.errors import MismatchError
from eigenzoo.weights.renames import Accepts, Rename, find_prefixes, nearest

PREFIXES = ("base_model.model.",)
"""PEFT's prefix of module names."""

Place = tuple[str, str]
"""The path of a submodule, and the name of its parameter."""


def weight_at(module: nn.Module, place: Place) -> Tensor:
    """Return the parameter or buffer at a place, after its parametrizations."""
    weight: Tensor = getattr(module.get_submodule(place[0]), place[1])
    return weight


Fits = Callable[[tuple[int, ...], tuple[int, ...]], bool]
"""Tells whether a parameter's shape can be that of a layer."""


def same(shape: tuple[int, ...], layer: tuple[int, ...]) -> bool:
    """Accept a parameter of exactly the layer's shape."""
    return shape == layer


def find_places(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    prefix: str | None,
    fits: Fits = same,
) -> dict[str, Place]:
    """Return the place of each layer's weight.

    If the module does not have all layers under their own names, the one prefix that makes all of them names of the module is
    added or removed.

    Args:
        shapes: the layers' shapes by name.
        names: parameter names in the module by layer names, where they differ.
        prefix: the prefix of the module's names, if the user gave it.
        fits: tells whether a parameter's shape can be a layer's.

    Raises MismatchError if the module does not have a layer in its shape, and if several prefixes fit.
    """
    places = _places_after(Rename(new=prefix or ""), module, shapes, names, fits)
    absent = [layer for layer in shapes if layer not in places]
    if not absent:
        return places
    known = _known_shapes(module, names)
    change = one_prefix(absent, known, lambda layer, name: fits(known[name], shapes[layer]), prefix, "module")
    return _places_after(change, module, shapes, names, fits)


def one_prefix(
    absent: Sequence[str], known: Collection[str], accepts: Accepts, prefix: str | None, holder: str
) -> Rename:
    """Return the one prefix, to add or to remove, that makes all absent layers names of the module.

    Args:
        absent: layers that the module does not have under their own names.
        known: the names of the module.
        accepts: tells whether a layer and a name of the module can be the same weight.
        prefix: the prefix that the user gave; no other prefix is tried then.
        holder: the word for the module in the error.

    Raises MismatchError, which names both sides and the option, if no prefix fits or several do.
    """
    changes = [] if prefix is not None else find_prefixes(absent, known, accepts)
    if len(changes) == 1:
        return changes[0]
    what = f"{len(absent)} of the bundle's layers are not in the {holder}: {', '.join(absent[:3])}"
    if changes:
        first, second = (str(change) for change in changes[:2])
        raise MismatchError(
            what,
            rule=f"with {first} they are there, and with {second} too",
            next_step=f"choose one with prefix=, such as prefix={changes[0].new!r} (--prefix {changes[0].new})",
        )
    if prefix is not None:
        what = f"{what}, with {prefix!r} before each name"
    nearly = [] if prefix is not None else find_prefixes(absent[:1], known, lambda layer, name: True)
    wrong = next((name for change in nearly[:1] for name in absent if change(name) not in known), absent[0])
    near = nearest(wrong, known)
    raise MismatchError(
        what,
        rule="the layers must all be there in their shapes, under their own names or all with one prefix"
        + (f". With {nearly[0]}, {nearly[0](wrong)!r} is missing or has another shape" if nearly else "")
        + (f". The nearest name to {wrong!r} is {near!r}" if near else ""),
        next_step=f"load a {holder} of the zoo's architecture, or give the prefix of its names with prefix= (--prefix)"
        + (
            ", or its names for the layers with names="
            if holder == "module"
            else ", or name the layers in exclude_modules"
        ),
    )


def _places_after(
    change: Rename, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str], fits: Fits
) -> dict[str, Place]:
    """Return the places of the layers that the module has under the changed names."""
    places = {layer: _find_place(module, _called(change(layer), names), shape, fits) for layer, shape in shapes.items()}
    return {layer: place for layer, place in places.items() if place is not None}


def _called(layer: str, names: Mapping[str, str]) -> str:
    return names.get(layer) or names.get(f"{layer}.weight", layer)


def _known_shapes(module: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer, by each name that a layer can have for it."""
    tensors = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    shapes = {name: tuple(values.shape) for name, values in tensors}
    shapes |= {saved: shapes[name] for saved, name in names.items() if name in shapes}
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items()} | shapes


def _find_place(module: nn.Module, layer: str, shape: tuple[int, ...], fits: Fits) -> Place | None:
    """Return the place of a layer, or None if the module does not have it. Raises MismatchError for another shape."""
    names = [layer, *(layer.removeprefix(prefix) for prefix in PREFIXES)]
    for name in dict.fromkeys([*names, *(f"{name}.weight" for name in names)]):
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        weight = getattr(owner, leaf, None)
        if isinstance(weight, Tensor):
            if not fits(tuple(weight.shape), shape):
                raise MismatchError(
                    f"has shape {list(weight.shape)}",
                    where=f"parameter '{name}'",
                    rule=f"the bundle's layer has {list(shape)}",
                )
            return path, leaf
    return None


def sharing(module: nn.Module, place: Place) -> tuple[Place, ...]:
    """Return the other places of a module with the same parameter object."""
    weight = weight_at(module, place)
    places = [
        (path, leaf)
        for path, part in module.named_modules()
        for leaf, parameter in part._parameters.items()
        if parameter is weight
    ]
    owner = module.get_submodule(place[0])
    return tuple((path, leaf) for path, leaf in places if module.get_submodule(path) is not owner or leaf != place[1])
