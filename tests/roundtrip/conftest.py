"""Zoos that several tests read: made once by the real libraries, never written to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from real_models import ADAPTERS, add_adapter, logits, make, make_finetune, save_adapter


@dataclass(frozen=True)
class RealZoo:
    """A zoo on disk beside what its models answered before they were saved."""

    kind: str
    folder: Path
    logits: dict[str, torch.Tensor]
    base_logits: torch.Tensor

    def path(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def adapter_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RealZoo]:
    """The adapters of `ADAPTERS`, saved by peft."""
    made: dict[str, RealZoo] = {}

    def get(kind: str) -> RealZoo:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            answers = {}
            for number, settings in enumerate(ADAPTERS[kind]):
                peft = add_adapter(make(kind), number, **settings)
                answers[f"a{number}"] = logits(peft, kind)
                save_adapter(peft, folder / f"a{number}")
            made[kind] = RealZoo(kind, folder, answers, logits(make(kind), kind))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def checkpoint_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RealZoo]:
    """Three fine-tunes of one parent, saved by transformers; the parent lies in `_base`."""
    made: dict[tuple[str, str, torch.dtype], RealZoo] = {}

    def get(kind: str, max_shard_size: str = "5GB", dtype: torch.dtype = torch.float32) -> RealZoo:
        key = (kind, max_shard_size, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            make(kind).to(dtype).save_pretrained(folder / "_base", max_shard_size=max_shard_size)
            answers = {}
            for number in range(3):
                model = make_finetune(kind, number).to(dtype)
                answers[f"m{number}"] = logits(model, kind)
                model.save_pretrained(folder / f"m{number}", max_shard_size=max_shard_size)
            made[key] = RealZoo(kind, folder, answers, logits(make(kind).to(dtype), kind))
        return made[key]

    return get
