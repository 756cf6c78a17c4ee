"""The LoRA adapter that is checked against a base: on disk, or rebuilt from a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from eigenzoo.formats.model import LoraUpdate, Model
from eigenzoo.linalg.lora import Factors


@dataclass(frozen=True)
class Adapter:
    """What is checked of an adapter: one on disk, or one that a bundle rebuilds.

    Attributes:
        name: what to call it.
        config: PEFT's; None where the format has none.
        updates: by module, with the scale that is not yet in B.
        shapes: of every tensor of its file.
        factors: gives B (outputs, rank) and A (rank, inputs) of a module, as they are stored.
        dtypes: of these tensors, as far as they are known.
    """

    name: str
    config: Mapping[str, Any] | None
    updates: Mapping[str, LoraUpdate]
    shapes: Mapping[str, tuple[int, ...]]
    factors: Callable[[str], Factors]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


def adapter_of(model: Model) -> Adapter:
    """Take an adapter on disk."""
    shapes = {name: info.shape for name, info in model.tensors.items()}
    dtypes = {name: info.dtype for name, info in model.tensors.items()}
    return Adapter(model.name, getattr(model, "config", None), model.updates, shapes, model.read_factors, dtypes)
