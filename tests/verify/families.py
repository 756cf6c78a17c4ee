"""Tiny models of the families that adapters are made for, from configs alone; adapters of the real PEFT; what both answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from verify_cases import CONFIG, PREFIX, WEIGHTS, quietly

_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TEXT = {**_SMALL, **_ENDS, "num_key_value_heads": 1, "max_position_embeddings": 32}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 8, "patch_size": 4}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_TOKENS = {"image_token_id": 30, "video_token_id": 31, "vision_start_token_id": 32, "vision_end_token_id": 33}


def _qwen2_5_vl() -> nn.Module:
    seen = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
        "window_size": 8,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, **_ROPE}, vision_config={**_QWEN_VISION, **seen}, **_TOKENS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    seen = {"embed_dim": 16, "hidden_size": 16}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, **_ROPE}, vision_config={**_QWEN_VISION, **seen}, **_TOKENS
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **_VISION},
        image_token_index=30,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    text = {**_TEXT, "head_dim": 8, "sliding_window": 8, "layer_types": ["full_attention"] * 2}
    tokens = {"image_token_index": 30, "boi_token_index": 31, "eoi_token_index": 32, "mm_tokens_per_image": 4}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=_VISION, **tokens)
    )


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **_ENDS))


def _bert(kind: str, num_labels: int) -> nn.Module:
    config = transformers.BertConfig(**_SMALL, num_labels=num_labels, max_position_embeddings=16)
    return getattr(transformers, kind)(config)


def _t5() -> nn.Module:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def _mixtral() -> nn.Module:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_TEXT, **experts))


def _qwen3_moe() -> nn.Module:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_TEXT, head_dim=8, **experts))


def _whisper() -> nn.Module:
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _SIDE.items()}
    sizes = {"vocab_size": 40, "d_model": 16, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
    config = transformers.WhisperConfig(
        **sizes, **sides, **_ENDS, decoder_start_token_id=0, suppress_tokens=None, begin_suppress_tokens=None
    )
    return transformers.WhisperForConditionalGeneration(config)


_SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        make: builds it.
        targets: what adapters are put on.
        older: how names of before transformers 4.52 come of today's, by pairs of what keys begin with.
        text: the same for names of the language model alone.
    """

    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    older: tuple[tuple[str, str], ...] = ()
    text: tuple[tuple[str, str], ...] = ()


_INNER = (("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."))
_LANGUAGE = (("model.language_model.", "model."),)
_QWEN_OLDER = (*_LANGUAGE, ("model.visual.", "visual."))

FAMILIES = {
    "qwen2.5-vl": Family(_qwen2_5_vl, ("q_proj", "v_proj", "qkv"), _QWEN_OLDER, _LANGUAGE),
    "qwen2-vl": Family(_qwen2_vl, ("q_proj", "down_proj"), _QWEN_OLDER, _LANGUAGE),
    "llava": Family(_llava, ("q_proj", "v_proj"), _INNER, _LANGUAGE),
    "gemma3": Family(_gemma3, ("q_proj", "fc1"), _INNER, _LANGUAGE),
    "llama": Family(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT)), ("q_proj", "down_proj")),
    "gpt2": Family(_gpt2, ("c_attn", "c_proj")),
    "bert": Family(partial(_bert, "BertForMaskedLM", 2), ("query", "dense")),
    "bert-cls": Family(partial(_bert, "BertForSequenceClassification", 3), ("query", "value")),
    "t5": Family(_t5, ("q", "wo")),
    "mixtral": Family(_mixtral, ("q_proj", "v_proj")),
    "qwen3-moe": Family(_qwen3_moe, ("q_proj", "o_proj")),
    "vit": Family(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**_VISION, num_labels=3)),
        ("q_proj", "fc1"),
    ),
    "whisper": Family(_whisper, ("q_proj", "fc1")),
}


