"""Attach the models of a subspace to a base model, so that each row of a batch is computed by its own model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eigenzoo.errors import MismatchError, UnsupportedError, UsageError
from eigenzoo.formats.bundle.contents import Template
from eigenzoo.records import Progress, no_progress
from eigenzoo.serve.carried import LORA_BIAS, own_tensors
from eigenzoo.serve.layers import Chain, ServedModule, ServedVectors, ServedWeight, served_as
from eigenzoo.serve.numbers import form_of
from eigenzoo.serve.parts import LayerPart, OwnPart, Part, UpdatePart
from eigenzoo.serve.route import Routing
from eigenzoo.serve.served import Served
from eigenzoo.serve.slots import SlotTable
from eigenzoo.serve.stores import Cores, Factors, Slots, Vectors
from eigenzoo.subspace.bases.basis import LayerBasis
from eigenzoo.subspace.module_places import Place, find_places, sharing, weight_at
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.roles import VARIANCE

MAX_COST = 8.0
"""Products of a row with what models change, as a multiple of those of the served weights, above which attaching is refused."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attach(
    model: nn.Module,
    space: Subspace,
    models: Sequence[str] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    prefix: str | None = None,
    dtype: torch.dtype | None = None,
    max_cost: float = MAX_COST,
    progress: Progress = no_progress,
) -> Served:
    """Serve models of a subspace from one base model.

    The base's modules stay where they are and get forward hooks, which add U(C(Vᵀ x)) of each row's model. Of full weights the
    module gets the zoo's mean, and the base's own weights are kept beside it for rows of the base. Without a route, the model
    computes what it did before.

    Args:
        model: the base: any torch module with the layers of the bundle, in evaluation mode.
        space: the subspace: a zoo of LoRA updates, of full weights, or of differences from a base; every form.
        models: names of stored models. Default: all.
        names: parameter names in the module by layer names, where they differ (`integrations.transformers_names.saved_names`).
        prefix: the prefix of the module's names. Default: the only one that makes all layers names of the module.
        dtype: dtype of bases and cores. Default: that of each weight.
        max_cost: the largest number of additional products, as a multiple of those of the served weights. Sides and cores take
            far less than 1. Whole-layer directions (form `flat`) take one multiple for each direction, and the factors of all
            models of a zoo (form `stacked`) can take as much.
        progress: called as progress("reading bases", done, total).

    Raises MismatchError for a module without the layers, UnsupportedError for what cannot be computed per row, and for a form that
    costs more than `max_cost`. Then the module is unchanged. Memory: the bases once, and of each model its cores; see
    `Served.memory`. Of full weights also the mean.
    """
    _check(model, space)
    chosen = list(space.names if models is None else models)
    templates = {name: space.template(name) for name in chosen}
    indices = [space.names.index(name) for name in chosen]
    if len(set(chosen)) < len(chosen):
        raise UsageError("a model is named twice", where=", ".join(chosen[:5]), next_step="name each model once")
    assembly = _Assembly(model, space, names or {}, prefix, dtype, max_cost)
    try:
        for done, (layer, basis) in enumerate(space.layers.items()):
            assembly.add_layer(layer, basis, space.all_coefficients[layer][indices])
            progress("reading bases", done + 1, len(space.layers))
        assembly.add_carried(space, templates)
        return assembly.finish(chosen)
    except BaseException:
        assembly.undo()
        raise


