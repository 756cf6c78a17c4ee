"""Which format lies at a path, decided by file names; the files themselves are checked by the format."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.checkpoint import INDEXES, WEIGHTS, Checkpoint, StateDict
from eigenzoo.formats.lora_config import CONFIG_FILE
from eigenzoo.formats.model import Model
from eigenzoo.formats.paths import list_folder
from eigenzoo.formats.peft_lora import LoraAdapter
from eigenzoo.formats.pickle_file import FOLDER_FILE, SUFFIXES, PickleStateDict, pickles_of
from eigenzoo.formats.side_files import SIDE_FILES

_READABLE = (
    f"readable are a PEFT adapter ({CONFIG_FILE} beside its weights), a checkpoint ({', '.join(WEIGHTS)}, or its "
    "index with the shards), a .safetensors file or a folder with exactly one, and with --allow-pickle .pt, .pth, .bin"
)
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")


def open_model(path: str | Path, *, allow_pickle: bool = False) -> Model:
    """Open the model at `path` by its headers.

    Raises FormatError that says what was found where nothing is readable, and UnsupportedError for a pickle without
    `allow_pickle`.
    """
    path = Path(path)
    kind = _kind(path)
    openers: dict[str, Callable[[], Model]] = {
        "adapter": lambda: LoraAdapter(path),
        "checkpoint": lambda: Checkpoint(path),
        "state-dict": lambda: StateDict(path),
        "pickle": lambda: PickleStateDict(path, allow_pickle=allow_pickle),
    }
    if kind in openers:
        return openers[kind]()
    if kind == "shards":
        raise FormatError(
            "shards of a checkpoint without their index",
            where=str(path),
            rule=f"an index is {' or '.join(INDEXES)}",
            next_step="download the index too",
        )
    if kind == "pickle-shards":
        raise UnsupportedError(
            "a checkpoint of pickled shards", where=str(path), next_step="convert the model to safetensors"
        )
    raise FormatError(f"no model here: {_found(path)}", where=str(path), rule=_READABLE)


def is_model(path: str | Path) -> bool:
    """Tell by file names alone whether `path` is meant to be one model, readable or not."""
    return _kind(Path(path)) is not None


def is_only_a_model(folder: Path) -> bool:
    """Tell whether a folder is a model and nothing else, so that replacing it removes nobody's other files."""
    return is_model(folder) and all(
        path.is_file() and (path.suffix == ".safetensors" or path.name in {*SIDE_FILES, *INDEXES, CONFIG_FILE})
        for path in folder.iterdir()
    )


def _kind(path: Path) -> str | None:
    if path.is_file():
        if path.suffix == ".safetensors":
            return "state-dict"
        return "pickle" if path.suffix in SUFFIXES else None
    if not path.is_dir():
        return None
    names = set(list_folder(path))
    if CONFIG_FILE in names:
        return "adapter"
    if names & {*WEIGHTS, *INDEXES}:
        return "checkpoint"
    if any(_SHARD.fullmatch(name) and name.endswith(".safetensors") for name in names):
        return "shards"
    found = [name for name in names if name.endswith(".safetensors")]
    if found:
        return "state-dict" if len(found) == 1 else None
    if f"{FOLDER_FILE}.index.json" in names or any(_SHARD.fullmatch(name) for name in names):
        return "pickle-shards"
    return "pickle" if FOLDER_FILE in names or len(pickles_of(path)) == 1 else None


def _found(path: Path) -> str:
    """Describe what lies at a path that is no model."""
    if not path.exists():
        return "nothing of this name exists"
    if not path.is_dir():
        return f"a file with the ending {path.suffix!r}"
    names = list_folder(path)
    if not names:
        return "an empty folder"
    weights = sum(name.endswith((".safetensors", *SUFFIXES)) for name in names)
    if weights > 1:
        return f"a folder with {weights} weight files, which are several models (open them one by one, or as a zoo)"
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"a folder with {shown}"
