"""Writing an adapter like another one: its format, keys and configs, with new updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.formats.bundle.contents import Template
from eigenzoo.formats.layout import ModelLayout
from eigenzoo.formats.lora.diffusion_names import FAMILIES, renamed
from eigenzoo.formats.lora.diffusion_writer import diffusion_contents, write_diffusion_lora, written_scale
from eigenzoo.formats.lora.mlx_writer import MLX_FORMAT, write_mlx_adapter
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.writers import cast_to, lora_contents, write_lora

OTHER_FORMATS = {"diffusion-lora": FAMILIES, "lora": (MLX_FORMAT,)}
"""Other formats that an adapter can be written in, by its own format."""


def other_tensors(template: Template) -> list[str]:
    """Names of the adapter's tensors that belong to no update: heads, biases."""
    used = {key for update in template.layout.updates.values() for key in update.keys}
    left = [name for name in template.layout.tensors if name not in template.carried]
    return [name for name in (*template.carried, *left) if name not in used]


def write_adapter(
    folder: Path,
    template: Template,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    others: Mapping[str, Tensor],
    format: str | None = None,
    *,
    own_ranks: bool = False,
) -> None:
    """Write an adapter like the template's.

    Args:
        folder: an existing folder.
        template: gives the format, keys, dtypes, configs and side files.
        factors: per module B (outputs, rank) with the scale in it, and A (rank, inputs).
        others: the tensors of `other_tensors`, by name.
        format: one of `OTHER_FORMATS` instead of the template's own.
        own_ranks: whether a PEFT adapter gives each module its own rank, or pads all to the largest. LoRAs of diffusion models
            always have own ranks, adapters of mlx-lm never.
    """
    layout, metadata = template.layout, next(iter(template.metadata.values()), None)
    side_files = {name: template.read_side_file(name) for name in template.side_files}
    if layout.format == "diffusion-lora":
        if format is not None:
            ranks = {module: a_RI.shape[0] for module, (_, a_RI) in factors.items()}
            layout, metadata = renamed(layout, format, ranks, metadata or {})
        write_diffusion_lora(folder, layout, factors, others=others, metadata=metadata, side_files=side_files)
    elif format is not None:
        write_mlx_adapter(folder, layout, dict(template.config or {}), factors, others)
    else:
        write_lora(
            folder,
            layout,
            dict(template.config or {}),
            factors,
            others=others,
            metadata=metadata,
            side_files=side_files,
            own_ranks=own_ranks,
        )


def adapter_bytes(
    template: Template, ranks: Mapping[str, int], others: Mapping[str, Tensor], *, own_ranks: bool = False
) -> int:
    """Return how long the weights file of `write_adapter` is for updates of these ranks. No value is needed."""
    layout, metadata = template.layout, next(iter(template.metadata.values()), None)
    factors = {}
    for module, rank in ranks.items():
        outputs, inputs = layout.updates[module].shape
        factors[module] = torch.empty(outputs, rank, device="meta"), torch.empty(rank, inputs, device="meta")
    if layout.format == "diffusion-lora":
        return diffusion_contents(layout, factors, others=others, metadata=metadata).nbytes
    config = dict(template.config or {})
    return lora_contents(layout, config, factors, others=others, metadata=metadata, own_ranks=own_ranks).nbytes


def as_written(layout: ModelLayout, module: str, b_OR: Tensor, a_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors as a reader of the file gets them, rounded to its dtypes and with the scale in B. Writing them loses nothing.

    A LoRA of a diffusion model holds B without the scale that its α gives: float64 then. Raises DataError for an overflow.
    """
    update, tensors = layout.updates[module], layout.tensors
    rank = a_RI.shape[0]
    like_b = replace(tensors[update.key_b], shape=tuple(b_OR.shape))
    a_RI = cast_to(replace(tensors[update.key_a], shape=tuple(a_RI.shape)), a_RI)
    if layout.format == "diffusion-lora" and update.key_alpha is not None:
        scale = written_scale(layout, update, rank)
        return cast_to(like_b, b_OR.double() / scale).double() * scale, a_RI
    return cast_to(like_b, b_OR), a_RI


def with_dtype(layout: ModelLayout, dtype: torch.dtype) -> ModelLayout:
    """Return a layout with another dtype for all factors; α, heads and biases stay as they are."""
    factors = {key for update in layout.updates.values() for key in (update.key_a, update.key_b)}
    files = {
        file: tuple(
            replace(tensor, dtype=dtype_name(dtype)) if tensor.name in factors else tensor for tensor in tensors
        )
        for file, tensors in layout.files.items()
    }
    return replace(layout, files=files)
