"""Which kind of model a folder's names are meant to be: names alone, wherever they were listed."""

from __future__ import annotations

import re
from collections.abc import Collection

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.lora_config import CONFIG_FILE

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEXES = tuple(f"{name}.index.json" for name in WEIGHTS)
PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
PICKLE_FILE = "pytorch_model.bin"

READABLE = (
    f"readable are a PEFT adapter ({CONFIG_FILE} beside its weights), a checkpoint ({', '.join(WEIGHTS)}, or its "
    "index with the shards), a .safetensors file or a folder with exactly one, and with --allow-pickle .pt, .pth, .bin"
)

_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")


def kind_of_file(name: str) -> str | None:
    """Return the kind of a single file: `state-dict`, `pickle`, or None."""
    if name.endswith(".safetensors"):
        return "state-dict"
    return "pickle" if name.endswith(PICKLE_SUFFIXES) else None


def kind_of_folder(names: Collection[str]) -> str | None:
    """Return the kind of a folder with these names; None where it is no model."""
    if CONFIG_FILE in names:
        return "adapter"
    if any(name in names for name in (*WEIGHTS, *INDEXES)):
        return "checkpoint"
    if any(_SHARD.fullmatch(name) and name.endswith(".safetensors") for name in names):
        return "shards"
    found = [name for name in names if name.endswith(".safetensors")]
    if found:
        return "state-dict" if len(found) == 1 else None
    if f"{PICKLE_FILE}.index.json" in names or any(_SHARD.fullmatch(name) for name in names):
        return "pickle-shards"
    return "pickle" if PICKLE_FILE in names or len(pickle_names(names)) == 1 else None


def pickle_names(names: Collection[str]) -> list[str]:
    """Give the names of pickles that may hold weights; a trainer's own state is none."""
    states = ("training_args", "optimizer", "scheduler", "rng_")
    return [name for name in names if name.endswith(PICKLE_SUFFIXES) and not name.startswith(states)]


def refuse_shards(kind: str | None, where: str) -> None:
    """Refuse kinds that are no whole model."""
    if kind == "shards":
        raise FormatError(
            "shards of a checkpoint without their index",
            where=where,
            rule=f"an index is {' or '.join(INDEXES)}",
            next_step="download the index too",
        )
    if kind == "pickle-shards":
        raise UnsupportedError(
            "a checkpoint of pickled shards", where=where, next_step="convert the model to safetensors"
        )
