"""Collections of LoRA adapters with the shapes of Mistral-7B's q, k and v, untrained, with a planted subspace."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, KV = 4096, 1024
MODULES = {"q_proj": HIDDEN, "k_proj": KV, "v_proj": KV}


def write_adapters(
    folder: Path, num_models: int, *, num_layers: int = 4, rank: int = 16, planted: int = 8, seed: int = 0
) -> None:
    """Write adapters whose factors lie near a few shared ones: A = mix of `planted` A's + noise, B likewise."""
    draw = torch.Generator().manual_seed(seed)
    shared = {
        (layer, module): (
            torch.randn(planted, rank, HIDDEN, generator=draw) / 64,
            torch.randn(planted, outputs, rank, generator=draw) / 64,
        )
        for layer in range(num_layers)
        for module, outputs in MODULES.items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(MODULES),
        "base_model_name_or_path": "synthetic",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    for model in range(num_models):
        tensors = {}
        for (layer, module), (a_KRI, b_KOR) in shared.items():
            mix = torch.randn(planted, generator=draw)
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            noise_a, noise_b = (torch.randn(part.shape[1:], generator=draw) / 64 for part in (a_KRI, b_KOR))
            tensors[f"{prefix}.lora_A.weight"] = torch.tensordot(mix, a_KRI, 1) + noise_a
            tensors[f"{prefix}.lora_B.weight"] = torch.tensordot(mix, b_KOR, 1) + noise_b
        home = folder / f"adapter-{model:04d}"
        home.mkdir(parents=True)
        save_file(tensors, home / "adapter_model.safetensors", metadata={"format": "pt"})
        (home / "adapter_config.json").write_text(json.dumps(config))
