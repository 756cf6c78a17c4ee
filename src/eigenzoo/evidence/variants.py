"""Make the replacements of a held-out model: its parent, the mean, its own head alone, truncations, random directions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from eigenzoo.errors import MismatchError
from eigenzoo.evidence.random_basis import rebuild_randomly
from eigenzoo.formats.bundle.contents import Template, tensor_id
from eigenzoo.formats.model import Model
from eigenzoo.linalg.lora import Cut, Factors, cut_product
from eigenzoo.passes.settings import own_settings
from eigenzoo.subspace.bases.basis import CORES, LayerBasis
from eigenzoo.subspace.coefficients import Coefficients
from eigenzoo.subspace.fitting.alone import against_alone, is_affordable, is_cut
from eigenzoo.subspace.rebuilt import FULL, RebuiltModel
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.roles import PEFT_PREFIX, is_task_head
from eigenzoo.zoo.stack import UpdateStack
from eigenzoo.zoo.zoo import Zoo

Reader = Callable[[str], Tensor | None]
"""Reads a tensor of another model by its name; None if that model has no fitting one."""


class Variants:
    """Makes every variant of a zoo's models. Nothing is computed before a variant is saved.

    Attributes:
        zoo: the models, opened by the subspace.
        rank: largest number of directions of a layer.
    """

    def __init__(self, space: Subspace, zoo: Zoo, parent: Model | None, seed: int) -> None:
        self._space, self.zoo, self._parent, self._seed = space, zoo, parent, seed
        self.rank = max(num_directions(basis) for basis in space.layers.values())
        self._mean = mean_values(space)
        self._differing = _differing(space, zoo)
        self._has_heads = any(_differs(name, model, self._differing) for model in zoo.models for name in heads(model))

    def rebuilt(self, coefficients: Coefficients, rank: int) -> RebuiltModel:
        """Return the model from its first `rank` coefficients of every layer."""
        values = {
            name: first_directions(self._space.layers[name], value, rank) for name, value in coefficients.values.items()
        }
        return self._space.rebuild(replace(coefficients, values=values), max_lora_rank=FULL)

    def secondary(self, coefficients: Coefficients, rank: int) -> RebuiltModel:
        """Return the model without its first `rank` coefficients, which are those of the mean."""
        values = {
            name: value - first_directions(self._space.layers[name], value - self._mean[name], rank)
            for name, value in coefficients.values.items()
        }
        return self._space.rebuild(replace(coefficients, values=values), max_lora_rank=FULL)

    def mean(self, coefficients: Coefficients) -> RebuiltModel:
        """Return the mean with the model's other contents."""
        return self._space.rebuild(replace(coefficients, values=self._mean), max_lora_rank=FULL)

    def random(self, coefficients: Coefficients) -> RebuiltModel:
        """Return the model projected on random directions around the mean."""
        return _RandomlyRebuilt(self._space, self.zoo, replace(coefficients, values=self._mean), self._seed)

    def alone(self, coefficients: Coefficients, rank: int) -> RebuiltModel:
        """The model with every layer cut to a rank by its own SVD."""
        return _CutAlone(self._space, self.zoo, replace(coefficients, values=self._mean), rank)

    def parent(self, coefficients: Coefficients) -> RebuiltModel | None:
        """Return the parent with the model's other contents; None if a part is not known, such as a head of another shape."""
        index = self.zoo.place(coefficients.name)
        model, read = self.zoo.models[index], self._reader(index)
        if read is None:
            return None
        unknown = [name for name in model.tensors if _differs(name, model, self._differing) and read(name) is None]
        return None if unknown else self._put_together(coefficients, {}, model.tensors, read)

    def head_only(self, coefficients: Coefficients) -> RebuiltModel | None:
        """Return the parent, or the mean if no parent is known, with the model's own head; None if all heads agree."""
        if not self._has_heads:
            return None
        index = self.zoo.place(coefficients.name)
        model, read = self.zoo.models[index], self._reader(index)
        own = heads(model)
        if read is not None:
            other = read
            return self._put_together(
                coefficients, {}, model.tensors, lambda name: None if name in own else other(name)
            )
        body = {name: basis for name, basis in self._space.layers.items() if name not in own}
        return self._put_together(coefficients, body, {*coefficients.template.carried, *own}, lambda name: None)

    def _put_together(
        self, coefficients: Coefficients, layers: Mapping[str, LayerBasis], carried: Collection[str], read: Reader
    ) -> RebuiltModel:
        """Return a model of the mean's layers, tensors from `read`, and its own files."""
        index = self.zoo.place(coefficients.name)

        def read_or_own(name: str) -> Tensor:
            tensor = read(name)
            return self.zoo.read_carried(index, name) if tensor is None else tensor

        template = _Patched(coefficients.template, carried, read_or_own)
        return RebuiltModel(coefficients.name, layers, self._mean, template, self._space.view, self._space.require_base)

    def _reader(self, index: int) -> Reader | None:
        """Return a reader of the parent's tensors: those of its checkpoint, or factors of a zero update; None without a parent."""
        model = self.zoo.models[index]
        if model.updates:
            zeros = {update.key_b: model.tensors[update.key_b] for update in model.updates.values()}
            kept = {update.key_a for update in model.updates.values()}
            return lambda name: (
                torch.zeros(zeros[name].shape, dtype=zeros[name].dtype)
                if name in zeros
                else model.read(name)
                if name in kept
                else None
            )
        parent = self._parent
        return None if parent is None else lambda name: _read_alike(parent, name, model)


