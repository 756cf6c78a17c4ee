"""Tiny Wan and Flux transformers of diffusers, and LoRAs of them by the names that tools write, all of the same update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HIDDEN, RANK, ALPHA = 24, 3, 6.0
"""Rank 3, so that diffusers asks whether the parts of Flux's joined projections are separate."""


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call diffusers without what it says and warns."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*args, **kwargs)
    finally:
        diffusers.utils.logging.set_verbosity(level)


def make(family: str) -> nn.Module:
    """A transformer of a family, the same at each call."""
    torch.manual_seed(0)
    if family == "wan":
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=8,
            ffn_dim=16,
            num_layers=2,
            patch_size=(1, 2, 2),
            rope_max_seq_len=32,
        ).eval()
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 4),
    ).eval()


@torch.no_grad()
def answer(family: str, model: nn.Module) -> Tensor:
    """What a transformer answers to one fixed input."""
    draw = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    if family == "wan":
        return model(noise(1, 4, 1, 4, 4), torch.tensor([3]), noise(1, 3, 8)).sample
    return model(
        hidden_states=noise(1, 4, 4),
        encoder_hidden_states=noise(1, 3, 8),
        pooled_projections=noise(1, 8),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample


def _wan_layers() -> dict[str, tuple[str, ...]]:
    inside = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        inside |= {f"{old}.{name}": f"{new}.to_{name}" for name in "qkv"} | {f"{old}.o": f"{new}.to_out.0"}
    return {f"blocks.{block}.{old}": (f"blocks.{block}.{new}",) for block in range(2) for old, new in inside.items()}


def _flux_layers() -> dict[str, tuple[str, ...]]:
    inside = {
        "img_attn.proj": ("attn.to_out.0",),
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "txt_mod.lin": ("norm1_context.linear",),
    }
    return {
        f"double_blocks.{block}.{old}": tuple(f"transformer_blocks.{block}.{name}" for name in new)
        for block in range(2)
        for old, new in inside.items()
    }


LAYERS: dict[str, Mapping[str, tuple[str, ...]]] = {"wan": _wan_layers(), "flux": _flux_layers()}
"""Layers of the original checkpoints, and what diffusers calls each, or the parts that it cuts it into."""


@dataclass(frozen=True)
class Update:
    """s·B·A of one layer of the original checkpoint."""

    down_RI: Tensor
    up_OR: Tensor


def updates(family: str, size: float = 0.3) -> dict[str, Update]:
    draw, modules, found = torch.Generator().manual_seed(2), dict(make(family).named_modules()), {}
    for name, parts in LAYERS[family].items():
        weights = [modules[part].weight for part in parts]
        down = torch.randn(RANK, weights[0].shape[1], generator=draw)
        up = torch.randn(sum(weight.shape[0] for weight in weights), RANK, generator=draw)
        found[name] = Update(size * down, size * up)
    return found


@torch.no_grad()
def merged(family: str) -> nn.Module:
    """The transformer with the whole update in its weights, by plain arithmetic: what every tool means."""
    model = make(family)
    modules = dict(model.named_modules())
    for name, update in updates(family).items():
        dense, start = ALPHA / RANK * update.up_OR @ update.down_RI, 0
        for part in LAYERS[family][name]:
            rows = modules[part].weight.shape[0]
            modules[part].weight += dense[start : start + rows]
            start += rows
    return model


def tensors_by(tool: str, family: str) -> dict[str, Tensor]:
    """The file of a tool; those that write no α have the scale in B."""
    found = {}
    for name, update in updates(family).items():
        down, up, scaled = update.down_RI, update.up_OR, ALPHA / RANK * update.up_OR
        if tool == "kohya":
            stem = f"lora_unet_{name.replace('.', '_')}"
            found |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(ALPHA),
            }
        elif tool == "comfyui":
            stem = f"diffusion_model.{name}"
            found |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": scaled}
        elif tool == "comfyui, with α":
            stem = f"diffusion_model.{name}"
            found |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(ALPHA),
            }
        elif tool == "diffsynth":
            found |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": scaled}
        elif tool == "original names alone":
            found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": scaled}
        else:
            before = {"diffusers": "transformer.", "of the component alone": "", "of a unet": "unet."}[tool]
            start = 0
            for part in LAYERS[family][name]:
                rows = up.shape[0] // len(LAYERS[family][name])
                found[f"{before}{part}.lora_A.weight"] = down.clone()
                found[f"{before}{part}.lora_B.weight"] = scaled[start : start + rows].contiguous()
                start += rows
    return found


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, {"format": "pt"})
    return path


PIPELINES = {"wan": "WanPipeline", "flux": "FluxPipeline"}
ABSENT = {
    "wan": ("tokenizer", "text_encoder", "vae", "scheduler"),
    "flux": ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
}


def loaded(family: str, path: Path, *, by_component: bool = False) -> Tensor:
    """What the real diffusers makes of a file: the transformer's answer with it. Raises what diffusers raises."""
    model = make(family)
    if by_component:
        quietly(model.load_lora_adapter, str(path.parent), weight_name=path.name, prefix=None)
    else:
        kind = getattr(diffusers, PIPELINES[family])
        pipeline = quietly(kind, **dict.fromkeys(ABSENT[family]), transformer=model)
        quietly(pipeline.load_lora_weights, str(path.parent), weight_name=path.name)
    return answer(family, model)
