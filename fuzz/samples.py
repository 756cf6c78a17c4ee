"""Small models, adapters and bundles, written by eigenzoo itself: what inputs are grown from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eigenzoo as ez
from eigenzoo.formats.model import Model
from eigenzoo.formats.safetensors.dtypes import dtype_name
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


def write_adapter(folder: Path, place: int = 0, modules: Sequence[str] = tuple(MODULES)) -> Path:
    """Write one LoRA adapter of these modules."""
    draw = torch.Generator().manual_seed(place)
    factors = {}
    for module in modules:
        outputs, inputs = MODULES[module]
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, inputs, generator=draw)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, 2, generator=draw)
    write_file(folder / "adapter_model.safetensors", factors)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def fit_small(folder: Path, form: str, **options: Any) -> ez.Subspace:
    """Fit a small zoo: `flat`, `tucker` or `stacked`."""
    adapters = form == "stacked"
    paths = [write_adapter(folder / f"m{n}", n) for n in range(4)] if adapters else write_models(folder)
    return ez.fit(paths, {"models": 2, "outputs": 3} if form == "tucker" else {"models": 2}, cache=False, **options)


def write_bundle(folder: Path, form: str, **options: Any) -> Path:
    """Write a small bundle."""
    return fit_small(folder / "zoo", form, **options).save(folder / "bundle")


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


def training_checkpoint() -> dict[str, object]:
    """What a training script saves: an average beside the weights, prefixed names, and a counter."""
    average = {f"module.{name}": value for name, value in weights(1).items()}
    return {"epoch": 3, "state_dict": weights(0), "state_dict_ema": average, "pytorch-lightning_version": "2.0"}


def write_pickled_shards(folder: Path) -> Path:
    """Write a checkpoint of two pickled shards; returns its index."""
    folder.mkdir(parents=True)
    files = {name: f"pytorch_model-0000{place}-of-00003.bin" for place, name in enumerate(weights(0), 1)}
    for name, file in files.items():
        torch.save({name: weights(0)[name]}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 148}, "weight_map": files}))
    return index


def write_pipeline(folder: Path) -> Path:
    """Write a pipeline of diffusers with two components."""
    for component, file in {"unet": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        write_file(folder / component / f"{file}.safetensors", weights(0))
        (folder / component / "config.json").write_text('{"a": 1}')
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "Pipeline", **parts, "safety_checker": [None, None]})
    )
    return folder


def kohya_factors() -> dict[str, Tensor]:
    """The tensors of a LoRA by kohya's keys: a linear layer, a convolution, one of SGM's names, and one without alpha."""
    factors: dict[str, Tensor] = {}
    stems = {
        "lora_unet_mid_block_attentions_0_proj_in": (5, 4),
        "lora_unet_input_blocks_4_1_proj_in": (5, 4),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3, 6),
    }
    for stem, (outputs, inputs) in stems.items():
        factors |= {f"{stem}.lora_down.weight": torch.ones(2, inputs), f"{stem}.lora_up.weight": torch.ones(outputs, 2)}
    convolution = "lora_unet_mid_block_resnets_0_conv1"
    factors[f"{convolution}.lora_down.weight"] = torch.ones(2, 4, 3, 3)
    factors[f"{convolution}.lora_up.weight"] = torch.ones(6, 2, 1, 1)
    return factors | {f"{stem}.alpha": torch.tensor(1.0) for stem in (convolution, *list(stems)[:2])}


def write_diffusers_lora(path: Path, num_layers: int = 2) -> Path:
    """Write a LoRA by diffusers' keys, of one layer or two, with the config that its header holds."""
    factors = {}
    modules = ("unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1")
    for module in modules[:num_layers]:
        factors |= {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(5, 2)}
    config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"proj_in": 2}, "unet.use_rslora": True}
    return write_file(path, factors, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})


def write_mlx(folder: Path, place: int = 0) -> Path:
    """Write an adapter as mlx-lm saves it."""
    draw = torch.Generator().manual_seed(place)
    factors = {}
    for module, (outputs, inputs) in {**MODULES, "model.embed_tokens": (3, 7)}.items():
        factors[f"{module}.lora_a"] = torch.randn(inputs, 2, generator=draw)
        factors[f"{module}.lora_b"] = torch.randn(2, outputs, generator=draw)
    write_file(folder / "adapters.safetensors", factors)
    config = {"model": "org/base", "fine_tune_type": "lora", "num_layers": 4}
    config["lora_parameters"] = {"rank": 2, "scale": 2.5, "dropout": 0.0, "alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_flux_zoo(folder: Path) -> Path:
    """Write two LoRAs of Flux, the first with q, k and v fused, by kohya's keys, the second with them apart; returns the first."""
    fused, apart = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_"
    factors = {f"{apart}{side}.lora_{letter}.weight": torch.ones(2, 2) for side in "qkv" for letter in "AB"}
    write_file(folder / "apart.safetensors", factors)
    held = {f"{fused}.lora_down.weight": torch.ones(2, 2), f"{fused}.lora_up.weight": torch.ones(6, 2)}
    return write_file(folder / "fused.safetensors", {**held, f"{fused}.alpha": torch.tensor(1.0)})


def write_vlora(folder: Path) -> Path:
    """Write a folder as vLoRA does: two tasks, two directions of each factor."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": {module: [2, inputs] for module, (_, inputs) in MODULES.items()}}
    shapes["b"] = {module: [outputs, 2] for module, (outputs, _) in MODULES.items()}
    values, loadings = {}, {}
    for letter, of_modules in shapes.items():
        for module, (rows, columns) in of_modules.items():
            values[f"{module}.components_{letter}"] = torch.linalg.qr(torch.randn(rows * columns, 2, generator=draw))[
                0
            ].T
            values[f"{module}.mean_{letter}"] = torch.ones(rows * columns)
            values[f"{module}.sv_{letter}"] = torch.ones(2)
            loadings[f"{module}.loadings_{letter}"] = torch.ones(2)
    contiguous = {name: value.contiguous() for name, value in values.items()}
    write_file(folder / "subspace.safetensors", contiguous)
    about = {"layer_names": [*MODULES], "task_ids": ["x", "y"], "rank": 2, "num_components": 2}
    about |= {"task_filenames": {"x": "x", "y": "y"}, "shapes_a": shapes["a"], "shapes_b": shapes["b"]}
    for task in "xy":
        write_file(folder / f"task_{task}.safetensors", loadings)
    (folder / "subspace_meta.json").write_text(json.dumps(about))
    return folder


def write_components(folder: Path) -> Path:
    """Write an adapter of components and loadings."""
    tensors = {}
    for module, (outputs, inputs) in MODULES.items():
        for letter, side in (("A", inputs), ("B", outputs)):
            stem = f"base_model.model.{module}.subspaceadapter_{letter}"
            tensors |= {f"{stem}.components": torch.eye(side)[:, :2].contiguous(), f"{stem}.loadings": torch.ones(2, 2)}
    write_file(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SUBSPACEADAPTER", "r": 2}))
    return folder
