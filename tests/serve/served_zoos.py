"""Small zoos of real libraries, their subspaces, and the same models rebuilt and loaded by those libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eigenzoo as ez
from eigenzoo.subspace.subspace import Subspace
from real_models import (
    ADAPTERS,
    VOCABULARY,
    add_adapter,
    load_adapter,
    load_checkpoint,
    make,
    make_finetune,
    save_adapter,
)

MANY = [{"r": 3, "lora_alpha": 4}, {"r": 2, "lora_alpha": 5}, {"r": 4, "lora_alpha": 2}, {"r": 2, "use_rslora": True}]
TARGETS: dict[str, Any] = {
    "llama": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "t5": {"target_modules": ["q", "v", "wi"]},
    "vit": {"target_modules": ADAPTERS["vit"][0]["target_modules"]},
    "resnet": {"target_modules": ["convolution"]},
}


@dataclass(frozen=True)
class Zoo:
    """Folders of a base with its tokenizer, and of a bundle of twenty adapters of it."""

    base: Path
    bundle: Path


def write_adapters(kind: str, folder: Path, settings: Sequence[dict[str, Any]] = MANY, **more: Any) -> list[Path]:
    """Adapters of mixed ranks and scales, saved by PEFT."""
    return [
        save_adapter(add_adapter(make(kind), seed, **TARGETS[kind], **each, **more), folder / f"a{seed}")
        for seed, each in enumerate(settings)
    ]


def write_finetunes(kind: str, folder: Path, count: int = 4) -> list[Path]:
    """Full fine-tunes, saved by transformers."""
    paths = [folder / f"m{number}" for number in range(count)]
    for number, path in enumerate(paths):
        make_finetune(kind, number).save_pretrained(path)
    return paths


def inputs(kind: str, rows: int, length: int = 6) -> dict[str, Tensor]:
    """Different inputs for each row."""
    draw = torch.Generator().manual_seed(11)
    if kind in ("vit", "resnet"):
        size = 16 if kind == "vit" else 32
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=draw)}
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=draw)
    return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)} if kind == "t5" else {"input_ids": tokens}


@torch.no_grad()
def answers(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits, in float32."""
    result: Tensor = model(**batch).logits.float()
    return result


@torch.no_grad()
def one_at_a_time(space: Subspace, kind: str, names: Sequence[str], batch: dict[str, Tensor], folder: Path) -> Tensor:
    """Each row's logits by its model, rebuilt, saved, and loaded by the stock library; rows of the base by the base."""
    models = {name: stock(space, kind, name, folder) for name in dict.fromkeys(names)}
    rows = [
        answers(models[name], {key: values[row : row + 1] for key, values in batch.items()})
        for row, name in enumerate(names)
    ]
    return torch.cat(rows)


def stock(space: Subspace, kind: str, name: str, folder: Path) -> nn.Module:
    """A model as a user would load it."""
    if name == ez.serve.BASE:
        return make(kind)
    path = folder / name
    if not path.exists():
        space.rebuild(name, max_lora_rank="full" if space.view == "update" else None).save(path)
    return load_adapter(kind, path) if space.view == "update" else load_checkpoint(kind, path)
