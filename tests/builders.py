"""Shared builders of small zoos on disk: written here once, used by every folder of tests.

Files only, by safetensors alone: what needs transformers or peft to be real lies with the tests that use it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."

Factors = tuple[Tensor, Tensor]
"""(B (outputs, rank), A (rank, inputs)), the scale not in them."""


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, so that no test depends on another's draws."""
    return torch.Generator().manual_seed(seed)


def random_stack(num_models: int, shape: Sequence[int], seed: int = 0, rank: int | None = None) -> Tensor:
    """A float64 stack (N, *shape) around a mean that is not zero; of exactly `rank` centred directions where one is given."""
    draw = seeded(seed)
    mean = torch.randn(1, *shape, generator=draw, dtype=torch.float64)
    if rank is None:
        return mean + torch.randn(num_models, *shape, generator=draw, dtype=torch.float64)
    weights = torch.randn(num_models, rank, generator=draw, dtype=torch.float64)
    return mean + torch.tensordot(weights, torch.randn(rank, *shape, generator=draw, dtype=torch.float64), 1)


def write_model(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write one checkpoint of one file."""
    folder.mkdir(parents=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", dict(metadata or {"format": "pt"}))
    return folder


def write_stacks(root: Path, stacks: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> list[Path]:
    """Write stacks (N, …) as N checkpoints m0, m1, …; returns their folders."""
    num_models = len(next(iter(stacks.values())))
    return [
        write_model(root / f"m{place}", {name: stack[place].to(dtype) for name, stack in stacks.items()})
        for place in range(num_models)
    ]


def edit_model(folder: Path, file: str = "model.safetensors", **changes: Tensor | None) -> Path:
    """Replace, add or (None) remove tensors of a file; `__` in a keyword stands for the dot of a name."""
    tensors = load_file(folder / file)
    for keyword, tensor in changes.items():
        name = keyword.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / file, {"format": "pt"})
    return folder


def random_factors(
    modules: Mapping[str, tuple[int, int]], rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Factors]:
    """Random non-zero factors per module of the given (outputs, inputs), entries of ΔW about 1."""
    draw = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) / rank**0.25).to(dtype)

    return {module: (normal(outputs, rank), normal(rank, inputs)) for module, (outputs, inputs) in modules.items()}


def write_adapter(
    folder: Path, factors: Mapping[str, Factors], *, others: Mapping[str, Tensor] | None = None, **config: Any
) -> Path:
    """Write factors as a PEFT adapter; rank from the first module, alpha = rank unless `config` says otherwise."""
    rank = next(iter(factors.values()))[1].shape[0]
    full = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(factors),
        "task_type": None,
        **config,
    }
    tensors = dict(others or {})
    for module, (b_OR, a_RI) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a_RI.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_OR.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(full))
    return folder


def regauge(factors: Mapping[str, Factors], seed: int, scale: float = 1.0) -> dict[str, Factors]:
    """The same updates by other factors: A → MA, B → BM⁻¹, with M a rotation that is rescaled row by row and as a whole."""
    draw = seeded(seed)
    changed = {}
    for module, (b_OR, a_RI) in factors.items():
        rank = a_RI.shape[0]
        rotation, _ = torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=torch.float64))
        # Between a third and three: far from orthogonal, and well enough conditioned for float32.
        rows = (
            torch.exp(torch.empty(rank, 1, dtype=torch.float64).uniform_(-math.log(3), math.log(3), generator=draw))
            * scale
        )
        matrix_RR = rows * rotation
        changed[module] = (
            (b_OR.double() @ torch.linalg.inv(matrix_RR)).to(b_OR.dtype),
            (matrix_RR @ a_RI.double()).to(a_RI.dtype),
        )
    return changed


def read_update(folder: Path, module: str) -> Tensor:
    """ΔW of a module of a written adapter in float64, by the plain rule α/r (or α/√r) of its config: no patterns."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["rank_pattern"], "patterns are not this reader's job"
    assert not config["alpha_pattern"], "patterns are not this reader's job"
    tensors = load_file(folder / "adapter_model.safetensors")
    b_OR, a_RI = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "BA")
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank) * b_OR @ a_RI
