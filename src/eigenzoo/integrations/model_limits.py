"""A bound on what a config may have built: its numbers are a stranger's, and a billion layers are built before any is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from eigenzoo.errors import FormatError
from eigenzoo.formats.model import Model

# Loading registers a tensor again; heads, positions and masks are in no file.
_TIMES = 8
_MORE_TENSORS, _MORE_VALUES = 2_000, 2**26


@contextmanager
def no_larger_than(model: Model, folder: Path) -> Iterator[None]:
    """Raise FormatError as soon as modules are made with many times the tensors or values that the files hold."""
    num_values = sum(info.nbytes // info.dtype.itemsize for info in model.tensors.values())
    most_tensors, most_values = _TIMES * len(model.tensors) + _MORE_TENSORS, _TIMES * num_values + _MORE_VALUES
    tensors = values = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, values
        tensors += 1
        values += 0 if tensor is None else tensor.numel()
        if tensors > most_tensors or values > most_values:
            raise FormatError(
                "its config describes a model many times larger than its weights",
                where=str(folder),
                rule=f"the files hold {len(model.tensors)} tensors of {num_values} values",
            )

    hooks = (register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
