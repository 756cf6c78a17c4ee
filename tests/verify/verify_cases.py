"""Real models with real adapters, as transformers and PEFT write them, and the ways in which the field breaks them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class ConvNet(nn.Module):
    """Two convolutions and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, (3, 2), padding=1)
        self.second = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.head(self.second(self.first(pixels_BCHW)).mean((-2, -1)))


class EmbeddingNet(nn.Module):
    """An embedding, and PyTorch's own attention, whose output projection PEFT wraps inside its wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids_BT: Tensor) -> Tensor:
        hidden_BTD = self.embed(ids_BT)
        return self.attn(hidden_BTD, hidden_BTD, hidden_BTD)[0]


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def make(kind: str) -> nn.Module:
    """A model of a kind, the same at each call."""
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **SMALL)).eval()
    if kind == "wide":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=40, **SMALL | {"hidden_size": 20})
        ).eval()
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).eval()
    if kind == "t5":
        config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        return transformers.T5ForConditionalGeneration(config).eval()
    if kind == "vit":
        config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
        return transformers.ViTForImageClassification(config).eval()
    return {"conv": ConvNet, "embedding": EmbeddingNet}[kind]().eval()


TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "wide": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "wo"],
    "vit": ["q_proj", "fc1"],
    "conv": ["first", "second"],
    "embedding": ["embed", "attn"],
}


def answer(kind: str, model: nn.Module) -> Tensor:
    """What a model answers to one input of its kind."""
    with torch.no_grad():
        if kind == "t5":
            return model(input_ids=torch.arange(6)[None], decoder_input_ids=torch.arange(4)[None]).logits
        if kind == "embedding":
            return model(torch.arange(8)[None])
        if kind in ("vit", "conv"):
            draw = torch.Generator().manual_seed(0)
            found = model(torch.randn(1, 3, 8, 8, generator=draw))
            return getattr(found, "logits", found)
        return model(torch.arange(8)[None]).logits


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call another library without its warnings, which are errors in our own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def write_base(folder: Path, kind: str) -> Path:
    model = make(kind)
    if isinstance(model, transformers.PreTrainedModel):
        quietly(model.save_pretrained, folder)
    else:
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_adapter(folder: Path, kind: str, seed: int = 1, size: float = 0.02, **settings: Any) -> Path:
    """An adapter whose B is random as after training; `init_lora_weights` stays PEFT's, so that what it drops changes nothing."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], **settings})
    model = quietly(get_peft_model, make(kind), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=draw))
    quietly(model.save_pretrained, folder, save_embedding_layers=False)
    return folder


def loaded(kind: str, adapter: Path) -> Tensor:
    """What the real PEFT makes of an adapter: the answer of the base with it."""
    return answer(kind, quietly(PeftModel.from_pretrained, make(kind), str(adapter)).eval())


def change_of(kind: str, adapter: Path) -> float:
    """How far the real PEFT's answer is from the base's."""
    return float((loaded(kind, adapter) - answer(kind, make(kind))).abs().max())


def broken(adapter: Path, folder: Path, rename: Callable[[str], str] = str, **config: Any) -> Path:
    """A copy of an adapter with other keys, or other entries in its config."""
    shutil.copytree(adapter, folder)
    tensors = {rename(name): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def changed(adapter: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of an adapter with other values."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder
