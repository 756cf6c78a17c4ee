"""Collections of made models that lie near a planted subspace: LoRA adapters and checkpoints, on disk as real ones are.

    model  =  mean + spread · (Σ strength_k · c_k · direction_k + noise) / √3

with c and noise standard normal: two thirds of the variance lie in the planted directions, whose own variances fall by four
from the first to the last. The directions of a tensor are windows of one normal vector, a stride apart: as good as
independent, and nothing to hold in memory. A model depends on the recipe and its number alone: the first 100 of 500 are the 100.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STAMP = "collection.json"
"""Written last: the recipe, and how many models are there."""

PARENT = "parent"
STRIDE, CHUNK = 61, 8192
PLANTED_VARIANCE, FALL = 2.0, 4.0
"""Variance of a value in all planted directions together, that of the noise being one; the first direction's over the last's."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Values:
    """One tensor of a model: key in the file, name as a layer, and the deviations of the mean's values and of models about it."""

    key: str
    name: str
    shape: tuple[int, ...]
    level: float
    spread: float
    offset: float = 0.0

    @property
    def num_values(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class AdapterRecipe:
    """LoRA adapters of q, k and v; by default of Mistral-7B's shapes. The A's share an initialisation, as those of one seed do."""

    num_layers: int = 8
    hidden: int = 4096
    kv: int = 1024
    rank: int = 16
    planted: int = 16
    seed: int = 0
    kind = "lora"
    file = "adapter_model.safetensors"
    stem = "adapter"
    scale = 2.0

    @property
    def title(self) -> str:
        return f"lora-{self.hidden}x{self.num_layers}"

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of every adapted module."""
        sides = {"q_proj": self.hidden, "k_proj": self.kv, "v_proj": self.kv}
        return {
            f"model.layers.{layer}.self_attn.{module}": (outputs, self.hidden)
            for layer in range(self.num_layers)
            for module, outputs in sides.items()
        }

    def tensors(self) -> list[Values]:
        found = []
        for module, (outputs, inputs) in self.modules.items():
            spread = inputs**-0.5
            for factor, shape, level in (("A", (self.rank, inputs), spread), ("B", (outputs, self.rank), spread / 4)):
                name = f"{module}.lora_{factor}"
                found.append(Values(f"base_model.model.{name}.weight", name, shape, level, spread))
        return found

    def config(self) -> tuple[str, dict[str, Any]]:
        return "adapter_config.json", {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.scale * self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "base_model_name_or_path": "synthetic",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }


@dataclass(frozen=True)
class CheckpointRecipe:
    """Fine-tunes of one vision transformer, 1 % from it, as transformers stores them; by default ViT-B/16 with 86.6 M weights."""

    hidden: int = 768
    depth: int = 12
    mlp: int = 3072
    image: int = 224
    patch: int = 16
    num_labels: int = 1000
    planted: int = 16
    seed: int = 0
    kind = "vit"
    file = "model.safetensors"
    stem = "vit"
    scale = 1.0

    @property
    def title(self) -> str:
        return f"vit-{self.hidden}x{self.depth}"

    def tensors(self) -> list[Values]:
        hidden, mlp = self.hidden, self.mlp
        shapes: dict[str, tuple[int, ...]] = {
            "vit.embeddings.cls_token": (1, 1, hidden),
            "vit.embeddings.position_embeddings": (1, (self.image // self.patch) ** 2 + 1, hidden),
            "vit.embeddings.patch_embeddings.projection.weight": (hidden, 3, self.patch, self.patch),
            "vit.embeddings.patch_embeddings.projection.bias": (hidden,),
        }
        for layer in range(self.depth):
            block = {
                **{f"attention.attention.{part}": (hidden, hidden) for part in ("query", "key", "value")},
                "attention.output.dense": (hidden, hidden),
                "intermediate.dense": (mlp, hidden),
                "output.dense": (hidden, mlp),
                "layernorm_before": (hidden,),
                "layernorm_after": (hidden,),
            }
            for part, shape in block.items():
                shapes[f"vit.encoder.layer.{layer}.{part}.weight"] = shape
                shapes[f"vit.encoder.layer.{layer}.{part}.bias"] = shape[:1]
        shapes |= {"vit.layernorm.weight": (hidden,), "vit.layernorm.bias": (hidden,)}
        shapes |= {"classifier.weight": (self.num_labels, hidden), "classifier.bias": (self.num_labels,)}
        level = 0.02
        return [
            Values(name, name, shape, level, level / 100, float("layernorm" in name and name.endswith("weight")))
            for name, shape in shapes.items()
        ]

    def config(self) -> tuple[str, dict[str, Any]]:
        return "config.json", {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.depth,
            "num_attention_heads": max(1, self.hidden // 64),
            "intermediate_size": self.mlp,
            "image_size": self.image,
            "patch_size": self.patch,
            "id2label": {str(label): str(label) for label in range(self.num_labels)},
            "label2id": {str(label): label for label in range(self.num_labels)},
        }


Recipe = AdapterRecipe | CheckpointRecipe
RECIPES: dict[str, type[AdapterRecipe] | type[CheckpointRecipe]] = {"lora": AdapterRecipe, "vit": CheckpointRecipe}


class Collection:
    """The first `num_models` models of a folder, read straight from their files: for truth, ceiling and peers without a reader."""

    def __init__(self, recipe: Recipe, folder: Path, num_models: int) -> None:
        self.recipe, self.folder, self.num_models = recipe, folder, num_models
        self.paths = [folder / f"{recipe.stem}-{place:04d}" for place in range(num_models)]
        self.files = [path / recipe.file for path in self.paths]
        self.tensors = {tensor.name: tensor for tensor in recipe.tensors()}

    @property
    def parent(self) -> Path | None:
        """The checkpoint that all are fine-tunes of."""
        return self.folder / PARENT if self.recipe.kind == "vit" else None

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all weights of all models."""
        return 4 * self.num_models * sum(tensor.num_values for tensor in self.tensors.values())

    def sample(self) -> list[str]:
        """One layer of every kind, from the middle of the depth: where directions are compared."""
        kinds: dict[str, list[str]] = {}
        for name in self.tensors:
            kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(name)
        return [names[len(names) // 2] for names in kinds.values()]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Values start:stop of one layer of all models, (N, stop − start) float32."""
        tensor = self.tensors[name]
        stop = tensor.num_values if stop is None else stop
        found = np.empty((self.num_models, stop - start), np.float32)
        for row, file in zip(found, self.files, strict=True):
            first = _offsets(file)[tensor.key] + 4 * start
            descriptor = os.open(file, os.O_RDONLY)
            try:
                view, done = memoryview(row).cast("B"), 0
                while done < len(view):
                    done += os.preadv(descriptor, [view[done:]], first + done)
            finally:
                os.close(descriptor)
        return found

    def blocks(self, name: str, block_bytes: int = 2**26) -> Iterator[Array]:
        """One layer of all models, a run of columns after the other."""
        width = max(1, block_bytes // (4 * self.num_models))
        num_values = self.tensors[name].num_values
        for start in range(0, num_values, width):
            yield self.rows(name, start, min(start + width, num_values))


@cache
def _offsets(file: Path) -> Mapping[str, int]:
    """Where each tensor of a safetensors file begins."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    if any(entry["dtype"] != "F32" for key, entry in header.items() if key != "__metadata__"):
        raise ValueError(f"{file}: not a made model, which is float32 throughout")
    return {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def make(recipe: Recipe, num_models: int, home: Path, tell: Callable[[str], None] = lambda text: None) -> Collection:
    """Return the first models of a recipe, made now unless they are in `home` already; an interrupted run goes on where it was."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:8]
    folder = home / f"{recipe.title}-{digest}"
    found = Collection(recipe, folder, num_models)
    if _stamped(folder) < num_models:
        missing = num_models - sum(path.is_dir() for path in found.paths)
        needed = missing * found.num_bytes // num_models
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > 0.95 * free:
            sys.exit(
                f"{needed / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free; choose another --folder"
            )
        tell(f"making {missing} models of {recipe.title}, {needed / 1e9:.2f} GB")
        _write(recipe, num_models, folder)
        stamp = {"kind": recipe.kind, "recipe": asdict(recipe), "num_models": num_models}
        staging = folder / f".{STAMP}"
        staging.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        staging.replace(folder / STAMP)
    return found


def read_collection(folder: Path, num_models: int) -> Collection:
    """Return a collection that `make` has made."""
    stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    return Collection(RECIPES[stamp["kind"]](**stamp["recipe"]), folder, num_models)


def _stamped(folder: Path) -> int:
    try:
        return int(json.loads((folder / STAMP).read_text(encoding="utf-8"))["num_models"])
    except FileNotFoundError:
        return 0


def write_adapters(
    folder: Path, num_models: int, *, num_layers: int = 4, rank: int = 16, planted: int = 8, seed: int = 0
) -> None:
    """Write adapters of Mistral-7B's shapes straight into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(AdapterRecipe(num_layers=num_layers, rank=rank, planted=planted, seed=seed), num_models, folder)


def _write(recipe: Recipe, num_models: int, folder: Path) -> None:
    tensors = recipe.tensors()
    shared = [_shared(recipe, place, tensor) for place, tensor in enumerate(tensors)]
    if recipe.kind == "vit" and not (folder / PARENT).is_dir():
        means = (mean for mean, _ in shared)
        _write_model(recipe, folder / PARENT, dict(zip(tensors, means, strict=True)))
    strengths = FALL ** -np.linspace(0, 0.5, recipe.planted)
    strengths = (strengths * (PLANTED_VARIANCE / (strengths**2).sum()) ** 0.5).astype(np.float32)
    for place in range(num_models):
        home = folder / f"{recipe.stem}-{place:04d}"
        if home.is_dir():
            continue
        draw = np.random.Generator(np.random.SFC64([recipe.seed, 1, place]))
        values = {}
        for tensor, (mean, windows) in zip(tensors, shared, strict=True):
            weights = strengths * draw.standard_normal(recipe.planted, dtype=np.float32)
            values[tensor] = _model_values(mean, windows, weights, tensor.spread / 3**0.5, draw)
        _write_model(recipe, home, values)


def _shared(recipe: Recipe, place: int, tensor: Values) -> tuple[Array, Array]:
    """The mean (D,) of one tensor, and its planted directions (K, D), unnormalised."""
    draw = np.random.Generator(np.random.SFC64([recipe.seed, 0, place]))
    mean = draw.standard_normal(tensor.num_values, dtype=np.float32) * np.float32(tensor.level) + np.float32(
        tensor.offset
    )
    base = draw.standard_normal(tensor.num_values + STRIDE * recipe.planted, dtype=np.float32)
    shape, strides = (recipe.planted, tensor.num_values), (4 * STRIDE, 4)
    return mean, np.lib.stride_tricks.as_strided(base, shape, strides, writeable=False)


def _model_values(mean: Array, windows: Array, weights: Array, spread: float, draw: np.random.Generator) -> Array:
    values = draw.standard_normal(mean.size, dtype=np.float32)
    for start in range(0, mean.size, CHUNK):
        part = slice(start, start + CHUNK)
        values[part] += weights @ windows[:, part]
    values *= np.float32(spread)
    values += mean
    return values


def _write_model(recipe: Recipe, home: Path, values: Mapping[Values, Array]) -> None:
    from safetensors.numpy import save_file

    from eigenzoo.formats.output.whole import new_folder

    with new_folder(home) as staging:
        tensors = {tensor.key: value.reshape(tensor.shape) for tensor, value in values.items()}
        save_file(tensors, staging / recipe.file, metadata={"format": "pt"})
        name, config = recipe.config()
        (staging / name).write_text(json.dumps(config), encoding="utf-8")
