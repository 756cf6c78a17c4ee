"""A LoRA of a diffusion model under the other family of keys: kohya's for diffusers' and the other way round.

Flattening is always certain. Dots come back only for names that the grammar of Stable Diffusion's UNet, of Wan's and Flux's
transformers and of CLIP's text model has, where each can be read in one way; any other name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from eigenzoo.errors import UnsupportedError, UsageError
from eigenzoo.formats.layout import ModelLayout, TensorLayout
from eigenzoo.formats.lora.config import KEEP_FORMAT
from eigenzoo.formats.lora.diffusion_file import METADATA_KEY
from eigenzoo.formats.lora.diffusion_keys import FactorKey, split_key
from eigenzoo.formats.lora.sgm_blocks import to_diffusers

FAMILIES = ("diffusers", "kohya")

_UNET = re.compile(
    r"conv_in|conv_out|(time|add)_embedding_linear_[12]|(down_blocks_\d|mid_block|up_blocks_\d)_"
    r"(resnets_\d_(conv[12]|time_emb_proj|conv_shortcut)|(down|up)samplers_0_conv"
    r"|attentions_\d_(proj_in|proj_out|transformer_blocks_\d+_(attn[12]_to_([qkv]|out_0)|ff_net_0_proj|ff_net_2)))"
)
_CLIP = re.compile(r"text_projection|encoder_layers_\d+_(self_attn_([qkv]|out)_proj|mlp_fc[12])")
_TRANSFORMER = re.compile(
    r"blocks_\d+_(attn[12]_(to_([qkv]|out_0)|add_[kv]_proj)|ffn_net_(0_proj|2))"
    r"|transformer_blocks_\d+_(norm1(_context)?_linear|ff(_context)?_net_(0_proj|2)"
    r"|attn_(to_([qkv]|out_0|add_out)|add_[qkv]_proj))"
    r"|single_transformer_blocks_\d+_(norm_linear|proj_mlp|proj_out|attn_to_[qkv])"
    r"|condition_embedder_((time|text)_embedder_linear_[12]|time_proj|image_embedder_ff_net_(0_proj|2))"
    r"|time_text_embed_(timestep|guidance|text)_embedder_linear_[12]"
    r"|x_embedder|context_embedder|patch_embedding|norm_out_linear|proj_out"
)
# The parts of those names; whatever else stands between two underscores is a part by itself.
_PART = re.compile(
    r"(conv_in|conv_out|conv_shortcut|time_emb_proj|time_embedding|add_embedding|linear_\d|down_blocks|mid_block|up_blocks"
    r"|(?:single_)?transformer_blocks|proj_in|proj_out|to_[qkv]|to_out|self_attn|[qkv]_proj|out_proj|text_projection"
    r"|norm1_context|norm_out|ff_context|add_[qkv]_proj|to_add_out|proj_mlp|patch_embedding|time_text_embed|time_proj"
    r"|(?:condition|timestep|time|guidance|text|image|context|x)_embedder|[^_]+)(?:_|$)"
)


def renamed(
    layout: ModelLayout, family: str, ranks: Mapping[str, int], metadata: Mapping[str, str]
) -> tuple[ModelLayout, dict[str, str]]:
    """Return the layout of the same LoRA with the keys of a family, and the header's strings for it.

    kohya's keys get one α for the whole file, the largest rank, since some programs read no more than one.

    Args:
        layout: of a LoRA of a diffusion model.
        family: diffusers or kohya.
        ranks: of the factors that will be written, by module.
        metadata: the header's strings as they were.
    """
    if family not in FAMILIES:
        raise UsageError(f"the format {family[:40]!r} is unknown", rule=f"it is one of {', '.join(FAMILIES)}")
    keys = {module: split_key(update.key_a) for module, update in layout.updates.items()}
    text = _text_encoder(layout)
    alpha = max(ranks.values())
    tensors, updates = [], {}
    for module, update in layout.updates.items():
        key = keys[module]
        if key is None:
            raise UsageError(
                f"{update.key_a[:200]!r} is not the key of a factor",
                rule="only keys of a diffusion LoRA can be renamed",
            )
        stem = _kohya(key, module, text) if family == "kohya" else diffusers_stem(module)
        down, up = (".lora_down", ".lora_up") if family == "kohya" else (".lora_A", ".lora_B")
        new = replace(update, key_a=f"{stem}{down}.weight", key_b=f"{stem}{up}.weight", scale=1.0, key_alpha=None)
        tensors += [_named(layout, update.key_a, new.key_a), _named(layout, update.key_b, new.key_b)]
        if family == "kohya":
            new = replace(new, key_alpha=f"{stem}.alpha", scale=alpha / update.rank)
            tensors.append(TensorLayout(f"{stem}.alpha", "F32", ()))
        updates[module] = new
    parts = {name for update in layout.updates.values() for name in update.keys}
    ((file, listed),) = layout.files.items()
    tensors += [tensor for tensor in listed if tensor.name not in parts]
    other_metadata = {name: value for name, value in metadata.items() if name != METADATA_KEY}
    return replace(layout, files={file: tuple(tensors)}, updates=updates), other_metadata


def _named(layout: ModelLayout, old: str, new: str) -> TensorLayout:
    return replace(layout.tensors[old], name=new)


def _kohya(key: FactorKey, module: str, text: str) -> str:
    """Give the stem of kohya's keys, by diffusers' blocks: what kohya writes for SD 1.5, and every program reads."""
    component = module.partition(".")[0]
    prefixes = {"unet": "lora_unet_", "text_encoder": text, "text_encoder_2": "lora_te2_text_model_"}
    if component not in prefixes:
        raise _uncertain(module, "kohya's keys are written only for Stable Diffusion's UNet and text encoders")
    flat = key.name.replace(".", "_")
    if component == "unet":
        return prefixes[component] + to_diffusers(flat)
    flat = flat.removeprefix("text_model_")
    return prefixes[component].removesuffix("text_model_" if flat == "text_projection" else "") + flat


def _text_encoder(layout: ModelLayout) -> str:
    """Give kohya's prefix of the first text encoder, which is another one where the model has two, as SDXL."""
    two = any(
        module.startswith("text_encoder_2.") or re.search(r"transformer_blocks\.[1-9]", module)
        for module in layout.updates
    )
    return f"lora_{'te1' if two else 'te'}_text_model_"


def diffusers_stem(module: str) -> str:
    """Give the stem of diffusers' keys for what a layer is called; raises UnsupportedError where its dots are not certain.

    >>> diffusers_stem("transformer.single_transformer_blocks.3.attn_to_q")
    'transformer.single_transformer_blocks.3.attn.to_q'
    """
    component, _, rest = module.partition(".")
    flat = rest.replace(".", "_")
    if component == "unet":
        grammar = _UNET
    elif component in ("transformer", "transformer_2"):
        grammar = _TRANSFORMER
    elif component in ("text_encoder", "text_encoder_2"):
        grammar = _CLIP
    else:
        raise _uncertain(module, "dots are restored only in names of Stable Diffusion, Wan and Flux")
    if grammar.fullmatch(flat) is None:
        raise _uncertain(module, "dots are restored only in names whose parts are known")
    name = ".".join(match[1] for match in _PART.finditer(flat))
    # diffusers takes the level away where a newer transformers has none, and never adds it.
    return f"{component}.{'text_model.' if name.startswith('encoder.') else ''}{name}"


def _uncertain(module: str, rule: str) -> UnsupportedError:
    return UnsupportedError(
        "has no unambiguous name in that format",
        where=f"module {module[:200]!r}",
        rule=rule,
        next_step=KEEP_FORMAT,
    )
