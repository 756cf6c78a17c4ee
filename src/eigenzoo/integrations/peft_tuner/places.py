"""Find the module of a model for each layer of a bundle.

Bundles of adapters name modules, like PEFT. Bundles of checkpoints name parameters in files, which transformers 5 may rename in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn
from transformers import PreTrainedModel

from eigenzoo.errors import BundleError, MismatchError, UnsupportedError
from eigenzoo.integrations.peft_tuner.layer import CONV1D, EMBEDDING, PARTS, base_of, kind_of, shape_of
from eigenzoo.integrations.transformers_names import saved_names
from eigenzoo.subspace.module_places import PREFIXES, one_prefix
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.renames import Rename

FACTORS = "factors"
UPDATES = ("update", FACTORS)
"""Views of adapters. Their matrices are (outputs, inputs) even if a weight is transposed."""


@dataclass(frozen=True)
class Place:
    """A module and its layers in the bundle.

    Attributes:
        kind: see `layer.kind_of`.
        name: the bundle's layer; for view `factors` without the factor's name.
        parts: the bundle's layers by the names of PARTS.
    """

    kind: str
    name: str
    parts: Mapping[str, str]

    def transposed(self, view: str) -> bool:
        """Whether the bundle's matrix is (inputs, outputs)."""
        return view not in UPDATES and self.kind in (CONV1D, EMBEDDING)


def parts_of(space: Subspace) -> dict[str, dict[str, str]]:
    """Return the bundle's layers that can belong to one module, as parts, by their common name.

    Raises BundleError for one factor without the other.
    """
    if space.view != FACTORS:
        return {name: {"eigenzoo_update": name} for name in space.layers}
    found: dict[str, dict[str, str]] = {}
    for part, suffix in list(PARTS.items())[1:]:
        for name in space.layers:
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix), {})[part] = name
    for name, parts in found.items():
        if len(parts) < 2:
            raise BundleError(
                "the bundle has only one of the two factors", where=f"layer '{name}'", rule="view 'factors' needs both"
            )
    return found


def find_places(
    space: Subspace, model: nn.Module, known: Mapping[str, str], wanted: Callable[[str], bool], prefix: str | None
) -> tuple[dict[str, Place], list[str]]:
    """Return the places by the modules' names, and the bundle's layers that are not weights of a layer with a kind.

    Args:
        known: modules by the names of layers, from other adapters of the model.
        wanted: function that tells whether the module of a name is adapted.
        prefix: the prefix of the model's names. Default: none, or else the only prefix that makes all layers names of the model.

    Raises MismatchError for layers that the model does not have, or not in their shape; UnsupportedError for tied weights.
    """
    renamed, change = _Renamed(model), Rename(new=prefix or "")
    places, left_out, missing = _places(space, model, known, wanted, renamed, change)
    if missing:
        shapes = _known_shapes(model, renamed)
        change = one_prefix(missing, shapes, lambda layer, name: _may_be(space, layer, shapes[name]), prefix, "model")
        places, left_out, _ = _places(space, model, known, wanted, renamed, change)
    return places, left_out


def _places(
    space: Subspace,
    model: nn.Module,
    known: Mapping[str, str],
    wanted: Callable[[str], bool],
    renamed: _Renamed,
    change: Rename,
) -> tuple[dict[str, Place], list[str], list[str]]:
    """Return what `find_places` does with one change of the layers' names, and the layers that are not in the model."""
    places: dict[str, Place] = {}
    missing: list[str] = []
    left_out: list[str] = []
    for name, parts in parts_of(space).items():
        module_name = known.get(name) or _module_name(model, change(name), space.view, renamed)
        if not wanted(module_name or _short(change(name))):
            continue
        if module_name is None:
            (left_out if _parameter(model, change(name), renamed) is not None else missing).append(name)
            continue
        base = base_of(model.get_submodule(module_name))
        kind = kind_of(base)
        if kind is None:
            if space.view in UPDATES:
                raise UnsupportedError(
                    f"modules of type {type(base).__name__} are not supported", where=f"layer '{name}'"
                )
            left_out.append(name)
            continue
        places[module_name] = Place(kind, name, parts)
        _check_shapes(space, places[module_name], base)
        if space.view not in UPDATES:
            _check_untied(model, module_name, base)
    return places, left_out, missing


