"""Which kind of model a folder's names are meant to be: names alone, wherever they were listed."""

from __future__ import annotations

import re
from collections.abc import Collection

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.refused import FOREIGN, is_foreign, refuse_foreign

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEXES = tuple(f"{name}.index.json" for name in WEIGHTS)
MODEL_INDEX = "model_index.json"
"""What a diffusers pipeline is made of."""

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
FILE_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, ".gguf")
"""Endings of files in a folder that are models; a GGUF file is found to be refused by name."""
PICKLE_FILE = "pytorch_model.bin"
DIFFUSION_PICKLE = "diffusion_pytorch_model.bin"
"""The oldest pipelines are one network, whose weights lie beside the index."""

PICKLE_INDEX = f"{PICKLE_FILE}.index.json"

BUNDLE_FILES = ("manifest.json", "basis.safetensors")
"""What every bundle has, and no model."""

USE_OF_BUNDLE = "use evidence, report, verify, project, rebuild or add on it, or name the models it was made from"

READABLE = (
    f"eigenzoo reads a PEFT adapter ({CONFIG_FILE} beside its weights), an mlx-lm adapter, a checkpoint ({', '.join(WEIGHTS)}, or "
    f"its index with the shards), a diffusers pipeline ({MODEL_INDEX} and its components), a .safetensors file or a folder "
    f"with exactly one, and with --allow-pickle {', '.join(PICKLE_SUFFIXES)}"
)

_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")


def weights_stem(name: str) -> str:
    """Return a weights file's name without its ending.

    >>> weights_stem("checkpoint-3.pth.tar"), weights_stem("m.v2.safetensors")
    ('checkpoint-3', 'm.v2')
    """
    return name.removesuffix(max((ending for ending in FILE_SUFFIXES if name.endswith(ending)), key=len, default=""))


def kind_of_file(name: str) -> str | None:
    """Return the kind of a single file: `state-dict`, `pickle`, `foreign`, or None."""
    if name.endswith(".safetensors"):
        return "state-dict"
    if name.endswith(PICKLE_SUFFIXES):
        return "pickle"
    return "foreign" if name.endswith(tuple(FOREIGN)) else None


def kind_of_folder(names: Collection[str]) -> str | None:
    """Return the kind of a folder with these names; None where it is no model."""
    if CONFIG_FILE in names:
        return "adapter"
    if any(name in names for name in (*WEIGHTS, *INDEXES)):
        return "checkpoint"
    if MODEL_INDEX in names and DIFFUSION_PICKLE not in names:
        return "pipeline"
    if any(_SHARD.fullmatch(name) and name.endswith(".safetensors") for name in names):
        return "shards"
    weights = [name for name in names if name.endswith(".safetensors")]
    if weights:
        return "state-dict" if len(weights) == 1 else None
    if PICKLE_FILE in names or PICKLE_INDEX in names:
        return "pickle"
    if any(_SHARD.fullmatch(name) for name in names):
        return "pickle-shards"
    if len(pickle_names(names)) == 1:
        return "pickle"
    return "foreign" if any(is_foreign(name) for name in names) else None


def pickle_names(names: Collection[str]) -> list[str]:
    """Give the names of pickles that may hold weights; a trainer's own state is none."""
    states = ("training_args", "optimizer", "scheduler", "rng_")
    return [name for name in names if name.endswith(PICKLE_SUFFIXES) and not name.startswith(states)]


def refuse_unreadable(kind: str | None, names: Collection[str], where: str) -> None:
    """Refuse kinds that are no whole model, and models of other kinds by their name."""
    if kind == "foreign":
        refuse_foreign(next((name for name in sorted(names) if is_foreign(name)), next(iter(names))), where)
    if kind == "shards":
        raise FormatError(
            "there are shards of a checkpoint, but no index",
            where=where,
            rule=f"the index is {' or '.join(INDEXES)}",
            next_step="download the index too",
        )
    if kind == "pickle-shards":
        raise UnsupportedError(
            "there are pickled shards of a checkpoint, but no index",
            where=where,
            rule=f"the index is {PICKLE_INDEX}",
            next_step="download the index too, or convert the model to safetensors",
        )
