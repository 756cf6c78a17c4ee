"""Tiny models from configs, and small zoos of them: real PEFT adapters, and real checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import eigenzoo as ez
from builders import seeded
from eigenzoo.integrations.peft_tuner import EigenzooConfig

NUM_MODELS = 5
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class ConvNet(nn.Module):
    """Convolutions of one and two dimensions, one in groups and one dilated (no LoRA there), a linear layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1, padding_mode="reflect")
        self.dilated = nn.Conv2d(8, 8, (1, 3), dilation=(1, 2), padding="same")
        self.long = nn.Conv1d(8, 6, 3)
        self.body = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, images: Tensor) -> Tensor:
        found = self.dilated(torch.relu(self.grouped(torch.relu(self.wide(images)))))
        found = torch.relu(self.long(found.flatten(2))).mean(2)
        return self.head(torch.relu(self.body(found)))


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changes})
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **NO_DROPOUT
    )
    return GPT2LMHeadModel(config).eval()


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=4,
    )
    return ViTForImageClassification(config).eval()


def conv() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().eval()


TOKENS = {"input_ids": torch.randint(0, 50, (3, 9), generator=seeded(1))}
IMAGES = {"pixel_values": torch.randn(3, 3, 16, 16, generator=seeded(2))}
PICTURES = {"images": torch.randn(3, 3, 16, 16, generator=seeded(2))}


@dataclass(frozen=True)
class Kind:
    """A model, what goes into it, which modules its zoo's adapters have, and its head."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: tuple[str, ...]
    head: str
    lora: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "llama": Kind(llama, TOKENS, ("q_proj", "down_proj", "embed_tokens"), "lm_head"),
    "gpt2": Kind(gpt2, TOKENS, ("c_attn", "c_proj"), "lm_head", {"fan_in_fan_out": True}),
    "vit": Kind(vit, IMAGES, ("q_proj", "fc1", "projection"), "classifier"),
    "conv": Kind(conv, PICTURES, ("wide", "long", "body"), "head"),
}


def outputs(model: nn.Module, kind: str, **changes: Tensor) -> Tensor:
    """What a model computes, logits of either kind."""
    inputs = {**KINDS[kind].inputs, **changes}
    with torch.no_grad():
        found = model(**inputs)
    return getattr(found, "logits", found)


def adapter_zoo(root: Path, kind: str, rank: int = 3) -> list[Path]:
    """Write adapters by stock PEFT, all of them different and far from zero."""
    paths = []
    for seed in range(NUM_MODELS):
        model, chosen = KINDS[kind].make(), KINDS[kind]
        torch.manual_seed(seed + 1)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(chosen.targets), init_lora_weights=False, **chosen.lora
        )
        tuned = get_peft_model(model, config)
        paths.append(root / f"m{seed}")
        tuned.save_pretrained(paths[-1], save_embedding_layers=False)
    return paths


def checkpoint_zoo(root: Path, kind: str) -> list[Path]:
    """Write checkpoints of models that differ everywhere."""
    paths = []
    for seed in range(NUM_MODELS):
        model, draw = KINDS[kind].make(), seeded(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
        paths.append(root / f"m{seed}")
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(paths[-1])
        else:
            paths[-1].mkdir(parents=True)
            save_file(model.state_dict(), paths[-1] / "model.safetensors", {"format": "pt"})
    return paths


@dataclass(frozen=True)
class Fit:
    """A zoo and how it is fitted; everything is kept, so that its own models are in the subspace."""

    kind: str
    of: str
    axes: tuple[str, ...]
    view: str
    exclude: tuple[str, ...] = ()


SIDES = ("outputs", "inputs")
FITS = {
    "llama-sides": Fit("llama", "adapters", SIDES, "update"),
    "llama-all-axes": Fit("llama", "adapters", ("models", *SIDES), "update"),
    "llama-models": Fit("llama", "adapters", ("models",), "update"),
    "llama-factors": Fit("llama", "adapters", SIDES, "factors"),
    "llama-factors-models": Fit("llama", "adapters", ("models",), "factors"),
    "llama-weights": Fit("llama", "checkpoints", ("models",), "weight"),
    "llama-weights-sides": Fit("llama", "checkpoints", SIDES, "weight"),
    "gpt2-sides": Fit("gpt2", "adapters", ("outputs",), "update"),
    "gpt2-models": Fit("gpt2", "adapters", ("models",), "update"),
    "gpt2-weights": Fit("gpt2", "checkpoints", ("models", "inputs"), "weight", ("*wte*",)),
    "gpt2-delta": Fit("gpt2", "checkpoints", ("models",), "delta", ("*wte*",)),
    "vit-sides": Fit("vit", "adapters", SIDES, "update"),
    "vit-weights": Fit("vit", "checkpoints", ("models",), "weight"),
    "conv-sides": Fit("conv", "adapters", SIDES, "update"),
    "conv-factors": Fit("conv", "adapters", SIDES, "factors"),
    "conv-weights": Fit("conv", "checkpoints", ("models",), "weight"),
    "conv-weights-sides": Fit("conv", "checkpoints", SIDES, "weight"),
}


@dataclass(frozen=True)
class Made:
    """A saved bundle of a zoo that is still there."""

    name: str
    kind: str
    fit: Fit
    paths: list[Path]
    bundle: Path

    def base(self) -> nn.Module:
        return KINDS[self.kind].make()

    def outputs(self, model: nn.Module) -> Tensor:
        return outputs(model, self.kind)


def make(root: Path, name: str, zoos: dict[tuple[str, str], list[Path]]) -> Made:
    """Fit a case and save it; zoos are written once."""
    fit = FITS[name]
    if (fit.kind, fit.of) not in zoos:
        folder = root / f"{fit.kind}-{fit.of}"
        zoos[fit.kind, fit.of] = (adapter_zoo if fit.of == "adapters" else checkpoint_zoo)(folder, fit.kind)
    paths = zoos[fit.kind, fit.of]
    base = None
    if fit.view == "delta":
        base = root / f"{fit.kind}-base"
        KINDS[fit.kind].make().save_pretrained(base)
    space = ez.fit(paths, 1.0, axes=fit.axes, view=fit.view, base=base, exclude=list(fit.exclude) or None)
    return Made(name, fit.kind, fit, paths, space.save(root / name))


def tuned(case: Made, **options: object) -> PeftModel:
    """The base with a new adapter."""
    return get_peft_model(case.base(), EigenzooConfig(bundle=str(case.bundle), **options)).eval()


def coefficients(model: nn.Module) -> dict[str, Tensor]:
    """What is trained."""
    return {name: values for name, values in model.named_parameters() if values.requires_grad}


def shake(model: nn.Module, seed: int = 0) -> None:
    """Move what is trained away from where it began."""
    draw = seeded(seed)
    with torch.no_grad():
        for parameter in coefficients(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.5)