def _known_shapes(model: nn.Module, renamed: _Renamed) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by each name that a layer may have for it, whatever adapters are around it."""
    shapes = {}
    for path, module in model.named_modules():
        for leaf, values in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            name = f"{path}.{leaf}".replace(".base_layer.", ".")
            shapes[name] = shape_of(module) if leaf == "weight" and kind_of(module) is not None else tuple(values.shape)
    for saved, name in renamed.names.items():
        if name in shapes:
            shapes[saved] = shapes[name]
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items()} | shapes


def _may_be(space: Subspace, name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a layer may have a weight of this shape, whichever way it lies; `_check_shapes` is exact."""
    if space.view == FACTORS:
        return shape == (
            space.layers[f"{name}{PARTS['eigenzoo_b']}"].layer.shape[0],
            space.layers[f"{name}{PARTS['eigenzoo_a']}"].layer.shape[1],
        )
    layer = space.layers[name].layer
    return shape in (layer.shape, layer.shape[::-1], tuple(layer.tensor_shape))


class _Renamed:
    """Names of parameters in memory by those in files, computed when a name is not found."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[str, str] | None = None

    @property
    def names(self) -> Mapping[str, str]:
        """All of them."""
        if self._names is None:
            names = saved_names(self._model) if isinstance(self._model, PreTrainedModel) else {}
            self._names = {saved.replace(".base_layer.", "."): name for saved, name in names.items()}
        return self._names

    def __call__(self, name: str) -> str | None:
        return self.names.get(name)


def _short(name: str) -> str:
    """Return the name of the module that a layer would belong to."""
    return list(_candidates(name))[-1].removesuffix(".weight")


def _candidates(name: str) -> Iterable[str]:
    return dict.fromkeys([name, *(name.removeprefix(prefix) for prefix in PREFIXES)])


def _module_name(model: nn.Module, name: str, view: str, renamed: _Renamed) -> str | None:
    """Find the module with a layer as its weight."""
    weights = [name if view not in UPDATES else f"{name}.weight" for name in _candidates(name)]
    # Names in files come last: they need the model's state dict, which changes some quantised layers.
    for weight in chain(weights, (found for weight in weights if (found := renamed(weight)) is not None)):
        module_name = weight.removesuffix(".weight")
        if module_name != weight and module_name and _has(model, module_name):
            return module_name
    return None


def _has(model: nn.Module, module_name: str) -> bool:
    try:
        return model.get_submodule(module_name) is not None
    except AttributeError:
        return False


def _parameter(model: nn.Module, name: str, renamed: _Renamed) -> Tensor | None:
    """Find a parameter or buffer that is not a module's weight, also in a layer wrapped by an adapter."""
    for found in chain(_candidates(name), filter(None, map(renamed, [name]))):
        path, _, leaf = found.rpartition(".")
        if _has(model, path):
            values = getattr(base_of(model.get_submodule(path)), leaf, None)
            if isinstance(values, Tensor):
                return values
    return None


def _check_shapes(space: Subspace, place: Place, base: nn.Module) -> None:
    outputs, inputs = shape_of(base)
    shapes = {part: space.layers[layer].layer.shape for part, layer in place.parts.items()}
    if space.view == FACTORS:
        (rank, found_inputs), (found_outputs, rank_b) = shapes["eigenzoo_a"], shapes["eigenzoo_b"]
        fits = (found_outputs, found_inputs) == (outputs, inputs) and rank == rank_b
    else:
        expected = (inputs, outputs) if place.transposed(space.view) else (outputs, inputs)
        fits = shapes["eigenzoo_update"] == expected
    if not fits:
        raise MismatchError(
            f"the module has {outputs} outputs and {inputs} inputs",
            where=f"layer '{place.name}'",
            rule=f"the bundle's shapes are {', '.join(str(list(shape)) for shape in shapes.values())}",
        )


def _check_untied(model: nn.Module, module_name: str, base: nn.Module) -> None:
    """Raise for shared weights: a change would reach only one user before a merge, and both after it."""
    weight = getattr(base, "weight", None)
    users = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if getattr(module, "_parameters", {}).get("weight") is weight and weight is not None
    ]
    others = [name for name in users if name.removesuffix(".base_layer") != module_name]
    if others:
        raise UnsupportedError(
            f"its weight is tied to {others[0]}",
            where=f"module '{module_name}'",
            rule="a tied weight cannot be adapted in one place only",
            next_step=f"load the model untied, or leave the layer out of the fit or with exclude_modules=[{module_name!r}]",
        )
