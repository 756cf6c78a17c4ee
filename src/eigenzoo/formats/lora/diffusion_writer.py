"""Writing a LoRA of a diffusion model with the keys that it came with, and its scale where it was said.

Every layer has its own rank. Where the file has a tensor of α, α stays what it was, since some programs read one α for a
whole file, and B is divided by α / rank; α = 0 leaves no room for an update and becomes α = rank. Where the header has
configs, they say α = rank.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenzoo.errors import FormatError, UsageError
from eigenzoo.formats.layout import ModelLayout, TensorLayout
from eigenzoo.formats.lora.config import merged_config
from eigenzoo.formats.lora.diffusion_file import ALPHA_DTYPES, METADATA_KEY, component_configs
from eigenzoo.formats.lora.diffusion_keys import FactorKey, split_key
from eigenzoo.formats.model import LoraUpdate
from eigenzoo.formats.paths import relative_name
from eigenzoo.formats.writers import DEFAULT_METADATA, AdapterContents, write_side_files, write_tensors

HASHES = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
"""Entries of kohya's headers that are hashes of the values, which are others now."""


def write_diffusion_lora(
    folder: Path,
    layout: ModelLayout,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    others: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    side_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write one file whose updates are B·A.

    Args:
        folder: an existing folder.
        layout, factors, others, metadata: as in `diffusion_contents`.
        side_files: contents by name, of known names only.
    """
    contents = diffusion_contents(layout, factors, others=others, metadata=metadata)
    (file,) = layout.files
    write_tensors(folder / relative_name(file), contents.tensors, contents.values.__getitem__, contents.metadata)
    write_side_files(folder, side_files or {}, layout)


def diffusion_contents(
    layout: ModelLayout,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    others: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> AdapterContents:
    """Return the contents of a file whose updates are B·A.

    Args:
        layout: of the file that this one is like; gives the file's name, the keys, the kernels of convolutions, the dtypes and α.
        factors: per module of the layout B (outputs, rank) with the scale in it, and A (rank, inputs), any rank.
        others: the tensors that are no part of an update, by name.
        metadata: the header's strings; configs in it are made true of the new factors, hashes are left out.
    """
    if layout.format != "diffusion-lora":
        raise UsageError(
            f"the layout has format {layout.format!r}", rule="only a LoRA of a diffusion model can be written here"
        )
    if set(factors) != set(layout.updates):
        wrong = sorted(set(factors) ^ set(layout.updates))[:5]
        raise UsageError(
            f"missing or extra factors: {', '.join(wrong)}", rule="each module of the layout needs one pair of factors"
        )
    values = dict(others or {})
    for module, (b_OR, a_RI) in factors.items():
        values |= _tensors(layout, layout.updates[module], b_OR, a_RI)
    (listed,) = layout.files.values()
    missing = [tensor.name for tensor in listed if tensor.name not in values]
    if missing or len(values) != len(listed):
        raise UsageError(
            f"missing or extra tensors: {', '.join(missing[:5])}", rule="the layout's tensors are needed, and no others"
        )
    parts = {key for update in layout.updates.values() for key in update.keys}
    tensors = [
        replace(tensor, shape=tuple(values[tensor.name].shape)) if tensor.name in parts else tensor for tensor in listed
    ]
    ranks = {layout.updates[module].key_a: a_RI.shape[0] for module, (_, a_RI) in factors.items()}
    return AdapterContents(tensors, values, _metadata(metadata or DEFAULT_METADATA, ranks))


def written_scale(layout: ModelLayout, update: LoraUpdate, rank: int) -> float:
    """Return the scale that a reader multiplies B·A by, if the update is written with this rank."""
    if update.key_alpha is None:
        return 1.0
    return float(_alpha(update, layout.tensors[update.key_alpha], rank)) / rank


def _tensors(layout: ModelLayout, update: LoraUpdate, b_OR: Tensor, a_RI: Tensor) -> dict[str, Tensor]:
    """Give A, B and α of one layer in their shapes on disk."""
    outputs, inputs = update.shape
    rank = a_RI.shape[0]
    if tuple(a_RI.shape) != (rank, inputs) or tuple(b_OR.shape) != (outputs, rank) or rank < 1:
        raise FormatError(
            f"B has shape {tuple(b_OR.shape)} and A {tuple(a_RI.shape)}, but the update has shape {update.shape}",
            where=f"module {update.module!r}",
        )
    tensors = {}
    if update.key_alpha is not None:
        stated = layout.tensors[update.key_alpha]
        alpha = _alpha(update, stated, rank)
        b_OR = b_OR.double() * (rank / float(alpha))
        tensors[update.key_alpha] = alpha
    shape_a, shape_b = update.factor_shapes
    tensors[update.key_a] = a_RI.reshape(rank, *shape_a[1:])
    tensors[update.key_b] = b_OR.reshape(outputs, rank, *shape_b[2:])
    return tensors


def _alpha(update: LoraUpdate, stated: TensorLayout, rank: int) -> Tensor:
    """Give the α that was there, from the scale; the new rank where it was zero."""
    dtype = stated.torch_dtype
    if dtype not in ALPHA_DTYPES:
        raise FormatError(f"α has dtype {dtype}", where=f"tensor {stated.name!r}")
    value = update.scale * update.rank or float(rank)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if not limits.min <= value <= limits.max:
        raise FormatError(f"α = {value:.6g} does not fit into {dtype}", where=f"tensor {stated.name!r}")
    alpha = torch.tensor(value if dtype.is_floating_point else round(value), dtype=dtype).reshape(stated.shape)
    if float(alpha) == 0:
        raise FormatError(f"α = {value:.6g} rounds to zero in {dtype}", where=f"tensor {stated.name!r}")
    return alpha


def _metadata(metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, str]:
    """Give the header's strings for factors of these ranks, by the keys of A, whose scale is 1."""
    texts = {key: value for key, value in metadata.items() if key not in HASHES}
    if METADATA_KEY not in texts:
        return texts
    components: dict[str, dict[str, int]] = {}
    for key, rank in ranks.items():
        split = split_key(key)
        if split is not None:
            components.setdefault(split.component, {})[_pattern(split)] = rank
    configs, _ = component_configs(texts, set(components))
    document: dict[str, Any] = json.loads(texts[METADATA_KEY])
    for component, config in configs.items():
        component_ranks = components[component]
        rank = Counter(component_ranks.values()).most_common(1)[0][0]
        others = {name: other for name, other in component_ranks.items() if other != rank}
        written = {**merged_config(config, rank), "rank_pattern": others, "alpha_pattern": others}
        document |= {f"{component}.{key}" if component else key: value for key, value in written.items()}
    return {**texts, METADATA_KEY: json.dumps(document, indent=2, sort_keys=True)}


def _pattern(key: FactorKey) -> str:
    """Give the pattern that PEFT finds this module by, and no other: from its beginning, the level that CLIP may lack left open."""
    name = key.name.removeprefix("text_model.")
    return f"^(text_model.)?{name}" if name != key.name or key.component.startswith("text_encoder") else f"^{name}"
