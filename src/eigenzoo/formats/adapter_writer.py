"""Writing an adapter like another one: its format, keys and configs, with new updates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from eigenzoo.formats.bundle.contents import Template
from eigenzoo.formats.lora.diffusion_names import FAMILIES, renamed
from eigenzoo.formats.lora.diffusion_writer import write_diffusion_lora
from eigenzoo.formats.lora.mlx_writer import MLX_FORMAT, write_mlx_adapter
from eigenzoo.formats.writers import write_lora

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
) -> None:
    """Write an adapter like the template's.

    Args:
        folder: an existing folder.
        template: gives the format, keys, dtypes, configs and side files.
        factors: per module B (outputs, rank) with the scale in it, and A (rank, inputs).
        others: the tensors of `other_tensors`, by name.
        format: one of `OTHER_FORMATS` instead of the template's own.
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
        config = dict(template.config or {})
        write_lora(folder, layout, config, factors, others=others, metadata=metadata, side_files=side_files)
