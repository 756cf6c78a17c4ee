"""Every layer of the real networks, by names alone: SGM's of SDXL beside diffusers' conversion, and all dots given back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusion_adapters import StableDiffusionXLPipeline, UNet2DConditionModel, quiet
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from eigenzoo.formats.layout import ModelLayout, TensorLayout
from eigenzoo.formats.lora.diffusion_keys import split_key
from eigenzoo.formats.lora.diffusion_names import renamed
from eigenzoo.formats.model import LoraUpdate

SD15 = {
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
}
SDXL = {
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def unet(settings: dict) -> UNet2DConditionModel:
    with quiet(), torch.device("meta"):
        return UNet2DConditionModel(**settings)


def sgm_layers() -> Iterator[str]:
    """SDXL as SGM's constructor builds it: two residual layers a resolution, transformers of depth 2 and 10 in the last two."""
    yield from ("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.2")
    depths, block = (0, 2, 10), 0
    for level, depth in enumerate(depths):
        for layer in range(2):
            block += 1
            yield from resnet(f"input_blocks.{block}.0", skip=layer == 0 and level > 0)
            yield from transformer(f"input_blocks.{block}.1", depth)
        if level < 2:
            block += 1
            yield f"input_blocks.{block}.0.op"
    yield from resnet("middle_block.0", skip=False)
    yield from transformer("middle_block.1", depths[-1])
    yield from resnet("middle_block.2", skip=False)
    block = -1
    for level, depth in reversed([*enumerate(depths)]):
        for layer in range(3):
            block += 1
            yield from resnet(f"output_blocks.{block}.0", skip=True)
            yield from transformer(f"output_blocks.{block}.1", depth)
            if layer == 2 and level > 0:
                yield f"output_blocks.{block}.{2 if depth else 1}.conv"


def resnet(place: str, *, skip: bool) -> Iterator[str]:
    yield from (f"{place}.{name}" for name in ("in_layers.2", "emb_layers.1", "out_layers.3"))
    if skip:
        yield f"{place}.skip_connection"


def transformer(place: str, depth: int) -> Iterator[str]:
    if depth:
        yield from (f"{place}.proj_in", f"{place}.proj_out")
    for number in range(depth):
        names = [f"attn{which}.{side}" for which in (1, 2) for side in ("to_q", "to_k", "to_v", "to_out.0")]
        yield from (f"{place}.transformer_blocks.{number}.{name}" for name in [*names, "ff.net.0.proj", "ff.net.2"])


def test_all_of_sdxl_by_sgms_names_is_all_of_it_by_diffusers() -> None:
    """Each one under the name that diffusers' own conversion gives it."""
    model = unet(SDXL)
    ours, tensors = {}, {}
    for number, name in enumerate(sgm_layers()):
        stem = f"lora_unet_{name.replace('.', '_')}"
        key = split_key(f"{stem}.lora_down.weight")
        ours[number] = key.module("")
        tensors[f"{stem}.lora_down.weight"] = torch.tensor([[float(number)]])
        tensors[f"{stem}.lora_up.weight"] = torch.ones(1, 1)
    with quiet():
        converted, _ = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=model.config)
    theirs = {int(value): split_key(key).module("") for key, value in converted.items() if key.endswith("down.weight")}
    assert len(ours) == 794
    assert theirs == ours
    assert sorted(ours.values()) == sorted(
        split_key(f"unet.{name}.lora_A.weight").module("") for name in layers_of(model)
    )


def clip() -> nn.Module:
    with quiet(), torch.device("meta"):
        return CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=12))


@pytest.mark.parametrize(
    ("component", "make"),
    [("unet", lambda: unet(SD15)), ("unet", lambda: unet(SDXL)), ("text_encoder_2", clip)],
    ids=["SD 1.5", "SDXL", "CLIP"],
)
def test_every_name_gets_its_own_dots_back(component: str, make) -> None:
    """From diffusers' keys to kohya's and back again, layer by layer."""
    expected = [f"{component}.{name}" for name in layers_of(make())]
    tensors, updates = [], {}
    for name in expected:
        keys = [f"{name}.lora_{side}.weight" for side in "AB"]
        tensors += [TensorLayout(keys[0], "F32", (1, 2)), TensorLayout(keys[1], "F32", (3, 1))]
        module = split_key(keys[0]).module("")
        updates[module] = LoraUpdate(module, *keys, (3, 2), 1, 1.0, ((1, 2), (3, 1)))
    assert len(updates) == len(expected)
    layout = ModelLayout("diffusion-lora", {"x.safetensors": tuple(tensors)}, updates=updates)
    ranks = dict.fromkeys(updates, 1)
    flat, _ = renamed(layout, "kohya", ranks, {})
    assert all(update.key_a.startswith("lora_") for update in flat.updates.values())
    again, _ = renamed(flat, "diffusers", ranks, {})
    assert [update.key_a.removesuffix(".lora_A.weight") for update in again.updates.values()] == expected
    assert again.tensors == layout.tensors