class _Assembly:
    """The modules and parts, while they are collected."""

    def __init__(
        self,
        model: nn.Module,
        space: Subspace,
        names: Mapping[str, str],
        prefix: str | None,
        dtype: torch.dtype | None,
        max_cost: float,
    ) -> None:
        self.model, self.space, self.names, self.prefix, self.dtype = model, space, names, prefix, dtype
        self.routing = Routing()
        self.modules: dict[str, ServedModule] = {}
        self.parts: list[Part] = []
        self.unchanged: dict[str, Tensor] = {}
        self.swapped: dict[Place, tuple[Tensor, Tensor]] = {}
        shapes = {name: tuple(basis.layer.tensor_shape) for name, basis in space.layers.items()}
        self.places = find_places(model, shapes, names, prefix, _may_be if space.view == "update" else _is)
        self.max_products = max_cost * sum(prod(shape) for shape in shapes.values())
        self.max_cost = max_cost

    def add_layer(self, layer: str, basis: LayerBasis, coefficients: Tensor) -> None:
        """Add a layer of the subspace, at every place of the module that has its parameter."""
        place = self.places[layer]
        for path, leaf in (place, *sharing(self.model, place)):
            module = self.model.get_submodule(path)
            weight = weight_at(self.model, (path, leaf))
            if self.space.view != "update" and weight.dtype not in FLOATS:
                raise UnsupportedError(
                    f"has dtype {weight.dtype}",
                    where=f"parameter '{path}.{leaf}'",
                    rule="full weights are served from weights in floating point",
                    next_step="load the base without quantising it",
                )
            served = self._served(path, layer, basis, coefficients, module, leaf)
            if isinstance(served, ServedWeight) and leaf == "weight":
                self._add_chain(served, layer, basis, coefficients, weight, (path, leaf))
            elif served is not None:
                self._add_vectors(served, leaf, layer, basis, coefficients, weight)

    def _served(
        self, path: str, layer: str, basis: LayerBasis, coefficients: Tensor, module: nn.Module, leaf: str
    ) -> ServedModule | None:
        """Return what serves a module; None if no model changes this parameter."""
        if path not in self.modules:
            if parametrize.is_parametrized(module):
                raise UsageError(
                    "has a parametrization",
                    where=f"module '{path}'",
                    rule="models are served beside plain weights",
                    next_step="remove it first: eigenzoo.adapt.detach, or torch.nn.utils.parametrize.remove_parametrizations",
                )
            try:
                self.modules[path] = served_as(path, module, self.routing)
            except UnsupportedError:
                own = weight_at(self.model, (path, leaf)).detach().cpu().double()
                if all(torch.equal(self._rebuilt(basis, own, row), own) for row in coefficients):
                    return None
                raise
        return self.modules[path]

    def _add_chain(
        self, served: ServedWeight, layer: str, basis: LayerBasis, coefficients: Tensor, weight: Tensor, place: Place
    ) -> None:
        is_update = self.space.view == "update"
        shape = served.kind.shape(weight) if weight.dtype in FLOATS else basis.layer.shape
        transposed = served.kind.transposed and not is_update
        expected = basis.layer.shape[::-1] if transposed else basis.layer.shape
        if shape != expected:
            raise MismatchError(
                f"the module has {shape[0]} outputs and {shape[1]} inputs",
                where=f"layer '{layer}'",
                rule=f"the bundle's layer has {expected[0]} and {expected[1]}",
                next_step="load the base that the zoo was trained from",
            )
        form = form_of(basis, transposed, self._dtype(weight), weight.device)
        low = basis.low_rank()
        rank = low.rank if low is not None else self.space.largest_ranks.get(layer) if is_update else None
        chain = form.chain(coefficients, rank)
        self.max_products -= chain.cost
        if self.max_products < 0:
            raise UnsupportedError(
                f"serving this bundle takes more than {self.max_cost:g} times the products of the base",
                where=str(self.space.path),
                rule=f"form '{basis.form}' multiplies with "
                + ("each direction, which is a whole layer" if basis.form == "flat" else "the factors of all models"),
                next_step="fit the zoo with --axes outputs,inputs, or allow it with max_cost",
            )
        served.chains[layer] = chain
        self.parts.append(LayerPart(layer, form, chain))
        offset = form.operator.offset
        if offset is not None and (self.space.view == "weight" or bool(offset.any())):
            self._swap(served, place, weight, offset)

    def _swap(self, served: ServedWeight, place: Place, weight: Tensor, offset: Tensor) -> None:
        """Put the zoo's mean into the module, and keep the base's weight beside it."""
        leaf = place[1]
        for base, mean in self.swapped.values():
            if weight.data_ptr() == mean.data_ptr():
                served.base[leaf] = base
                return
        base = weight.detach().clone()
        rows = base.shape[0] if base.ndim else 1
        mean = offset.expand(rows, prod(base.shape[1:])).reshape(base.shape)
        if self.space.view == "delta":
            mean = mean + base.cpu().double()
        self.swapped[place] = (base, weight)
        served.base[leaf] = base
        with torch.no_grad():
            weight.copy_(mean)

    def _add_vectors(
        self, served: ServedModule, leaf: str, layer: str, basis: LayerBasis, coefficients: Tensor, weight: Tensor
    ) -> None:
        own = weight.detach().cpu().double()
        rebuilt = partial(self._rebuilt, basis, own)
        rows = [{layer: row} for row in coefficients]
        self._add_own(served, leaf, layer, weight, rows, rebuilt)

    def _rebuilt(self, basis: LayerBasis, own: Tensor, coefficients: Tensor) -> Tensor:
        """Return one model's tensor of a layer, as its file would have it."""
        matrix = basis.rebuild(coefficients)
        assert isinstance(matrix, Tensor)
        tensor = matrix.reshape(own.shape)
        tensor = tensor + own if self.space.view == "delta" else tensor
        if VARIANCE.search(basis.layer.name) is not None:
            tensor = tensor.clamp_min(torch.finfo(torch.float32).tiny)
        return tensor.to(getattr(torch, basis.layer.dtype.lower(), torch.float32)).double()

    def _add_own(
        self,
        served: ServedModule,
        leaf: str,
        name: str,
        weight: Tensor,
        values: Sequence[Mapping[str, Tensor]],
        rebuilt: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Add a tensor that each model has of its own."""
        stored: Slots
        layout: Callable[[Tensor], Tensor]
        if isinstance(served, ServedWeight):
            if leaf == "weight":
                stored = Cores({})
                key, turned = "cores", served.kind.transposed
                layout = partial(_as_matrix, transposed=turned)
            elif leaf == "bias":
                stored, key, layout = Vectors({}), "values", _as_is
            else:
                raise UnsupportedError(
                    "differs between the models",
                    where=f"parameter '{served.name}.{leaf}'",
                    rule="only the weight and the bias of such a layer can differ by row",
                    next_step="leave it out of the fit if all models have the same one",
                )
        else:
            stored, key, layout = Vectors({}), "values", _as_is
        is_weight = isinstance(served, ServedWeight)
        part = OwnPart(name, stored, key, weight, rebuilt, is_weight, layout)
        numbers = torch.stack([part.numbers(model) for model in values])
        first = torch.zeros_like(numbers[:1]) if is_weight else weight.detach().cpu().double()[None]
        stored.stacks[key] = torch.cat([first, numbers]).to(weight.device, self._dtype(weight))
        if isinstance(served, ServedWeight) and isinstance(stored, Cores):
            served.chains[name] = Chain(None, stored, None)
        elif isinstance(served, ServedWeight) and isinstance(stored, Vectors):
            served.biases[name] = stored
        elif isinstance(served, ServedVectors) and isinstance(stored, Vectors):
            served.leaves[leaf] = (name, stored)
        self.parts.append(part)

    def add_carried(self, space: Subspace, templates: Mapping[str, Template]) -> None:
        """Add what models have besides their layers: heads and biases, and updates of excluded modules."""
        carried = [own_tensors(space.layers, template) for template in templates.values()]
        for name in dict.fromkeys(name for tensors in carried for name in tensors):
            self._add_tensor(name, carried)

    def _add_tensor(self, name: str, carried: Sequence[Mapping[str, Tensor]]) -> None:
        if name.endswith(".b"):
            return  # with its A
        if name.endswith(".a"):
            self._add_update(name.removesuffix(".a"), carried)
            return
        values = next(tensors[name] for tensors in carried if name in tensors)
        module_name = name.removesuffix(LORA_BIAS)
        if module_name != name:
            path = self._place(f"{module_name}.weight", None, name)[0]
            served = self._weight(path, name)
            vectors = Vectors({})
            own = torch.zeros_like(values)
            part = OwnPart(name, vectors, "values", own, None, False, _as_is)
            weight = weight_at(self.model, (path, "weight"))
            numbers = torch.stack([part.numbers(tensors) for tensors in carried])
            stack = torch.cat([torch.zeros_like(numbers[:1]), numbers])
            vectors.stacks["values"] = stack.to(weight.device, self._dtype(weight))
            served.biases[name] = vectors
            self.parts.append(part)
            return
        path, leaf = self._place(name, tuple(values.shape), name)
        own = weight_at(self.model, (path, leaf))
        here = own.detach().cpu()
        if all(torch.equal(tensors.get(name, here).to(here.dtype), here) for tensors in carried):
            self.unchanged[name] = own
            return
        if not own.dtype.is_floating_point:
            raise UnsupportedError(
                f"differs between the models and has dtype {own.dtype}",
                where=f"tensor '{name}'",
                rule="numbers in floating point can differ by row",
                next_step="rebuild the models and serve them one by one",
            )
        for other, its_leaf in ((path, leaf), *sharing(self.model, (path, leaf))):
            module = self.model.get_submodule(other)
            if other not in self.modules:
                self.modules[other] = served_as(other, module, self.routing)
            self._add_own(self.modules[other], its_leaf, name, own, carried, None)

    def _add_update(self, module_name: str, carried: Sequence[Mapping[str, Tensor]]) -> None:
        path, _ = self._place(f"{module_name}.weight", None, module_name)
        served = self._weight(path, module_name)
        weight = weight_at(self.model, (path, "weight"))
        factors = [tensors for tensors in carried if f"{module_name}.a" in tensors]
        rank = max(tensors[f"{module_name}.a"].shape[0] for tensors in factors)
        outputs, inputs = (factors[0][f"{module_name}.{side}"].shape[axis] for side, axis in (("b", 0), ("a", 1)))
        count = len(carried) + 1
        empty = {"left": torch.zeros(count, outputs, rank), "right": torch.zeros(count, rank, inputs)}
        store = Factors({key: part.to(weight.device, self._dtype(weight)) for key, part in empty.items()})
        chain = served.chains[f"{module_name} (excluded)"] = Chain(None, store, None)
        part = UpdatePart(module_name, chain)
        for slot, tensors in enumerate(carried, 1):
            part.prepare(tensors)(slot)
        self.parts.append(part)

    def _weight(self, path: str, name: str) -> ServedWeight:
        if path not in self.modules:
            self.modules[path] = served_as(path, self.model.get_submodule(path), self.routing)
        served = self.modules[path]
        if not isinstance(served, ServedWeight):
            raise UnsupportedError("has no weight that multiplies its inputs", where=f"module '{path}' of '{name}'")
        return served

    def _place(self, name: str, shape: tuple[int, ...] | None, shown: str) -> Place:
        name = name.replace(".base_layer.", ".")  # PEFT's wrapper
        try:
            found = find_places(
                self.model, {name: shape or ()}, self.names, self.prefix, _is if shape is not None else _any
            )
        except MismatchError as error:
            raise MismatchError(
                "the models bring this tensor, and the base has no such parameter in its shape",
                where=f"tensor '{shown}'",
                rule=str(error),
                next_step="load the base with the models' head, such as AutoModelForSequenceClassification with num_labels",
            ) from error
        return found[name]

    def _dtype(self, weight: Tensor) -> torch.dtype:
        return self.dtype or (weight.dtype if weight.dtype in FLOATS else torch.float32)

    def finish(self, chosen: Sequence[str]) -> Served:
        """Register the hooks."""
        return Served(
            model=self.model,
            space=self.space,
            routing=self.routing,
            table=SlotTable(chosen),
            modules=self.modules,
            parts=self.parts,
            swapped=tuple(self.swapped.values()),
            unchanged=self.unchanged,
        )

    def undo(self) -> None:
        """Restore the module."""
        with torch.no_grad():
            for base, weight in self.swapped.values():
                weight.copy_(base)


def _check(model: nn.Module, space: Subspace) -> None:
    if space.view == "factors":
        raise UsageError(
            "view 'factors' has two layers for one weight",
            where=str(space.path),
            next_step="fit the zoo with view 'update' (the default for adapters)",
        )
    hooks = (hook for part in model.modules() for hook in part._forward_hooks.values())
    if any(isinstance(getattr(hook, "__self__", None), ServedModule) for hook in hooks):
        raise UsageError(
            "models are attached already",
            rule="a model serves one subspace",
            next_step="add models with served.add, or call served.detach() first",
        )


def _is(shape: tuple[int, ...], layer: tuple[int, ...]) -> bool:
    return shape == layer


def _any(shape: tuple[int, ...], layer: tuple[int, ...]) -> bool:
    return True


def _may_be(shape: tuple[int, ...], layer: tuple[int, ...]) -> bool:
    """Accept a weight that lies either way, or a kernel, or a quantised weight."""
    matrix = (shape[0], prod(shape[1:])) if shape else ()
    return layer in (shape, shape[::-1], matrix) or prod(shape) < prod(layer)


def _as_is(values: Tensor) -> Tensor:
    return values


def _as_matrix(values: Tensor, transposed: bool) -> Tensor:
    matrix = values.flatten(1)
    return matrix.T if transposed else matrix
