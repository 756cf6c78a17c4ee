"""Writing a LoRA adapter as mlx-lm holds it: `adapters.safetensors` and mlx-lm's `adapter_config.json`.

mlx-lm makes a LoRA layer of every module that `lora_parameters.keys` names, all of one rank, before it loads the factors. Keys are
whole names here, which it finds wherever a module lies (`mlx_lm.tuner.utils.linear_to_lora_layers`, 0.32).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from eigenzoo.errors import UnsupportedError, UsageError
from eigenzoo.formats.layout import ModelLayout, TensorLayout
from eigenzoo.formats.lora.config import CONFIG_FILE, KEEP_FORMAT
from eigenzoo.formats.lora.mlx_folder import MLX_FILE
from eigenzoo.formats.writers import write_bytes, write_tensors

MLX_FORMAT = "mlx-lm"


def write_mlx_adapter(
    folder: Path,
    layout: ModelLayout,
    config: Mapping[str, Any],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    others: Mapping[str, Tensor],
) -> None:
    """Write an adapter whose updates are B·A, with scale 1 and one rank, the others padded with zeros.

    Args:
        folder: an existing folder.
        layout: of the PEFT adapter that this one is like; gives the dtypes.
        config: that adapter's `adapter_config.json`; only the base's name is taken.
        factors: per module of the layout B (outputs, rank) with the scale in it, and A (rank, inputs), any rank.
        others: the tensors that are no factor: mlx-lm has no place for them, and any is an error.
    """
    if set(factors) != set(layout.updates):
        raise UsageError("factors are missing or extra", rule="each module of the layout needs one pair of factors")
    if others:
        raise UnsupportedError(
            f"{len(others)} tensors are not LoRA factors, such as {next(iter(others))[:100]!r}",
            rule="an adapter of mlx-lm holds only factors",
            next_step=KEEP_FORMAT,
        )
    rank = max([1, *(a_RI.shape[0] for _, a_RI in factors.values())])
    values: dict[str, Tensor] = {}
    tensors: list[TensorLayout] = []
    for module, (b_OR, a_RI) in factors.items():
        update = layout.updates[module]
        if any(len(shape) > 2 for shape in update.factor_shapes):
            raise UnsupportedError(
                "is a convolution",
                where=f"module {module[:200]!r}",
                rule="mlx-lm supports LoRA only on linear layers and embeddings",
                next_step=KEEP_FORMAT,
            )
        for key, like, factor in ((f"{module}.lora_a", update.key_a, a_RI), (f"{module}.lora_b", update.key_b, b_OR.T)):
            padded = pad(factor, (0, 0, 0, rank - factor.shape[0]))
            values[key] = (padded.T if like == update.key_a else padded).contiguous()
            tensors.append(TensorLayout(key, layout.tensors[like].dtype, tuple(values[key].shape)))
    write_tensors(folder / MLX_FILE, tensors, values.__getitem__, {"format": "mlx"})
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(factors)}
    written = {
        "model": config.get("base_model_name_or_path"),
        "fine_tune_type": "lora",
        "num_layers": 0,
        "lora_parameters": parameters,
    }
    write_bytes(folder / CONFIG_FILE, json.dumps(written, indent=2, sort_keys=True).encode("utf-8"))
