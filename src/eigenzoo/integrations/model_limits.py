"""Limit the size of models built from a config. Its numbers are not trusted, and all layers are built before any is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from eigenzoo.errors import FormatError
from eigenzoo.formats.model import Model
from eigenzoo.formats.side_files import CONFIG

# Loading registers a tensor again. Heads, positions and masks are not in the files.
_TIMES = 8
_MORE_TENSORS, _MORE_VALUES = 2_000, 2**26

MOST_COUNTED = 2**18
"""Largest number of layers, labels or heads in a config. transformers makes lists of some of them while it reads it."""

_COUNTS = re.compile(r"layers?$|experts$|blocks$|depth|heads?$|labels$|^attention_types$")


def check_counts(config: Mapping[str, Any], most: int, folder: Path) -> None:
    """Raise FormatError for a config with more than `most` modules, or more labels than any model has."""
    left: list[tuple[str, object]] = list(config.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict) and key not in ("label2id", "id2label"):
            left += [(str(inner), entry) for inner, entry in value.items()]
        elif isinstance(value, list | tuple):
            left += [(key, entry) for entry in value]
        elif type(value) is int and _COUNTS.search(key):
            limit = MOST_COUNTED if key.endswith("labels") else most
            if value > limit:
                shown = value if value < 10**30 else "a huge integer"
                raise FormatError(
                    f"{key[:60]} is {shown}",
                    where=f"{folder}/{CONFIG}",
                    rule=f"these files allow at most {limit}",
                )


@contextmanager
def no_larger_than(model: Model, folder: Path) -> Iterator[None]:
    """Raise FormatError as soon as modules have many times the tensors or values of the files."""
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
                rule=f"the files have {len(model.tensors)} tensors of {num_values} values",
            )

    hooks = (register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
