"""Tiny real models of transformers and adapters of peft, randomly initialised: no download, no training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 40
PEFT_CALLS_OLD_NAMES = "`is_gradient_checkpointing` is deprecated"
"""peft 0.21 asks transformers 5.23 for what it has renamed; nothing of ours."""

TOLERANCE = 1e-5
"""Of logits of the order of one, computed in float32 through a few layers: what a rebuilt model may differ by."""


def make_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> GPT2LMHeadModel:
    """Conv1D projections (outputs and inputs swapped in the file) and a head tied to the embedding."""
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=2,
            vocab_size=VOCABULARY,
            n_positions=16,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def make_vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
            num_labels=5,
            initializer_range=0.15,
        )
    )


def make_t5() -> T5ForConditionalGeneration:
    """One embedding shared by encoder, decoder and head."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )


def make_resnet() -> ResNetForImageClassification:
    """Convolutions, and batch norms with running variances and integer counters."""
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5)
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": make_llama,
    "gpt2": make_gpt2,
    "vit": make_vit,
    "t5": make_t5,
    "resnet": make_resnet,
}


def make(kind: str) -> PreTrainedModel:
    """The parent: the same weights at each call."""
    torch.manual_seed(0)
    return MODELS[kind]().eval()


@torch.no_grad()
def make_finetune(kind: str, number: int, share: float = 0.3) -> PreTrainedModel:
    """The parent with noise on every weight, other running variances (positive) and other counters."""
    model = make(kind)
    draw = torch.Generator().manual_seed(100 + number)
    for parameter in model.parameters():
        size = max(float(parameter.abs().mean()), 0.05)
        parameter.add_(torch.randn(parameter.shape, generator=draw) * share * size)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.randn(buffer.shape, generator=draw).exp())
        elif name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=draw) * 0.1)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(1000 + number)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, kind: str) -> Tensor:
    """What a model answers to one fixed input, in float32."""
    draw = torch.Generator().manual_seed(7)
    if kind in ("vit", "resnet"):
        size = 16 if kind == "vit" else 32
        dtype = next(model.parameters()).dtype
        return model(pixel_values=torch.randn(2, 3, size, size, generator=draw).to(dtype)).logits.float()
    tokens = torch.randint(0, VOCABULARY, (2, 6), generator=draw)
    if kind == "t5":
        return model(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits.float()
    return model(input_ids=tokens).logits.float()


LLAMA = ["q_proj", "v_proj", "up_proj"]
GPT2 = ["c_attn", "c_fc"]
VIT = ["q_proj", "v_proj", "projection"]

ADAPTERS: dict[str, list[dict[str, Any]]] = {
    # Ranks sum to less than the width: no basis of outputs or inputs is trivially whole.
    "llama": [
        {"r": 16, "lora_alpha": 32, "target_modules": LLAMA},
        {"r": 4, "lora_alpha": 3, "target_modules": LLAMA, "use_rslora": True},
        {
            "r": 3,
            "lora_alpha": 6,
            "target_modules": LLAMA,
            "use_rslora": True,
            "rank_pattern": {r".*\.0\.self_attn\.(q|v)_proj": 2, "up_proj": 5},
            "alpha_pattern": {r"^model.layers.1.self_attn.q_proj": 9, "layers.0.mlp.up_proj": 1},
        },
    ],
    "gpt2": [
        {"r": 16, "lora_alpha": 32, "target_modules": GPT2, "fan_in_fan_out": True},
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": GPT2,
            "fan_in_fan_out": True,
            "rank_pattern": {r"h\.1\..*": 6},
            "alpha_pattern": {r"h\.\d\.mlp\.c_fc": 3},
        },
        {"r": 5, "lora_alpha": 4, "target_modules": GPT2, "fan_in_fan_out": True, "use_rslora": True},
    ],
    # `projection` is the convolution that cuts the image into patches.
    "vit": [
        {"r": 16, "lora_alpha": 32, "target_modules": VIT},
        {"r": 3, "lora_alpha": 6, "target_modules": VIT, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 2,
            "target_modules": VIT,
            "rank_pattern": {r".*layers\.1\..*": 7},
            "alpha_pattern": {"v_proj": 5},
        },
    ],
}
"""Adapters of one zoo: mixed ranks, alphas, patterns and rsLoRA."""


@contextmanager
def tolerating_peft() -> Iterator[None]:
    """Let the one warning pass that peft provokes by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=PEFT_CALLS_OLD_NAMES, category=FutureWarning)
        yield


@torch.no_grad()
def add_adapter(model: PreTrainedModel, seed: int, **settings: Any) -> PeftModel:
    """Put an adapter on a model: random A and B, and everything else that it trains moved too."""
    with tolerating_peft():
        peft = get_peft_model(model, LoraConfig(**settings)).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.15)
    return peft


def save_adapter(peft: PeftModel, folder: Path) -> Path:
    # Whether embeddings changed is asked of the hub otherwise.
    peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load_adapter(kind: str, folder: Path) -> PeftModel:
    """Load an adapter as a user would, on a fresh base."""
    with tolerating_peft():
        return PeftModel.from_pretrained(make(kind), folder).eval()


def load_checkpoint(kind: str, folder: Path) -> PreTrainedModel:
    """Load a checkpoint as a user would; nothing may be missing, unexpected or of another shape."""
    # Without it the library builds its default model, of seven billion weights for a Llama.
    assert (folder / "config.json").is_file()
    model, info = CLASSES[kind].from_pretrained(folder, output_loading_info=True)
    faults = {key: value for key, value in info.items() if value}
    assert not faults, faults
    return model.eval()


CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "gpt2": GPT2LMHeadModel,
    "vit": ViTForImageClassification,
    "t5": T5ForConditionalGeneration,
    "resnet": ResNetForImageClassification,
}
