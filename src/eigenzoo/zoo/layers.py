"""The layers of one model under a view: their names, shapes and source tensors."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from eigenzoo.errors import UnsupportedError, UsageError
from eigenzoo.formats.checkpoint import SafetensorsModel
from eigenzoo.formats.lora.config import AS_FLOATS
from eigenzoo.formats.model import Model
from eigenzoo.records import Layer
from eigenzoo.weights.unfolding import unfolded_shape, unfolding

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that are weights; wider first. Integers, booleans and 8-bit floats pass through unread."""


@dataclass(frozen=True)
class LayerSource:
    """Where a layer of one model is read: `key` is a tensor, or a module for an update; values are times `scale`."""

    layer: Layer
    key: str
    scale: float = 1.0


def default_view(model: Model, has_base: bool) -> str:
    """Return `update` for LoRA adapters, `delta` for checkpoints with a base, else `weight`."""
    if model.updates:
        return "update"
    return "delta" if has_base else "weight"


_sources_of: WeakKeyDictionary[object, dict[str, dict[str, LayerSource]]] = WeakKeyDictionary()


def layer_sources(model: Model, view: str) -> dict[str, LayerSource]:
    """Return what can be a layer in this model under a view, by layer name, in the order of the files.

    It is found once for all models that are the same but for their values, which have one dictionary; nobody may change it.
    """
    likeness = model.likeness if isinstance(model, SafetensorsModel) else None
    by_view = _sources_of.setdefault(model if likeness is None else likeness, {})
    if view not in by_view:
        by_view[view] = _find_sources(model, view)
    return by_view[view]


def _find_sources(model: Model, view: str) -> dict[str, LayerSource]:
    if view in ("update", "factors"):
        if not model.updates:
            raise UsageError(
                f"view {view!r} needs LoRA adapters, and this is a {model.format}",
                where=model.name,
                next_step="use view 'weight', or 'delta' with a base",
            )
        return _update_sources(model) if view == "update" else _factor_sources(model)
    if model.updates:
        raise UsageError(
            f"view {view!r} needs full weights, and this is a LoRA adapter",
            where=model.name,
            next_step="use view 'update' or 'factors'",
        )
    sources = {}
    for name, info in model.tensors.items():
        if info.dtype in FLOATS and 0 not in info.shape:
            sources[name] = LayerSource(_dense(name, info.shape, info.dtype), name)
    return sources


def _dense(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Layer:
    outputs, inputs = unfolded_shape(shape)
    num_bytes = outputs * inputs * dtype.itemsize
    return Layer(name, "dense", (outputs, inputs), shape, unfolding(shape), dtype_name(dtype), num_bytes)


def _update_sources(model: Model) -> dict[str, LayerSource]:
    sources = {}
    for module, update in model.updates.items():
        info_a, info_b = model.tensors[update.key_a], model.tensors[update.key_b]
        for info in (info_a, info_b):
            if info.dtype not in FLOATS:
                raise UnsupportedError(
                    f"a factor has dtype {dtype_name(info.dtype)}",
                    where=f"layer '{module}' of {model.name}",
                    rule=f"factors are {', '.join(map(dtype_name, FLOATS))}",
                    next_step=AS_FLOATS,
                )
        dtype = widest(info_a.dtype, info_b.dtype)
        num_bytes = info_a.nbytes + info_b.nbytes
        layer = Layer(module, "update", update.shape, update.shape, "matrix", dtype_name(dtype), num_bytes)
        sources[module] = LayerSource(layer, module, update.scale)
    return sources


def _factor_sources(model: Model) -> dict[str, LayerSource]:
    """Return A and s·B as two layers. The scale is in B, so that A is the same as in the paper."""
    sources = {}
    for module, update in model.updates.items():
        for factor, key, scale in (("lora_A", update.key_a, 1.0), ("lora_B", update.key_b, update.scale)):
            info = model.tensors[key]
            name = f"{module}.{factor}"
            sources[name] = LayerSource(_dense(name, info.shape, info.dtype), key, scale)
    return sources


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that holds all of these."""
    widest_dtype = dtypes[0]
    for dtype in dtypes[1:]:
        widest_dtype = torch.promote_types(widest_dtype, dtype)
    return widest_dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without its prefix.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