class _RandomlyRebuilt(RebuiltModel):
    """A model rebuilt from random directions around the mean."""

    def __init__(self, space: Subspace, zoo: Zoo, mean: Coefficients, seed: int) -> None:
        super().__init__(mean.name, space.layers, mean.values, mean.template, space.view, space.require_base)
        self._zoo, self._seed = zoo, seed

    def _rebuild(self, name: str) -> Tensor:
        rebuilt = self._randomly(name, super()._rebuild(name))
        assert not isinstance(rebuilt, tuple)
        return rebuilt

    def _rebuild_update(self, name: str, max_rank: int | None) -> Cut:
        rebuilt = self._randomly(name, super()._rebuild_update(name, None).factors)
        assert isinstance(rebuilt, tuple)
        return cut_product(*rebuilt, max_rank)

    def _randomly(self, name: str, mean: Tensor | Factors) -> Tensor | Factors:
        return rebuild_randomly(self._layers[name], self._zoo.stack(name), self._zoo.place(self.name), mean, self._seed)


class _CutAlone(RebuiltModel):
    """A model whose updates, or deviations from the mean, are cut to a rank one by one."""

    def __init__(self, space: Subspace, zoo: Zoo, mean: Coefficients, rank: int) -> None:
        super().__init__(mean.name, space.layers, mean.values, mean.template, space.view, space.require_base)
        self._zoo, self._rank = zoo, rank

    def _rebuild_update(self, name: str, max_rank: int | None) -> Cut:
        stack = self._zoo.stack(name)
        assert isinstance(stack, UpdateStack)
        b_OR, a_RI = (factor.double() for factor in stack.factors(self._zoo.place(self.name)))
        return cut_product(b_OR, a_RI, self._rank if max_rank is None else min(self._rank, max_rank))

    def _rebuild(self, name: str) -> Tensor:
        stack = self._zoo.stack(name)
        assert not isinstance(stack, UpdateStack)
        own_OI = stack.matrix(self._zoo.place(self.name)).double()
        if not is_cut(stack.layer, self._rank):
            return own_OI
        mean_OI = super()._rebuild(name).view_as(own_OI)
        left, values, right = torch.linalg.svd(own_OI - mean_OI, full_matrices=False)
        cut_OI: Tensor = (left[:, : self._rank] * values[: self._rank]) @ right[: self._rank]
        return mean_OI + cut_OI


def alone_ranks_of(space: Subspace, zoo: Zoo) -> tuple[tuple[int, ...], int | None]:
    """The ranks at which models are cut alone: 1, 2, and the one that takes no more bytes than the bundle; and that one.

    None at all where no layer would be smaller, and for full weights whose SVD is not cheap.
    """
    layers = zoo.layers.values()
    if any(layer.kind == "dense" for layer in layers) and not is_affordable(zoo):
        return (), None
    largest = max(
        max(stack.ranks) - 1
        if isinstance(stack := zoo.stack(layer.name), UpdateStack)
        else (layer.num_values - 1) // sum(layer.shape)
        for layer in layers
    )
    about = "zero" if all(layer.kind == "update" for layer in layers) else "mean"
    found = against_alone(
        {**space.report, "alone": [row for row in space.report.get("alone", ()) if row["about"] == about]}
    )
    same = found.same_bytes.rank if found is not None and found.same_bytes is not None else None
    return tuple(sorted(rank for rank in {1, 2, same or 1} if rank <= largest)), same


