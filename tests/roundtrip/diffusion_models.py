"""A tiny Stable Diffusion, randomly initialised from configs: no download."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def make_pipeline() -> Any:
    """UNet, VAE, text encoder, tokenizer and scheduler: the same weights at each call."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *"abc", *(f"{letter}</w>" for letter in "abc")]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    )
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            **sizes,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StableDiffusionPipeline(
            unet=unet.eval(),
            vae=vae.eval(),
            text_encoder=text.eval(),
            tokenizer=CLIPTokenizer(
                vocab={word: place for place, word in enumerate(vocabulary)}, merges=[], model_max_length=8
            ),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False, num_train_timesteps=77),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@torch.no_grad()
def finetune(number: int, components: tuple[str, ...] = ("unet",)) -> Any:
    """The parent with noise on every weight of these components, as DreamBooth changes the UNet."""
    pipeline = make_pipeline()
    draw = torch.Generator().manual_seed(20 + number)
    for component in components:
        for parameter in getattr(pipeline, component).parameters():
            size = max(float(parameter.abs().mean()), 0.05)
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3 * size)
    return pipeline


def save(pipeline: Any, folder: Path, **settings: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(folder, **settings)
    return folder


def load(folder: Path, **settings: Any) -> Any:
    """Load a pipeline as a user would; a weight that is missing or too many would be drawn anew, and is looked for."""
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StableDiffusionPipeline.from_pretrained(folder, **settings)


@torch.no_grad()
def answers(pipeline: Any) -> dict[str, Tensor]:
    """What each network answers to one fixed input, the text encoder asked through the tokenizer."""
    draw = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 4, 8, 8, generator=draw)
    words = pipeline.tokenizer("a b c", padding="max_length", return_tensors="pt").input_ids
    embedded = pipeline.text_encoder(words).last_hidden_state.float()
    kind = pipeline.unet.dtype
    return {
        "unet": pipeline.unet(latents.to(kind), 5, embedded.to(kind)).sample.float(),
        "vae": pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample.float(),
        "text_encoder": embedded,
    }
