"""Names of diffusion transformers in their first implementations, and what diffusers calls the same layers.

LoRAs of Wan and Flux name layers by the network that they were trained on: the authors' own (kohya's, musubi's and ComfyUI's
files), DiffSynth's, or diffusers'. Each name means one layer of diffusers' network, but for the weights that other networks fuse:
q, k and v of Flux in one get the name that diffusers gives them once it fuses them (`fuse_qkv_projections`), and are other layers
than q, k and v alone. Names are flattened here: a dot is an underscore.

Source: diffusers' `lora_conversion_utils`, beside which the tests hold every row; DiffSynth's `flux_lora_patcher`.
Deviation: Flux's `final_layer.adaLN_modulation.1`, whose halves diffusers swaps, keeps its own name.
"""

from __future__ import annotations

import re

# The name after the number of its block, and what diffusers has instead.
_WAN = {
    **{f"self_attn_{side}": f"attn1_to_{side}" for side in "qkv"},
    **{f"cross_attn_{side}": f"attn2_to_{side}" for side in "qkv"},
    "self_attn_o": "attn1_to_out_0",
    "cross_attn_o": "attn2_to_out_0",
    "cross_attn_k_img": "attn2_add_k_proj",
    "cross_attn_v_img": "attn2_add_v_proj",
    "ffn_0": "ffn_net_0_proj",
    "ffn_2": "ffn_net_2",
}
_FLUX_DOUBLE = {
    "img_attn_qkv": "attn_to_qkv",
    "img_attn_proj": "attn_to_out_0",
    "img_mlp_0": "ff_net_0_proj",
    "img_mlp_2": "ff_net_2",
    "img_mod_lin": "norm1_linear",
    "txt_attn_qkv": "attn_to_added_qkv",
    "txt_attn_proj": "attn_to_add_out",
    "txt_mlp_0": "ff_context_net_0_proj",
    "txt_mlp_2": "ff_context_net_2",
    "txt_mod_lin": "norm1_context_linear",
}
_FLUX_SINGLE = {
    "linear1": "attn_to_qkv_mlp",
    "linear2": "proj_out",
    "modulation_lin": "norm_linear",
    # DiffSynth's.
    "to_qkv_mlp": "attn_to_qkv_mlp",
    **{f"a_to_{side}": f"attn_to_{side}" for side in "qkv"},
    "proj_in_besides_attn": "proj_mlp",
    "proj_out": "proj_out",
    "norm_linear": "norm_linear",
}
_DIFFSYNTH_FLUX_DOUBLE = {
    "attn_a_to_qkv": "attn_to_qkv",
    "attn_a_to_out": "attn_to_out_0",
    "ff_a_0": "ff_net_0_proj",
    "ff_a_2": "ff_net_2",
    "norm1_a_linear": "norm1_linear",
    "attn_b_to_qkv": "attn_to_added_qkv",
    "attn_b_to_out": "attn_to_add_out",
    "ff_b_0": "ff_context_net_0_proj",
    "ff_b_2": "ff_context_net_2",
    "norm1_b_linear": "norm1_context_linear",
    **{f"attn_a_to_{side}": f"attn_to_{side}" for side in "qkv"},
    **{f"attn_b_to_{side}": f"attn_add_{side}_proj" for side in "qkv"},
}
_BLOCKS = {
    "blocks": {"blocks": _WAN, "transformer_blocks": _DIFFSYNTH_FLUX_DOUBLE},
    "double_blocks": {"transformer_blocks": _FLUX_DOUBLE},
    "single_blocks": {"single_transformer_blocks": _FLUX_SINGLE},
}
_OUTSIDE = {
    # Wan's.
    "text_embedding_0": "condition_embedder_text_embedder_linear_1",
    "text_embedding_2": "condition_embedder_text_embedder_linear_2",
    "time_embedding_0": "condition_embedder_time_embedder_linear_1",
    "time_embedding_2": "condition_embedder_time_embedder_linear_2",
    "time_projection_1": "condition_embedder_time_proj",
    "img_emb_proj_1": "condition_embedder_image_embedder_ff_net_0_proj",
    "img_emb_proj_3": "condition_embedder_image_embedder_ff_net_2",
    "head_head": "proj_out",
    # Flux's.
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
    "final_layer_linear": "proj_out",
}

_BLOCK = re.compile(r"(?P<block>blocks|double_blocks|single_blocks)_(?P<number>\d{1,4})_(?P<rest>.+)", re.ASCII)
_DIFFUSERS = re.compile(r"((single|joint)_)?transformer_blocks_\d|blocks_\d{1,4}_(attn[12]_|ffn_net_)", re.ASCII)


def is_transformer(name: str) -> bool:
    """Tell whether a flattened name is a place in a block of a diffusion transformer, in diffusers' names or another network's.

    >>> is_transformer("blocks_0_self_attn_q"), is_transformer("down_blocks_0_resnets_0_conv1")
    (True, False)
    """
    return _DIFFUSERS.match(name) is not None or _in_block(name) is not None


def to_diffusers(name: str) -> str:
    """Return diffusers' flattened name of a layer of a diffusion transformer; any other name comes back as it is.

    >>> to_diffusers("blocks_11_cross_attn_k_img"), to_diffusers("single_blocks_3_linear2")
    ('blocks_11_attn2_add_k_proj', 'single_transformer_blocks_3_proj_out')
    """
    return _in_block(name) or _OUTSIDE.get(name, name)


def _in_block(name: str) -> str | None:
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    for block, names in _BLOCKS[match["block"]].items():
        if match["rest"] in names:
            return f"{block}_{match['number']}_{names[match['rest']]}"
    return None
