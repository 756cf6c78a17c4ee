"""A zoo that vLoRA itself fitted, in each way that it can, and what is asked of a bundle of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vlora
import vlora.cli

import eigenzoo as ez
from builders import random_factors, write_adapter

MODULES = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.mlp.up_proj": (32, 16)}
TASKS = ("sql", "chat two", "a/b", "code", "poems")
SCALE = 4.0
"""Of adapters of rank 3 with alpha 12."""


def write_zoo(root: Path) -> list[vlora.LoRAWeights]:
    """Five adapters of two modules around one mean, opened by vLoRA."""
    shared = random_factors(MODULES, 3, 99)
    adapters = []
    for number in range(len(TASKS)):
        own = random_factors(MODULES, 3, number)
        factors = {
            module: tuple(b + 0.3 * o for b, o in zip(shared[module], own[module], strict=True)) for module in own
        }
        adapters.append(vlora.load_adapter(write_adapter(root / f"a{number}", factors, lora_alpha=12)))
    return adapters


def fitted(root: Path, **options: Any) -> vlora.SharedSubspace:
    return vlora.SharedSubspace.from_adapters(write_zoo(root / "zoo"), task_ids=list(TASKS), **options)


def absorbed(root: Path) -> vlora.SharedSubspace:
    """Two tasks fitted, the others absorbed one by one."""
    adapters = write_zoo(root / "zoo")
    shared = vlora.SharedSubspace.from_adapters(adapters[:2], task_ids=list(TASKS[:2]), num_components=2)
    for adapter, task in zip(adapters[2:], TASKS[2:], strict=True):
        shared.absorb_incremental(adapter, task)
    return shared


def projected(root: Path) -> vlora.SharedSubspace:
    """Tasks that took no part in the fit: the mean is not theirs."""
    adapters = write_zoo(root / "zoo")
    shared = vlora.SharedSubspace.from_adapters(adapters[:3], task_ids=list(TASKS[:3]), num_components=2)
    for adapter, task in zip(adapters[3:], TASKS[3:], strict=True):
        shared.add_task(shared.project(adapter, task))
    return shared


def leaning(root: Path) -> vlora.SharedSubspace:
    """Directions that are neither orthogonal nor of norm one, and one of them twice."""
    shared = fitted(root, num_components=3)
    for directions in (shared.components_a, shared.components_b):
        for layer, rows in directions.items():
            directions[layer] = torch.tensor([[1.0, 0.5, 0.0], [-2.0, 3.0, 1.0], [1.0, 0.5, 0.0]]) @ rows
    return shared


def doubled(root: Path) -> vlora.SharedSubspace:
    return fitted(root, num_components=2).to(dtype=torch.float64)


KINDS: dict[str, Callable[[Path], vlora.SharedSubspace]] = {
    "components": lambda root: fitted(root, num_components=2),
    "the mean alone": lambda root: fitted(root, num_components=0),
    "everything": lambda root: fitted(root, num_components=5),
    "adaptive": lambda root: fitted(root, adaptive_k=True, variance_threshold=0.9),
    "absorbed": absorbed,
    "projected": projected,
    "leaning": leaning,
    "quantised in place": lambda root: quantised(root),
    "float64": doubled,
}


def quantised(root: Path) -> vlora.SharedSubspace:
    shared = fitted(root, num_components=2)
    shared.quantize(bits=4)
    return shared


def assert_same(space: ez.Subspace, shared: vlora.SharedSubspace, scale: float = SCALE) -> None:
    """All tasks of a bundle are what vLoRA reconstructs, to 1e-6 of the largest value."""
    assert space.names == tuple(shared.tasks)
    for task in shared.tasks:
        expected, rebuilt = shared.reconstruct(task), space.rebuild(task)
        for layer in expected.layer_names:
            for factor, values, times in (("A", expected.lora_a, 1.0), ("B", expected.lora_b, scale)):
                wanted = values[layer].double() * times
                error = float((rebuilt.layer(f"{layer}.lora_{factor}") - wanted).abs().max() / wanted.abs().max())
                assert error < 1e-6, (task, layer, factor, error)


def edit_meta(folder: Path, **changes: Any) -> None:
    """Change entries of vLoRA's metadata; None removes them."""
    path = folder / "subspace_meta.json"
    meta = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))
