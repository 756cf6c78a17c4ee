"""Make an adapter's tensors without values, and find the modules into which another library loads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eigenzoo.errors import FormatError
from eigenzoo.formats.lora.peft_folder import PREFIX
from eigenzoo.zoo.adapter import Adapter

_ALIKE = ("_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")


class Origins(TorchFunctionMode):
    """A context that tracks tensors through renaming, splitting, joining and scaling.

    A tensor is identified by its storage. So views, parameters made of it and the same tensor under another name are tracked too,
    also on the meta device. Functions that use only a shape (`zeros_like`) make new tensors without an origin. Questions about
    missing values (diffusers asks for Flux whether blocks are zero) are answered with no.

    Args:
        tensors: the original tensors by name.

    Cost: one look-up for each argument of each call of torch. Tracked storages stay alive until the end.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names: dict[int, frozenset[str]] = {}
        # The address of a freed storage could be used again.
        self._alive: list[Any] = []
        for name, tensor in tensors.items():
            self._add(tensor, frozenset({name}))

    def of(self, tensor: Tensor) -> frozenset[str]:
        """Return the names of the original tensors of which this one is made."""
        return self._names.get(tensor.untyped_storage()._cdata, frozenset())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__bool__", "item") and args[0].is_meta:
            return False
        result = func(*args, **(kwargs or {}))
        if name.endswith(_ALIKE):
            return result
        names: frozenset[str] = frozenset().union(*(self.of(tensor) for tensor in _tensors([args, kwargs or {}])))
        if names:
            # A tensor contains what is written into a part of it.
            changed = args[:1] if name == "__setitem__" else result
            for tensor in _tensors([changed]):
                self._add(tensor, names)
        return result

    def _add(self, tensor: Tensor, names: frozenset[str]) -> None:
        storage = tensor.untyped_storage()  # also for a meta tensor, whose values have no address
        self._alive.append(storage)
        self._names[storage._cdata] = self._names.get(storage._cdata, frozenset()) | names


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def without_values(adapter: Adapter) -> dict[str, Tensor]:
    """Make an adapter's tensors with shapes and dtypes only. Scalars are ones, since libraries read them."""
    found = {}
    for name, shape in adapter.shapes.items():
        dtype, is_number = adapter.dtypes.get(name, torch.float32), all(size == 1 for size in shape)
        found[name] = torch.ones(shape, dtype=dtype) if is_number else torch.empty(shape, dtype=dtype, device="meta")
    return found


def refuse_undecided(error: FormatError) -> None:
    """Raise again a library's error that is due to this way of loading: without values, or without another library."""
    cause = error.__cause__
    if isinstance(cause, ImportError | NotImplementedError) or "meta" in str(cause):
        raise error


def places_of(
    origins: Origins, parameters: Iterable[tuple[str, Tensor]], before: str = ""
) -> dict[str, tuple[str, ...]]:
    """Return for each tensor of an adapter the modules that receive it, by their names in the base. `before` is their prefix."""
    places: dict[str, dict[str, None]] = {}
    for name, parameter in parameters:
        module = before + name.removeprefix(PREFIX).partition(".lora_")[0].partition(".modules_to_save.")[0]
        for tensor in origins.of(parameter):
            places.setdefault(tensor, {})[module] = None
    return {tensor: tuple(modules) for tensor, modules in places.items()}


def dropped_of(adapter: Adapter, places: Mapping[str, object]) -> tuple[str, ...]:
    """Return the tensors of an adapter that no module receives. An α counts as received with its factors."""
    of_alpha = {update.key_alpha: update.key_a for update in adapter.updates.values() if update.key_alpha}
    return tuple(name for name in adapter.shapes if of_alpha.get(name, name) not in places)
