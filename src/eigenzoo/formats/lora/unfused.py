"""LoRAs of Flux whose q, k and v are one fused layer, seen as the layers that diffusers has: B by rows, A the same for all parts.

Needed only beside files that name the parts: ΔW of a part is the fused ΔW's rows, s·B[rows]·A, exactly. A view is another
dictionary of names and places over the same file; all of its names are diffusers', and so is what is written of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from weakref import WeakKeyDictionary

from eigenzoo.errors import UnsupportedError
from eigenzoo.formats.lora.diffusion_file import METADATA_KEY, DiffusionLora, ParsedUpdates
from eigenzoo.formats.lora.diffusion_names import diffusers_stem
from eigenzoo.formats.model import LoraUpdate, Model, TensorInfo
from eigenzoo.formats.safetensors.header import HeaderContents

_FUSED = re.compile(
    r"(?P<block>transformer(_2)?\.(single_)?transformer_blocks\.\d+)\.(?P<name>attn_to_qkv|attn_to_added_qkv|attn_to_qkv_mlp)"
)
_PARTS = {
    "attn_to_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
    "attn_to_added_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"),
    "attn_to_qkv_mlp": ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"),
}


def parts_of(update: LoraUpdate) -> tuple[tuple[str, int], ...]:
    """Return the layers that a fused update's rows are, and how many rows each has; nothing for any other update.

    q, k and v have as many outputs as the layer has inputs, as in every published Flux.
    """
    match = _FUSED.fullmatch(update.module)
    if match is None:
        return ()
    names = _PARTS[match["name"]]
    outputs, inputs = update.shape
    rows = [inputs] * 3 + [outputs - 3 * inputs] * (len(names) - 3)
    if sum(rows) != outputs or min(rows) < 1:
        return ()
    return tuple((f"{match['block']}.{name}", count) for name, count in zip(names, rows, strict=True))


def unfuse(models: Sequence[Model], named: frozenset[str] = frozenset()) -> tuple[list[Model], frozenset[str]]:
    """Return the models with fused layers seen as their parts, where another model or `named` has a part by its own name.

    Gives these parts too: named again, they make the same of each model alone.
    """
    fused: dict[int, set[str]] = {}
    plain = set(named)
    for index, model in enumerate(models):
        if isinstance(model, DiffusionLora):
            own = {name for update in model.updates.values() for name, _ in parts_of(update)}
            if own:
                fused[index] = own
            else:
                plain |= model.updates.keys()
    wanted = {index for index, own in fused.items() if not plain.isdisjoint(own)}
    parts = frozenset(name for index in wanted for name in fused[index])
    seen = [
        _unfused(model) if index in wanted and isinstance(model, DiffusionLora) else model
        for index, model in enumerate(models)
    ]
    return seen, parts


_views: WeakKeyDictionary[ParsedUpdates, ParsedUpdates] = WeakKeyDictionary()


def _unfused(model: DiffusionLora) -> DiffusionLora:
    parsed = model.parsed
    view = _views.get(parsed)
    if view is None:
        try:
            view = _views[parsed] = _view(parsed)
        except UnsupportedError as error:
            raise UnsupportedError(
                "q, k and v are one layer in this file, but three layers in other files of the zoo",
                where=str(model.path),
                rule=f"the layer is split only if diffusers has a name for each layer of the file ({error.where})",
                next_step="convert it with diffusers: state = FluxPipeline.lora_state_dict(file); "
                "save_file({key: values.clone() for key, values in state.items()}, new_file)",
            ) from error
    ((name, file),) = model.files.items()
    seen = copy.copy(model)
    seen.take_files({name: file.seen_as(view.contents)})
    strings = {key: text for key, text in model.metadata[name].items() if key != METADATA_KEY}
    seen.metadata = MappingProxyType({name: strings})
    seen.take_updates(view)
    return seen


def _view(parsed: ParsedUpdates) -> ParsedUpdates:
    """Make the other dictionary of a header: every factor by diffusers' names, α left to the updates' scales."""
    contents = parsed.contents
    tensors: dict[str, TensorInfo] = {}
    positions: dict[str, tuple[int, int]] = {}
    updates: dict[str, LoraUpdate] = {}
    for update in parsed.updates.values():
        start, outputs = 0, update.shape[0]
        for module, rows in parts_of(update) or ((update.module, outputs),):
            if module in updates or (module != update.module and module in parsed.updates):
                raise UnsupportedError("the file has it both fused and split", where=f"module {module[:200]!r}")
            stem = diffusers_stem(module)
            key_a, key_b = (f"{stem}.lora_{side}.weight" for side in "AB")
            shape_a, shape_b = update.factor_shapes
            tensors[key_a] = replace(contents.tensors[update.key_a], name=key_a)
            positions[key_a] = contents.positions[update.key_a]
            info = contents.tensors[update.key_b]
            tensors[key_b] = replace(info, name=key_b, shape=(rows, *shape_b[1:]))
            size = prod(shape_b[1:])
            positions[key_b] = contents.positions[update.key_b][0] + start * size * info.dtype.itemsize, rows * size
            updates[module] = replace(
                update,
                module=module,
                key_a=key_a,
                key_b=key_b,
                shape=(rows, update.shape[1]),
                factor_shapes=(shape_a, (rows, *shape_b[1:])),
                key_alpha=None,
            )
            start += rows
    used = {key for update in parsed.updates.values() for key in update.keys}
    for name, info in contents.tensors.items():
        if name not in used:
            tensors[name], positions[name] = info, contents.positions[name]
    seen = HeaderContents(MappingProxyType(tensors), MappingProxyType(positions), contents.metadata, made_of=contents)
    return ParsedUpdates(MappingProxyType(updates), seen, parsed.warnings)