class _Patched(Template):
    """A model's template in which some tensors, also layers, come from another reader."""

    def __init__(self, own: Template, carried: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self.layout, self.config, self.metadata = own.layout, own.config, own.metadata
        self.carried, self.side_files = tuple(carried), own.side_files
        self._own, self._read = own, read

    def read_carried(self, name: str) -> Tensor:
        """Read a tensor from its source."""
        return self._read(name)

    def read_side_file(self, name: str) -> bytes:
        """Read a file beside the weights."""
        return self._own.read_side_file(name)


def num_directions(basis: LayerBasis) -> int:
    """Return the number of directions of a layer's axis `models`, else of its larger truncated side; 0 if no side is truncated."""
    sides = [rank for axis, rank in basis.ranks.items() if axis != CORES]
    return basis.ranks.get("models", max(sides, default=0))


def first_directions(basis: LayerBasis, values: Tensor, rank: int) -> Tensor:
    """Keep the first `rank` numbers, or a core's leading corner (complete along a side that is not truncated). Others are zero."""
    axes = ("models",) if "models" in basis.ranks else ("outputs", "inputs")
    corner = tuple(slice(rank if axis in basis.ranks else None) for axis in axes)
    kept = torch.zeros_like(values)
    kept[corner] = values[corner]
    return kept


@own_settings()
def mean_values(space: Subspace) -> dict[str, Tensor]:
    """Return coefficients of the mean: zeros, or for another center the average of the stored models' coefficients."""
    zeros = {name: torch.zeros(basis.coefficient_shape) for name, basis in space.layers.items()}
    if space.manifest.center == "models":
        return zeros
    sums = {name: values.double() for name, values in zeros.items()}
    for model in space.names:
        for name, values in space.coefficients(model).values.items():
            sums[name] += values
    return {name: (values / len(space.names)).float() for name, values in sums.items()}


def heads(model: Model) -> set[str]:
    """Return the names of a task head's tensors: its weights, or the factors of its update."""
    modules = {key: update.module for update in model.updates.values() for key in (update.key_a, update.key_b)}
    return {name for name in model.tensors if is_task_head(modules.get(name, name.removeprefix(PEFT_PREFIX)))}


@own_settings()
def check_parent(space: Subspace, parent: Model) -> None:
    """Raise MismatchError unless a parent has every layer in its shape. Its task head may differ."""
    for name, basis in space.layers.items():
        info = parent.tensors.get(name)
        if not is_task_head(name) and (info is None or info.shape != basis.layer.tensor_shape):
            raise MismatchError(
                "is absent" if info is None else f"shape {list(info.shape)}",
                where=f"layer '{name}' of the parent {parent.name}",
                rule=f"the subspace has {list(basis.layer.tensor_shape)}",
            )


def _differing(space: Subspace, zoo: Zoo) -> set[str]:
    """Return the names of layers with variance over the fitted models, and of carried tensors that differ between them."""
    fitted: Mapping[str, Mapping[str, object]] = space.report["layers"]
    names = {name for name in space.layers if fitted.get(name, {}).get("captured") is not None}
    contents: dict[str, set[str]] = {}
    for model in space.manifest.models:
        for name, content in model.carried.items():
            contents.setdefault(name, set()).add(content)
    for index in range(len(zoo)):
        for name in zoo.carried(index):
            contents.setdefault(name, set()).add(tensor_id(zoo.read_carried(index, name)))
    return names | {name for name, tensor in contents.items() if len(tensor) > 1}


def _differs(name: str, model: Model, differing: Collection[str]) -> bool:
    """Tell whether a tensor, or the layer of a factor, differs between models."""
    layers = {name}
    for update in model.updates.values():
        if name in (update.key_a, update.key_b):
            layers |= {update.module, f"{update.module}.{'lora_A' if name == update.key_a else 'lora_B'}"}
    return not layers.isdisjoint(differing)


def _read_alike(parent: Model, name: str, model: Model) -> Tensor | None:
    """Read the parent's tensor if it can replace the model's: the same shape, and both are weights or both are counts."""
    tensor, own = parent.tensors.get(name), model.tensors[name]
    if tensor is None or tensor.shape != own.shape:
        return None
    castable = tensor.dtype.is_floating_point and own.dtype.is_floating_point
    return parent.read(name) if castable or tensor.dtype == own.dtype else None
