"""Tensors that come unchanged with a rebuilt model, as no layer holds them."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from eigenzoo.formats.model import LoraUpdate, Model


def carried_values(model: Model, name: str) -> Tensor:
    """Read a tensor that a bundle carries; the B of a LoRA update, and a bias on it, come with its scale, since a rebuilt adapter
    has scale 1."""
    values = model.read(name)
    scale = _scales(model).get(name, 1.0)
    return values if scale == 1.0 else (values.double() * scale).to(torch.promote_types(values.dtype, torch.float32))


_cached_scales: WeakKeyDictionary[Model, tuple[Mapping[str, LoraUpdate], dict[str, float]]] = WeakKeyDictionary()


def _scales(model: Model) -> dict[str, float]:
    """Return the scales of a model's updates by the tensors that take them; found once for all tensors of a model."""
    updates = model.updates
    cached = _cached_scales.get(model)
    if cached is None or cached[0] is not updates:
        scales = {}
        for update in updates.values():
            scales[update.key_b] = scales[f"{update.key_b.removesuffix('weight')}bias"] = update.scale
        cached = _cached_scales[model] = updates, scales
    return cached[1]
