"""Merged adapters with a rank for each module reload in PEFT: convolutions, embeddings, attention whose modules share a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_builders import add_adapter, make_attention, make_conv, make_llama, quietly, save_adapter
from peft import PeftModel
from torch import Tensor, nn

import eigenzoo as ez
from builders import seeded

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "convolutions": (make_conv, {"target_modules": ["first", "second", "third"]}),
    "attention": (make_attention, {"target_modules": ["attn"]}),
    "embedding": (make_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
}


def updates_of(model: PeftModel) -> dict[str, Tensor]:
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("case", CASES)
def test_ranks_of_their_own_reload_in_peft(tmp_path: Path, case: str) -> None:
    make, settings = CASES[case]
    paths, updates = [], []
    for place, (rank, alpha) in enumerate(((2, 4), (3, 5))):
        peft = add_adapter(make(), r=rank, lora_alpha=alpha, use_rslora=place == 1, **settings)
        draw = seeded(place)
        with torch.no_grad():
            factors = {name: each for name, each in peft.named_parameters() if "lora_" in name}
            for parameter in factors.values():
                parameter.add_(torch.randn(parameter.shape, generator=draw))
            # One module's updates have rank 1.
            next(each for name, each in factors.items() if "lora_B" in name)[:, 1:] = 0
        updates.append(updates_of(peft))
        paths.append(save_adapter(peft, tmp_path / f"m{place}"))
    merged = ez.merge(paths, "task_arithmetic", weights=[0.5, -2.0], rank=0.999)
    assert len({layer.rank for layer in merged.certificate.layers.values()}) > 1
    loaded = updates_of(quietly(PeftModel.from_pretrained, make(), merged.save(tmp_path / "out")))
    wanted = {name: 0.5 * updates[0][name] - 2.0 * updates[1][name] for name in updates[0]}
    lost = sum(float((loaded[name] - wanted[name]).square().sum()) for name in wanted)
    total = sum(float(update.square().sum()) for update in wanted.values())
    assert merged.certificate.loss.frobenius == pytest.approx((lost / total) ** 0.5, rel=1e-4)
