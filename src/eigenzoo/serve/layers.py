"""What the models change in one module: products that its forward hook adds to the output, biases, and weights of norms.

Legend: O outputs, I inputs, P and Q the sides of a model's matrix, n rows of a batch.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import embedding, linear

from eigenzoo.errors import UnsupportedError
from eigenzoo.serve.route import Pick, Route, Routing, Rows
from eigenzoo.serve.stores import Slots, Store, Vectors


@dataclass
class Chain:
    """A change L·M·F of a weight: `first` (Q, I), a matrix M (P, Q) for each model, `last` (O, P). None is the identity."""

    first: Tensor | None
    store: Store
    last: Tensor | None

    def matrix(self, slot: int) -> Tensor:
        """Return a model's change (O, I)."""
        middle = self.store.matrix(slot)
        middle = middle if self.last is None else self.last @ middle
        return middle if self.first is None else middle @ self.first

    @property
    def cost(self) -> int:
        """Products of one row."""
        return self.store.cost + sum(part.numel() for part in (self.first, self.last) if part is not None)


class ServedModule(ABC):
    """A module whose parameters differ between the models.

    Attributes:
        name, module: the module and its name in the model.
        base: the parameters of the base that are not in the module, because it has the zoo's mean there.
    """

    def __init__(self, name: str, module: nn.Module, routing: Routing) -> None:
        self.name, self.module, self._routing = name, module, routing
        self.base: dict[str, Tensor] = {}
        self._twin = without_hooks(module)

    @abstractmethod
    def slots(self) -> Mapping[str, Slots]:
        """Everything that holds numbers of the models, by what it belongs to."""

    @abstractmethod
    def routed(self, pick: Pick, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """Return the output for rows of these models, from the module's own."""

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Change the module's output as the route of this thread says; without a route, compute the base."""
        route = self._routing.route
        if route is None:
            return self._base_output(args, kwargs) if self.base else output
        inputs = args[0] if args else next(iter(kwargs.values()))
        if shared_by_rows(route, module, inputs):
            inputs, output = (values.expand(route.num_rows, *values.shape[1:]) for values in (inputs, output))
            args, kwargs = (inputs,), {}
        pick = route.pick(inputs.shape, self.name).on(inputs.device)
        result = self.routed(pick, args, kwargs, output)
        if pick.base is not None and (self.base or not self.adds_zero):
            untouched = self._base_output(args, kwargs) if self.base else output
            mask = pick.base[None] if pick.packed else pick.base
            result = torch.where(mask.view(*mask.shape, *[1] * (result.ndim - mask.ndim)), untouched, result)
        return result

    adds_zero = True
    """Whether rows of the base come out as the module's own output."""

    def _base_output(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return cast(Tensor, functional_call(self._twin, self.base, args, dict(kwargs)))


def shared_by_rows(route: Route, module: nn.Module, inputs: Tensor) -> TypeGuard[Rows]:
    """Tell whether the inputs are one row of positions, which is for all rows of the batch."""
    return isinstance(route, Rows) and isinstance(module, nn.Embedding) and inputs.shape[0] == 1


@dataclass(frozen=True)
class Kind:
    """A kind of module with a weight that multiplies its inputs: a linear layer."""

    transposed: bool = False

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = weight.shape[0], prod(weight.shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)

    def first(self, module: nn.Module, inputs: Tensor, chain: Chain, pick: Pick) -> Tensor:
        """Return the inputs times `first` and each row's matrix, outputs last: (…, P)."""
        if chain.first is None:
            return chain.store.times(inputs, pick)
        return chain.store.times(linear(inputs.to(chain.first.dtype), chain.first), pick)

    def added(self, module: nn.Module, inputs: Tensor, output: Tensor, chain: Chain, pick: Pick) -> Tensor:
        """Return the output plus the change by a chain."""
        inner = self.first(module, inputs, chain, pick)
        if chain.last is None:
            return output + inner.to(output.dtype)
        if inner.dtype == chain.last.dtype == output.dtype and output.is_contiguous():
            output.view(-1, output.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), chain.last.T)
            return output
        return output + linear(inner.to(chain.last.dtype), chain.last).to(output.dtype)

    def biased(self, output: Tensor, bias: Tensor, pick: Pick) -> Tensor:
        """Return the output plus each row's bias (n, O)."""
        return output + pick.spread(bias, output.ndim).to(output.dtype)


@dataclass(frozen=True)
class EmbeddingKind(Kind):
    """An embedding. Its inputs are ids."""

    def first(self, module: nn.Module, inputs: Tensor, chain: Chain, pick: Pick) -> Tensor:
        """See `Kind`."""
        if chain.first is None:
            inner = chain.store.lookup(inputs, pick)
        else:
            inner = chain.store.times(embedding(inputs, chain.first.T), pick)
        scale = getattr(module, "embed_scale", None)
        return inner if scale is None else inner * scale


@dataclass(frozen=True)
class ConvKind(Kind):
    """A convolution. Its inputs are channels times entries of the kernel."""

    def added(self, module: nn.Module, inputs: Tensor, output: Tensor, chain: Chain, pick: Pick) -> Tensor:
        """See `Kind`. With groups, or with inputs that are not truncated, each model of the batch is a convolution of its own."""
        convolution: Any = module
        kernel = convolution.weight.shape[1:]
        if chain.first is None or convolution.groups > 1:
            result = output.clone()
            for slot in pick.models():
                which = (pick.slots == slot).nonzero()[:, 0]
                weight = chain.matrix(slot).reshape(-1, *kernel).to(inputs.dtype)
                if slot:
                    result[which] += convolution._conv_forward(inputs[which], weight, None)
            return result
        first = chain.first.reshape(-1, *kernel).to(inputs.dtype)
        inner = chain.store.times(convolution._conv_forward(inputs, first, None).movedim(1, -1), pick)
        inner = inner if chain.last is None else linear(inner, chain.last)
        return output + inner.movedim(-1, 1).to(output.dtype)

    def biased(self, output: Tensor, bias: Tensor, pick: Pick) -> Tensor:
        """See `Kind`."""
        return output + bias.view(*bias.shape, *[1] * (output.ndim - 2)).to(output.dtype)


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module with a weight that multiplies its inputs; None for others."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # torch's attention reads its weight and never calls it
    if isinstance(module, nn.Embedding):
        return EmbeddingKind(transposed=True) if module.max_norm is None else None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvKind()
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer, whose weight is (I, O)
        return Kind(transposed=True)
    return Kind() if hasattr(module, "out_features") and hasattr(module, "in_features") else None


class ServedWeight(ServedModule):
    """A module with a weight that multiplies its inputs: W x + Σ L·M·F x + b."""

    def __init__(self, name: str, module: nn.Module, routing: Routing, kind: Kind) -> None:
        super().__init__(name, module, routing)
        self.kind = kind
        self.chains: dict[str, Chain] = {}
        self.biases: dict[str, Vectors] = {}

    def slots(self) -> Mapping[str, Slots]:
        """See `ServedModule`."""
        return {layer: chain.store for layer, chain in self.chains.items()} | self.biases

    def routed(self, pick: Pick, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """See `ServedModule`. The products are added to the output in place where the kind allows it."""
        inputs = args[0] if args else next(iter(kwargs.values()))
        for chain in self.chains.values():
            output = self.kind.added(self.module, inputs, output, chain, pick)
        for bias in self.biases.values():
            output = self.kind.biased(output, bias.rows(pick), pick)
        return output


class ServedVectors(ServedModule):
    """A module without a product, such as a norm, that is computed with each row's own parameters."""

    adds_zero = False

    def __init__(self, name: str, module: nn.Module, routing: Routing) -> None:
        super().__init__(name, module, routing)
        self.leaves: dict[str, tuple[str, Vectors]] = {}

    def slots(self) -> Mapping[str, Slots]:
        """See `ServedModule`."""
        return dict(self.leaves.values())

    def routed(self, pick: Pick, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """See `ServedModule`."""
        values = {leaf: vectors.rows(pick) for leaf, (_, vectors) in self.leaves.items()}
        inputs = args[0] if args else next(iter(kwargs.values()))
        rows = inputs[0] if pick.packed else inputs

        def one(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            return cast(Tensor, functional_call(self._twin, parameters, (row[None],)))[0]

        result: Tensor = torch.vmap(one)(values, rows)
        return result[None] if pick.packed else result


def without_hooks(module: nn.Module) -> nn.Module:
    """Return a module with the same parameters and children, and without hooks."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        twin.__dict__[name] = type(module.__dict__[name])()
    return twin


MIXED = {
    "relative_attention_bias": "is indexed by pairs of positions",
    "experts": "gets tokens of several rows at once",
}
"""Parts of the names of modules whose inputs are not rows of the batch, and why."""


def served_as(name: str, module: nn.Module, routing: Routing) -> ServedModule:
    """Return what serves a module. Raises UnsupportedError for parameters that cannot differ by row."""
    for part in name.split("."):
        if part in MIXED:
            raise UnsupportedError(
                "differs between the models",
                where=f"module '{name}'",
                rule=f"it {MIXED[part]}, so no row can have its own",
                next_step="fit the zoo without it (exclude) if all models have the same one, or rebuild the models",
            )
    kind = kind_of(module)
    if kind is not None:
        return ServedWeight(name, module, routing, kind)
    if any(True for _ in module.children()):
        raise UnsupportedError(
            f"a parameter of {type(module).__name__} differs between the models",
            where=f"module '{name}'",
            rule="a module is computed per row if it is a linear layer, a convolution, an embedding, or has no modules inside",
            next_step="leave the parameter out of the fit (exclude), if all models have the same one, or rebuild the models",
        )
    return ServedVectors(name, module, routing)
