"""A tiny Llama with adapters of PEFT, and what it answers: the truth that a followed next step is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Of logits of the order of one, computed in float32 through two layers."""


@contextmanager
def quiet() -> Iterator[None]:
    """Other libraries' warnings are not errors of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_llama() -> nn.Module:
    """A Llama of 16 hidden units and two layers, the same at each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.15, **sizes)).eval()


@torch.no_grad()
def add_adapter(model: nn.Module, seed: int = 0, **settings: Any) -> Any:
    """Put an adapter of rank 2 on a model, and move all that it trains."""
    from peft import LoraConfig, get_peft_model

    chosen = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **settings}
    with quiet():
        peft = get_peft_model(model, LoraConfig(**chosen)).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.15)
    return peft


def save_adapter(peft: Any, folder: Path) -> Path:
    """Save an adapter as PEFT does, without asking the hub whether embeddings changed."""
    with quiet():
        peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


def write_zoo(
    folder: Path, num_adapters: int = 2, make: Callable[[], nn.Module] = make_llama, **settings: Any
) -> list[Path]:
    """Write adapters a0, a1, … of one base."""
    return [save_adapter(add_adapter(make(), seed, **settings), folder / f"a{seed}") for seed in range(num_adapters)]


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    """Logits for two fixed sequences."""
    tokens = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(7))
    logits: Tensor = model(input_ids=tokens).logits.float()
    return logits


@lru_cache(maxsize=1)
def base_answers() -> Tensor:
    """What the base alone answers."""
    return answers(make_llama())


def adapter_answers(folder: Path, make: Callable[[], nn.Module] = make_llama) -> Tensor:
    """What PEFT answers with an adapter on a fresh base."""
    from peft import PeftModel

    with quiet():
        return answers(PeftModel.from_pretrained(make(), folder).eval())


def checkpoint_answers(folder: Path) -> Tensor:
    """What transformers answers with a checkpoint; no weight may be missing or unexpected."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not {key: value for key, value in info.items() if value}
    return answers(model.eval())


def assert_same(found: Tensor, expected: Tensor, base: Tensor | None = None) -> None:
    """The answers are equal, and the base alone is far from them: else nothing was compared."""
    assert (expected - (base_answers() if base is None else base)).abs().max() > 1000 * TOLERANCE
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
