"""Small models, adapters and bundles, written by eigenzoo itself: what inputs are grown from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import eigenzoo as ez
from eigenzoo.formats.dtypes import dtype_name
from eigenzoo.formats.model import Model
from eigenzoo.formats.writers import TensorLayout, layout_of, write_tensors

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "rank_pattern": {"block.q": 2},
    "alpha_pattern": {r"block\.[qv]": 8},
    "target_modules": ["q", "v"],
    "bias": "none",
}
MODULES = {"block.q": (5, 4), "block.v": (3, 6)}


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = [TensorLayout(name, dtype_name(value.dtype), tuple(value.shape)) for name, value in tensors.items()]
    write_tensors(path, layout, tensors.__getitem__, metadata or {"format": "pt"}, sync=False)
    return path


def weights(place: int) -> dict[str, Tensor]:
    """The tensors of one small model."""
    draw = torch.Generator().manual_seed(place)
    return {
        "block.weight": torch.randn(6, 5, generator=draw),
        "block.bias": torch.randn(5, generator=draw),
        "steps": torch.tensor([place]),
    }


def write_models(folder: Path, num_models: int = 4) -> list[Path]:
    """Write checkpoints m0, m1, …; returns their folders."""
    paths = [folder / f"m{place}" for place in range(num_models)]
    for place, path in enumerate(paths):
        write_file(path / "model.safetensors", weights(place))
        (path / "config.json").write_text('{"model_type": "small", "quantization_config": null}')
    return paths


def write_shards(folder: Path) -> Path:
    """Write one checkpoint of two shards and an index."""
    names = {
        "model-00001-of-00002.safetensors": ["block.weight"],
        "model-00002-of-00002.safetensors": ["block.bias", "steps"],
    }
    for file, tensors in names.items():
        write_file(folder / file, {name: weights(0)[name] for name in tensors})
    index = {
        "metadata": {"total_size": 148},
        "weight_map": {name: file for file, found in names.items() for name in found},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, place: int = 0) -> Path:
    """Write one LoRA adapter."""
    draw = torch.Generator().manual_seed(place)
    factors = {}
    for module, (outputs, inputs) in MODULES.items():
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, inputs, generator=draw)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, 2, generator=draw)
    write_file(folder / "adapter_model.safetensors", factors)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def fit_small(folder: Path, form: str) -> ez.Subspace:
    """Fit a small zoo: `flat`, `tucker` or `stacked`."""
    adapters = form == "stacked"
    paths = [write_adapter(folder / f"m{n}", n) for n in range(4)] if adapters else write_models(folder)
    return ez.fit(paths, {"models": 2, "outputs": 3} if form == "tucker" else {"models": 2}, cache=False)


def write_bundle(folder: Path, form: str) -> Path:
    """Write a small bundle."""
    return fit_small(folder / "zoo", form).save(folder / "bundle")


def read_all(model: Model) -> None:
    """Read everything of a model, as a fit does and as a bundle keeps it."""
    for name in model.tensors:
        model.read(name)
    for module in model.updates:
        model.read_factors(module)
    for file in model.side_files:
        model.read_side_file(file)
    layout_of(model).from_json(layout_of(model).to_json())


def use_bundle(path: Path) -> Callable[[], object]:
    """Give a call that loads a bundle, verifies it, and rebuilds all of its models."""

    def use() -> None:
        space = ez.load(path)
        list(space.verify())
        for name in space.names:
            rebuilt = space.rebuild(name)
            for layer in space.layers:
                rebuilt.layer(layer)
        if space.has_moments:
            for layer in space.layers:
                _ = space.moments(layer).energies_N

    return use
