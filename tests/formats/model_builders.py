"""Real models and adapters, as transformers and peft write them: where this folder builds its files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call another library without its warnings, which are errors in our own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def make_llama() -> LlamaForCausalLM:
    """A Llama of 16 hidden units and two layers, the same at each call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()


def make_gpt2() -> GPT2LMHeadModel:
    """A GPT-2 whose projections are Conv1D and whose head is tied to the embedding."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)).eval()


class ConvNet(nn.Module):
    """Convolutions of each kind that an adapter can have, one of them 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, (3, 2), padding=1)
        self.second = nn.Conv2d(6, 5, 1)
        self.third = nn.Conv1d(5, 4, 3)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x_BCHW)).mean(-1))


def make_conv() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().eval()


class AttentionNet(nn.Module):
    """PyTorch's own attention, whose output projection peft wraps inside its wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.attn(x_BTD, x_BTD, x_BTD)[0]


def make_attention() -> AttentionNet:
    torch.manual_seed(0)
    return AttentionNet().eval()


def add_adapter(model: nn.Module, **settings: Any) -> PeftModel:
    """Put an adapter with random factors (B too) on a model."""
    torch.manual_seed(1)
    peft = quietly(get_peft_model, model, LoraConfig(**{"init_lora_weights": False, **settings})).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save.default" in name or (name.endswith("bias") and parameter.requires_grad):
                parameter.add_(torch.randn_like(parameter))
    return peft


def save_adapter(peft: PeftModel, folder: Path, **settings: Any) -> Path:
    quietly(peft.save_pretrained, folder, **{"save_embedding_layers": False, **settings})
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change entries of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def save_model(model: PreTrainedModel, folder: Path, **settings: Any) -> Path:
    quietly(model.save_pretrained, folder, **settings)
    return folder
