"""What an adapter file is to be compared with: the bytes of a LoRA of the same layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from eigenzoo.formats.safetensors.writer import header_bytes
from eigenzoo.subspace.bases.basis import LayerBasis

LORA_RANK = 8
_DIMENSIONS = (2, 4)
"""Of the weights that LoRA takes: linear layers, embeddings, convolutions. Biases and norms have no LoRA."""


def lora_bytes(layers: Mapping[str, LayerBasis], rank: int = LORA_RANK) -> int:
    """Return the bytes of a PEFT adapter file of this rank, in float32, of all layers that LoRA can take; its config apart."""
    entries = []
    for name, basis in layers.items():
        layer = basis.layer
        if layer.kind == "update" or len(layer.tensor_shape) in _DIMENSIONS:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            entries.append((f"{module}.lora_A.weight", torch.float32, (rank, layer.shape[1])))
            entries.append((f"{module}.lora_B.weight", torch.float32, (layer.shape[0], rank)))
    header = len(header_bytes(entries, {"format": "pt"}))
    return 8 + -(-header // 8) * 8 + sum(4 * shape[0] * shape[1] for _, _, shape in entries)
