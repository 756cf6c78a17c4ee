"""Names of Stable Diffusion's UNet in its first implementation (LDM, SGM) and what diffusers calls the same layers.

LoRA files for SDXL name layers by SGM's blocks, all others by diffusers'. SGM numbers its blocks through; diffusers groups
them by resolution, `LAYERS_PER_BLOCK` residual layers in each, and one more layer: the downsampler, or on the way up a third
residual layer. Names are flattened here: a dot is an underscore, as in the files.
"""

from __future__ import annotations

import re

from eigenzoo.errors import UnsupportedError

LAYERS_PER_BLOCK = 2
"""Of every Stable Diffusion UNet up to SDXL and its refiner."""

NUM_BLOCKS = 4
"""Resolutions of the deepest of them."""

_BLOCK = re.compile(r"(?P<way>input_blocks|output_blocks)_(?P<number>\d{1,3})_(?P<part>\d)_(?P<rest>.+)")
_MIDDLE = re.compile(r"middle_block_(?P<part>\d+)_(?P<rest>.+)")
_MIDDLE_PARTS = ("resnets_0", "attentions_0", "resnets_1")
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


def to_diffusers(name: str) -> str:
    """Return diffusers' flattened name of a layer of the UNet; a name that is diffusers' already comes back as it is.

    Raises UnsupportedError for a place that no Stable Diffusion UNet has.

    >>> to_diffusers("input_blocks_4_1_transformer_blocks_0_attn1_to_q")
    'down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q'
    >>> to_diffusers("output_blocks_5_2_conv"), to_diffusers("middle_block_2_in_layers_2")
    ('up_blocks_1_upsamplers_0_conv', 'mid_block_resnets_1_conv1')
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if (match := _MIDDLE.fullmatch(name)) is not None:
        part = int(match["part"])
        if part >= len(_MIDDLE_PARTS):
            raise _nowhere(name)
        return f"mid_block_{_MIDDLE_PARTS[part]}_{_inner(match['rest'], part != 1)}"
    if (match := _BLOCK.fullmatch(name)) is None:
        return name
    down = match["way"] == "input_blocks"
    block, layer = divmod(int(match["number"]) - down, LAYERS_PER_BLOCK + 1)
    part, rest = int(match["part"]), match["rest"]
    if not 0 <= block < NUM_BLOCKS:
        raise _nowhere(name)
    way = "down_blocks" if down else "up_blocks"
    if down and part == 0 and rest == "op":
        return f"{way}_{block}_downsamplers_0_conv"
    # Where a resolution has no attention, the upsampler is part 1 and not 2.
    if not down and part in (1, 2) and rest == "conv":
        return f"{way}_{block}_upsamplers_0_conv"
    if part > 1 or (down and layer == LAYERS_PER_BLOCK):
        raise _nowhere(name)
    return f"{way}_{block}_{('resnets', 'attentions')[part]}_{layer}_{_inner(rest, part == 0)}"


def _inner(rest: str, resnet: bool) -> str:
    return _RESNET.get(rest, rest) if resnet else rest


def _nowhere(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name[:200]!r} is not a module of Stable Diffusion's UNet",
        rule=f"its blocks have {LAYERS_PER_BLOCK} residual layers each, at up to {NUM_BLOCKS} resolutions",
        next_step="load it with diffusers and save it again with save_lora_weights",
    )
