"""Small honest zoos, bundles, models and data: what attackers start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_model, write_stacks
from fuzz.samples import (
    kohya_factors,
    write_components,
    write_diffusers_lora,
    write_flux_zoo,
    write_mlx,
    write_pipeline,
    write_vlora,
)

Get = Callable[[str], Path]
MODULES = {"block.q": (7, 6), "block.v": (5, 8)}


def make_zoo(path: Path, get: Get) -> None:
    """Four checkpoints with a config."""
    stacks = {"block.weight": random_stack(4, (8, 7), 0), "block.bias": random_stack(4, (5,), 1)}
    for folder in write_stacks(path, stacks):
        (folder / "config.json").write_text('{"model_type": "small"}')


def make_bundle(path: Path, get: Get) -> None:
    """Their bundle."""
    ez.fit(get("zoo"), 2).save(path)


def make_adapters(path: Path, get: Get) -> None:
    """Four LoRA adapters."""
    for number in range(4):
        write_adapter(path / f"m{number}", random_factors(MODULES, 2, number))


def make_adapters_bundle(path: Path, get: Get) -> None:
    """Their bundle, factors stacked."""
    ez.fit(get("adapters"), 2).save(path)


def make_quantised_bundle(path: Path, get: Get) -> None:
    """The checkpoints' bundle in four bits, coefficients in half precision."""
    ez.fit(get("zoo"), 2, dtype="nf4", coefficients_dtype="float16").save(path)


def make_tucker_bundle(path: Path, get: Get) -> None:
    """The checkpoints' bundle on all axes."""
    ez.fit(get("zoo"), {"outputs": 3, "inputs": 2, "models": 2}).save(path)


def make_task(path: Path, get: Get) -> None:
    """An adapter file of the bundle, as `eigenzoo adapt` writes them."""
    space = ez.load(get("bundle"))
    metadata = {"format": "eigenzoo-coefficients", "basis": space.manifest.basis_id, "mean": "true"}
    save_file({"coefficients": torch.zeros(4)}, path, metadata)


def make_base(path: Path, get: Get) -> None:
    """A checkpoint that the adapters fit."""
    write_model(path, {f"{module}.weight": random_stack(1, shape, 9)[0] for module, shape in MODULES.items()})


LLAMA_MODULES = {f"model.layers.0.self_attn.{name}_proj": (8, 8) for name in "qv"}


def make_llama(path: Path, get: Get) -> None:
    """A tiny Llama as transformers saves it."""
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes)).save_pretrained(path)


def make_llama_adapter(path: Path, get: Get) -> None:
    """An adapter that fits it."""
    factors = {module: (0.02 * b, 0.02 * a) for module, (b, a) in random_factors(LLAMA_MODULES, 2, 0).items()}
    write_adapter(path, factors, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


def make_vlora(path: Path, get: Get) -> None:
    """A folder as vLoRA saves them."""
    write_vlora(path)


def make_components(path: Path, get: Get) -> None:
    """Two adapters of components and loadings."""
    for name in ("x", "y"):
        write_components(path / name)


def make_kohya(path: Path, get: Get) -> None:
    """Four LoRAs of a diffusion model by kohya's keys."""
    path.mkdir()
    for number in range(4):
        tensors = kohya_factors()
        draw = torch.Generator().manual_seed(number)
        for name, values in tensors.items():
            if values.dim() > 1:
                tensors[name] = torch.randn(values.shape, generator=draw)
        save_file(tensors, path / f"m{number}.safetensors", {"format": "pt"})


def make_diffusers_lora(path: Path, get: Get) -> None:
    """One LoRA of a diffusion model by diffusers' keys, its configs in the header."""
    write_diffusers_lora(path)


def make_mlx(path: Path, get: Get) -> None:
    """Four adapters of mlx-lm."""
    for number in range(4):
        write_mlx(path / f"m{number}", number)


def make_flux(path: Path, get: Get) -> None:
    """Two LoRAs of Flux, one with fused layers and one without."""
    write_flux_zoo(path)


def make_pipelines(path: Path, get: Get) -> None:
    """Three pipelines."""
    for number in range(3):
        write_pipeline(path / f"m{number}")


def write_text_model(folder: Path, seed: int, **sizes: Any) -> None:
    """A tiny BERT with a tokenizer that cuts at white space."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["[PAD]", "[UNK]", "good", "bad", "film"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=12,
        num_labels=2,
    )
    torch.manual_seed(seed)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)


def make_texts_zoo(path: Path, get: Get) -> None:
    """Three tiny classifiers of texts."""
    for number in range(3):
        write_text_model(path / f"m{number}", number)


def make_texts_bundle(path: Path, get: Get) -> None:
    """Their bundle, heads left out."""
    ez.fit(ez.open_zoo(get("texts_zoo"), exclude=["classifier.*"]), 1).save(path)


def make_texts(path: Path, get: Get) -> None:
    """A table of texts."""
    path.mkdir()
    rows = [f"the film {word},{word}" for word in ("good", "bad") * 8]
    (path / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")


def make_pictures_zoo(path: Path, get: Get) -> None:
    """Three tiny classifiers of images."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=2,
    )
    for number in range(3):
        torch.manual_seed(number)
        transformers.ViTForImageClassification(config).save_pretrained(path / f"m{number}")
        processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_resize": True}
        (path / f"m{number}" / "preprocessor_config.json").write_text(json.dumps(processor))


def make_pictures_bundle(path: Path, get: Get) -> None:
    """Their bundle, heads left out."""
    ez.fit(ez.open_zoo(get("pictures_zoo"), exclude=["classifier.*"]), 1).save(path)


def make_pictures(path: Path, get: Get) -> None:
    """Two classes of images."""
    from PIL import Image

    for place, name in enumerate(("dark", "light")):
        (path / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (200 * place + number,) * 3).save(path / name / f"{number}.png")


MAKERS: dict[str, Callable[[Path, Get], None]] = {
    "zoo": make_zoo,
    "bundle": make_bundle,
    "adapters": make_adapters,
    "adapters_bundle": make_adapters_bundle,
    "tucker_bundle": make_tucker_bundle,
    "quantised_bundle": make_quantised_bundle,
    "task.safetensors": make_task,
    "base": make_base,
    "llama": make_llama,
    "llama_adapter": make_llama_adapter,
    "vlora": make_vlora,
    "components": make_components,
    "kohya": make_kohya,
    "diffusers.safetensors": make_diffusers_lora,
    "mlx": make_mlx,
    "flux": make_flux,
    "pipelines": make_pipelines,
    "texts_zoo": make_texts_zoo,
    "texts_bundle": make_texts_bundle,
    "texts": make_texts,
    "pictures_zoo": make_pictures_zoo,
    "pictures_bundle": make_pictures_bundle,
    "pictures": make_pictures,
}

__all__ = ["MAKERS", "load_file"]
