"""Tiny real models of diffusers with adapters of peft, and the LoRA files that trainers make of them: no download, no training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn


@contextmanager
def quiet() -> Iterator[None]:
    """What diffusers, transformers and peft say to each other is nothing of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


with quiet():
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.training_utils import _collate_lora_metadata
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

TOLERANCE = 1e-5
"""Of values of the order of one, computed in float32: what a rebuilt LoRA's answer may differ by."""

NAMES = ("unet", "text_encoder", "text_encoder_2")
TARGETS = {
    "unet": ["to_q", "to_out.0", "proj_in", "conv1", "conv", "conv_in", "conv_out", "time_embedding.linear_1"],
    "text_encoder": ["q_proj", "out_proj", "fc1"],
    "text_encoder_2": ["v_proj", "out_proj", "fc2"],
}
ALL_OF_UNET = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv"),
    *("time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
    *("add_embedding.linear_1", "add_embedding.linear_2"),
]
"""`add_embedding` is read by diffusers under SGM's name, and not under kohya's flattened one."""

OUTPUT = "pytorch_lora_weights.safetensors"

_TEXT = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "projection_dim": 12,
    "initializer_range": 0.3,
}


@cache
def _states() -> dict[str, dict[str, Tensor]]:
    return {name: _build(name).state_dict() for name in NAMES}


def _build(name: str) -> nn.Module:
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(NAMES.index(name))
        if name == "unet":
            return UNet2DConditionModel(
                sample_size=8,
                layers_per_block=2,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(1, 2),
                transformer_layers_per_block=(1, 1),
                cross_attention_dim=12,
                norm_num_groups=4,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=36,
            ).eval()
        kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
        return kind(CLIPTextConfig(**_TEXT)).eval()


def make(name: str) -> nn.Module:
    """A component of a tiny SDXL, always of the same weights."""
    model = _build(name)
    model.load_state_dict(_states()[name])
    return model


def make_all(names: tuple[str, ...] = NAMES) -> dict[str, nn.Module]:
    return {name: make(name) for name in names}


def answers(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What each component answers to a fixed input."""
    draw = torch.Generator().manual_seed(7)
    sample, text, pooled = (torch.randn(shape, generator=draw) for shape in ((2, 4, 8, 8), (2, 5, 12), (2, 12)))
    tokens = torch.tensor([[0, 5, 9, 17, 1], [0, 30, 2, 8, 1]])
    found = {}
    with torch.no_grad(), quiet():
        for name, model in models.items():
            if name == "unet":
                conditions = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)}
                found[name] = model(sample, torch.tensor([3, 500]), text, added_cond_kwargs=conditions).sample
            else:
                found[name] = model(tokens).last_hidden_state
    return found


def add_lora(
    models: Mapping[str, nn.Module], seed: int, *, rank: int = 3, alpha: float = 6, **settings: Any
) -> Mapping[str, nn.Module]:
    """Add adapters of random factors to the components; settings are of the UNet's config."""
    draw = torch.Generator().manual_seed(seed)
    for name, model in models.items():
        own = {"r": rank, "lora_alpha": alpha, "target_modules": TARGETS[name], **(settings if name == "unet" else {})}
        with torch.random.fork_rng(), quiet(), torch.no_grad():
            model.add_adapter(LoraConfig(**own))
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return models


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's factors by peft's names, `….lora_A.weight`."""
    with quiet():
        return {key: value.detach().contiguous() for key, value in get_peft_model_state_dict(model).items()}


def save_by_diffusers(models: Mapping[str, nn.Module], folder: Path, *, metadata: bool = True) -> Path:
    """Save as a trainer of diffusers does; without metadata as before 0.34."""
    with quiet():
        layers = {f"{name}_lora_layers": state_of(model) for name, model in models.items()}
        described = _collate_lora_metadata(dict(models)) if metadata else {}
        StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **described)
    return folder / OUTPUT


def kohya_tensors(
    models: Mapping[str, nn.Module], *, sgm: bool = False, alpha: Mapping[str, float] | float | None = 6
) -> dict[str, Tensor]:
    """The adapters by kohya's keys; `alpha` for all layers, or by the key's beginning; None writes none."""
    tensors = {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}
    for component, model in models.items():
        for key, value in state_of(model).items():
            name, _, side = key.partition(".lora_")
            if component == "unet" and sgm:
                name = to_sgm(name)
            stem = prefixes[component] + name.replace(".", "_")
            tensors[f"{stem}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = value
            own = alpha.get(stem) if isinstance(alpha, Mapping) else alpha
            if own is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(float(own))
    return tensors


def save_kohya(tensors: Mapping[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata={"ss_network_module": "networks.lora", "sshs_model_hash": "0" * 64})
    return path


def to_sgm(name: str) -> str:
    """The place of a diffusers layer in SGM's numbering, written down from SGM's constructor for two resolutions."""
    outside = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    places = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.resnets.1": "input_blocks.2.0",
        "down_blocks.0.downsamplers.0": "input_blocks.3.0",
        "down_blocks.1.resnets.0": "input_blocks.4.0",
        "down_blocks.1.attentions.0": "input_blocks.4.1",
        "down_blocks.1.resnets.1": "input_blocks.5.0",
        "down_blocks.1.attentions.1": "input_blocks.5.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        **{f"up_blocks.0.resnets.{number}": f"output_blocks.{number}.0" for number in range(3)},
        **{f"up_blocks.0.attentions.{number}": f"output_blocks.{number}.1" for number in range(3)},
        "up_blocks.0.upsamplers.0": "output_blocks.2.2",
        **{f"up_blocks.1.resnets.{number}": f"output_blocks.{3 + number}.0" for number in range(3)},
    }
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    inner |= {"conv_shortcut": "skip_connection"}
    if name in outside:
        return outside[name]
    place = next(place for place in places if name.startswith(f"{place}."))
    rest = name.removeprefix(f"{place}.")
    rest = "op" if "downsamplers" in place else inner.get(rest, rest)
    return f"{places[place]}.{rest}"


def load_by_diffusers(path: Path, names: tuple[str, ...] = NAMES) -> dict[str, nn.Module]:
    """Load a file into fresh components by diffusers' own loader, whatever its keys; every factor must find its place."""
    models = make_all(names)
    loader = StableDiffusionXLPipeline
    with quiet():
        state, alphas, metadata = loader.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            unet_config=_unet_config(),
            return_lora_metadata=True,
        )
        for name, model in models.items():
            options: dict[str, Any] = {"network_alphas": alphas, "metadata": metadata}
            if name == "unet":
                loader.load_lora_into_unet(state, unet=model, **options)
            else:
                loader.load_lora_into_text_encoder(state, text_encoder=model, prefix=name, **options)
    return models


@cache
def _unet_config() -> Any:
    return make("unet").config


def deltas(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every ΔW by peft's own arithmetic, by component and module."""
    found = {}
    for component, model in models.items():
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                (adapter,) = module.active_adapters
                found[f"{component}.{name}"] = module.get_delta_weight(adapter).detach()
    return found