def make(name: str) -> nn.Module:
    """A model of a family, the same at each call; with larger weights than transformers draws, so that answers move."""
    torch.manual_seed(0)
    model = FAMILIES[name].make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
                if not parameter.any():  # Gemma's projection of pictures, without which none is seen
                    parameter.normal_()
    return model


@torch.no_grad()
def answer(name: str, model: nn.Module) -> Tensor:
    """What a model of a family, or its body, answers to one input of its kind; what sees, sees a picture too."""
    inner = getattr(model, "base_model", model)
    inner = inner.model if isinstance(model, PeftModel) else model
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8]])
    draw = torch.Generator().manual_seed(3)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if name == "whisper":
        inputs = {"input_features": torch.randn(1, 4, 16, generator=draw), "decoder_input_ids": tokens}
    elif name == "t5":
        inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
    elif name == "vit":
        inputs = {"pixel_values": torch.randn(1, 3, 8, 8, generator=draw)}
    elif name.startswith("qwen2"):
        grid = torch.tensor([[1, 2, 2]])
        patches = torch.randn(4, 3 * 1 * 4 * 4, generator=draw)
        seen = torch.tensor([[3, 32, 30, 30, 30, 30, 33, 4]])
        inputs = {
            "input_ids": seen,
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": (seen == 30).int(),
        }
    elif name in ("llava", "gemma3"):
        seen = torch.tensor([[3, 30, 30, 30, 30, 4]])
        inputs = {"input_ids": seen, "pixel_values": torch.randn(1, 3, 8, 8, generator=draw)}
    found = quietly(inner, **inputs)
    return next(value for value in found.values() if isinstance(value, Tensor))


def train(model: nn.Module, targets: Iterable[str], task: str | None, seed: int = 1, **settings: Any) -> nn.Module:
    """Put an adapter on a model whose factors, and whatever is trained besides, are drawn as after training."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type=task, **settings)
    peft = quietly(get_peft_model, model, config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return peft


def renamed(adapter: Path, folder: Path, change: Callable[[str], str], **config: Any) -> Path:
    """A copy of an adapter with other keys, or other entries in its config."""
    shutil.copytree(adapter, folder)
    tensors = {change(key): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    if config:
        document = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**document, **config}))
    return folder


def _by_prefix(pairs: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    def change(key: str) -> str:
        for old, new in pairs:
            if key.startswith(PREFIX + old):
                return PREFIX + new + key.removeprefix(PREFIX + old)
        return key

    return change


def key_change(family: str, names: str) -> Callable[[str], str]:
    """How the keys that PEFT writes become those of another tool, version or wrapper."""
    return {
        "PEFT's": str,
        "before 4.52": _by_prefix(FAMILIES[family].older),
        "of the text model": _by_prefix(FAMILIES[family].text),
        "compiled outside": lambda key: f"_orig_mod.{key}",
        "compiled inside": lambda key: PREFIX + "_orig_mod." + key.removeprefix(PREFIX),
        "compiled, without PEFT's prefix": lambda key: "_orig_mod." + key.removeprefix(PREFIX),
        "of a part": lambda key: f"thinker.{key}",
        "of DataParallel": lambda key: PREFIX + "module." + key.removeprefix(PREFIX),
        "without PEFT's prefix": lambda key: key.removeprefix(PREFIX),
        "with it twice": lambda key: PREFIX + key,
        "of a state dict": lambda key: key.replace(".lora_A.weight", ".lora_A.default.weight").replace(
            ".lora_B.weight", ".lora_B.default.weight"
        ),
    }[names]


def loaded_by(kind: str, base: Path, adapter: Path) -> nn.Module:
    """The base loaded by a class of transformers, with the adapter loaded by PEFT. Raises what they raise."""
    torch.manual_seed(1)  # what the base has not, such as a pooler, is drawn as when the adapter was trained
    model = quietly(getattr(transformers, kind).from_pretrained, base)
    return quietly(PeftModel.from_pretrained, model.eval(), str(adapter)).eval()
