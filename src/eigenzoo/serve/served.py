"""A base model with the models of a subspace attached."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eigenzoo.errors import UsageError
from eigenzoo.serve.carried import own_tensors
from eigenzoo.serve.layers import ServedModule, ServedWeight
from eigenzoo.serve.parts import LayerPart, Part
from eigenzoo.serve.route import BASE, Packed, Route, Routing, Rows
from eigenzoo.serve.slots import SlotTable, Ticket
from eigenzoo.serve.stores import GROWTH, Blends
from eigenzoo.subspace.coefficients import Coefficients
from eigenzoo.subspace.subspace import Subspace


class Served:
    """A base model with models attached; see `attach`. Its methods may be called by several threads.

    Attributes:
        model: the base, with forward hooks.
        space: the subspace of the models.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        space: Subspace,
        routing: Routing,
        table: SlotTable,
        modules: Mapping[str, ServedModule],
        parts: Sequence[Part],
        swapped: Sequence[tuple[Tensor, Tensor]],
        unchanged: Mapping[str, Tensor],
    ) -> None:
        self.model, self.space = model, space
        self._routing, self._table, self._modules, self._parts, self._swapped = routing, table, modules, parts, swapped
        self._unchanged = unchanged
        self._changing = threading.Lock()
        self._hooks = [
            served.module.register_forward_hook(served.hook, with_kwargs=True) for served in modules.values()
        ]

    def __repr__(self) -> str:
        return f"Served({type(self.model).__name__}, {len(self.names)} models, {len(self._modules)} modules)"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the attached models."""
        return self._table.names

    def acquire(self, name: str) -> Ticket:
        """Return a model's ticket, for `packed`. It keeps its numbers until its `release`, whatever is added or removed meanwhile.

        Raises UsageError for an unknown name.
        """
        return self._table.acquire(name)

    @contextmanager
    def route(self, models: Sequence[str], *, expand: int = 1) -> Iterator[None]:
        """Compute each row of the batches of this thread with its own model.

        Args:
            models: one name for each row; `BASE` for the base.
            expand: number of rows that are made of each, such as beams. Batches of both sizes are accepted.

        Raises UsageError for an unknown name. A batch of another size raises UsageError in the forward pass.
        """
        if isinstance(models, str) or not models:
            raise UsageError("models are one name for each row of the batch", next_step='write models=["a", "b"]')
        with self._tickets(models) as tickets:
            slots = [ticket.slot for ticket in tickets]
            with self._entered(Rows(slots, self._device, expand)):
                yield

    @contextmanager
    def packed(self, tickets: Sequence[Ticket], lengths: Sequence[int], kept: Tensor | None = None) -> Iterator[None]:
        """Compute runs of tokens, packed into one row (1, T), each with its own model.

        Args:
            tickets: the model of each run; see `acquire`.
            lengths: the number of tokens of each run, in order. Tokens after the last run are padding.
            kept: indices of the tokens that the model keeps before its head (`logits_to_keep`), or None for all.
        """
        slots = [ticket.slot for ticket in tickets]
        with self._entered(Packed(slots, lengths, self._device, kept)):
            yield

    def generate(self, *args: Any, models: Sequence[str], **kwargs: Any) -> Any:
        """Generate with one model for each row of the inputs: `model.generate` of transformers, with its arguments.

        Beams and returned sequences of a row belong to the row's model. Raises UsageError for an unknown name, and for ways to
        generate that make other rows, such as guidance.
        """
        model: Any = self.model
        config = kwargs.get("generation_config") or model.generation_config
        sizes = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
        with self.route(models, expand=max(sizes)):
            return model.generate(*args, **kwargs)

    def add(
        self, name: str, source: str | os.PathLike[str] | Coefficients | None = None, *, replace: bool = False
    ) -> Coefficients:
        """Attach another model, also while others are computed.

        Args:
            name: the name to serve it by.
            source: coefficients, or the path of a model of the zoo's kind, which is projected. Default: the stored model `name`.
            replace: whether it may take the place of an attached model. Requests that have begun keep the old one.

        Returns its coefficients; `.residual` is the share of its energy that lies outside the subspace and is lost.

        Raises UsageError for a name that is taken, and MismatchError for a model with a head of another shape.
        """
        if name == BASE or not name:
            raise UsageError(f"{name!r} cannot name a model", rule=f"{BASE!r} is the model without changes")
        if not replace and name in self.names:
            raise UsageError(f"{name!r} is attached already", next_step="choose another name, or pass replace=True")
        found = self._coefficients(name, source)
        values = dict(found.values) | own_tensors(self.space.layers, found.template)
        with self._changing, torch.no_grad():
            self._check_known(name, values)
            writes = [part.prepare(values) for part in self._parts]
            if not replace and name in self.names:
                raise UsageError(f"{name!r} is attached already", next_step="choose another name, or pass replace=True")
            slot, num_slots = self._table.reserve(max(1, self._table.num_slots // GROWTH))
            if num_slots is not None:
                for part in self._parts:
                    part.slots().grow(num_slots)
            for write in writes:
                write(slot)
            self._table.give(name, slot)
        return found

    def remove(self, name: str) -> None:
        """Detach a model. Requests that have begun keep it. Raises UsageError for an unknown name."""
        self._table.remove(name)

    def memory(self) -> dict[str, Any]:
        """Return the bytes of what is attached.

        `basis`: what all models share, the mean of full weights included. `cores`: the numbers of all slots. `carried`: the part
        of `cores` that is heads, biases and updates of excluded modules. `per_model`: one more model. `lora`: one model as a plain
        LoRA of the largest rank that the zoo has in each layer, in the same dtype; None for full weights. `pays_from`: the number
        of models from which on basis and cores take less than LoRAs; None if they never do.
        """
        basis = sum(tensor.numel() * tensor.element_size() for tensor in self._shared())
        stores = {id(part.slots()): part for part in self._parts}.values()
        per_model = sum(part.slots().bytes_per_model for part in stores)
        carried = sum(part.slots().num_bytes for part in stores if not isinstance(part, LayerPart))
        carried_each = sum(part.slots().bytes_per_model for part in stores if not isinstance(part, LayerPart))
        lora = self._lora_bytes()
        saved = None if lora is None else lora - (per_model - carried_each)
        return {
            "models": len(self.names),
            "basis": basis,
            "cores": sum(part.slots().num_bytes for part in stores),
            "carried": carried,
            "per_model": per_model,
            "lora": lora,
            "pays_from": None if saved is None or saved <= 0 else basis // saved + 1,
        }

    def detach(self) -> nn.Module:
        """Remove all models, and return the base as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        with torch.no_grad():
            for base, weight in self._swapped:
                weight.copy_(base)
        self._swapped = ()
        return self.model

    @contextmanager
    def _tickets(self, models: Sequence[str]) -> Iterator[list[Ticket]]:
        with ExitStack() as held:
            yield [held.enter_context(self.acquire(name)) for name in models]

    @contextmanager
    def _entered(self, route: Route) -> Iterator[None]:
        if not self._hooks:
            raise UsageError("nothing is attached any more", next_step="attach again: detach was called")
        with self._routing.entered(route):
            yield

    @property
    def _device(self) -> torch.device:
        for part in self._parts:
            return next(iter(part.slots().stacks.values())).device
        return torch.device("cpu")

    def _coefficients(self, name: str, source: str | os.PathLike[str] | Coefficients | None) -> Coefficients:
        if isinstance(source, Coefficients):
            return source
        return self.space.coefficients(name) if source is None else self.space.project(source)

    def _check_known(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Raise UsageError for a model with other coefficients, or with tensors of its own that no attached model has."""
        shapes = {layer: tuple(basis.coefficient_shape) for layer, basis in self.space.layers.items()}
        wrong = [layer for layer, shape in shapes.items() if layer not in values or tuple(values[layer].shape) != shape]
        if wrong:
            raise UsageError(
                "the coefficients are of another subspace",
                where=f"model '{name}', layer '{wrong[0]}'",
                rule="see project",
            )
        known = {part_name for part in self._parts for part_name in part.names()}
        new = [tensor for tensor in values if tensor not in known and not self._is_own(tensor, values[tensor])]
        if new:
            raise UsageError(
                f"brings {new[0]!r}, in which the attached models are like the base",
                where=f"model '{name}'",
                rule="a model that is added differs from the base in the same tensors as the attached ones",
                next_step="put it into the bundle (add), and attach again",
            )

    def _is_own(self, name: str, values: Tensor) -> bool:
        own = self._unchanged.get(name)
        return own is not None and torch.equal(own.cpu().to(values.dtype), values)

    def _shared(self) -> Iterator[Tensor]:
        for served in self._modules.values():
            if isinstance(served, ServedWeight):
                for chain in served.chains.values():
                    yield from (part for part in (chain.first, chain.last) if part is not None)
                    if isinstance(chain.store, Blends):
                        yield chain.store.directions_KOI
        yield from (base for base, _ in self._swapped)

    def _lora_bytes(self) -> int | None:
        if self.space.view != "update":
            return None
        total = 0
        for part in self._parts:
            if isinstance(part, LayerPart):
                rank = self.space.largest_ranks[part.layer]
                itemsize = next(iter(part.chain.store.stacks.values())).element_size()
                total += rank * sum(self.space.layers[part.layer].layer.shape) * itemsize
        return total
