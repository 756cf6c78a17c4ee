"""Which format lies at a path, decided by file names, and of a bare file by its keys; the files are checked by the format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.checkpoint import Checkpoint, StateDict
from eigenzoo.formats.kinds import (
    BUNDLE_FILES,
    FILE_SUFFIXES,
    READABLE,
    kind_of_file,
    kind_of_folder,
    refuse_unreadable,
)
from eigenzoo.formats.lora.diffusion_file import DiffusionLora
from eigenzoo.formats.lora.diffusion_keys import is_diffusion_lora
from eigenzoo.formats.lora.peft_folder import PICKLE_FILE, WEIGHTS_FILE, LoraAdapter, PickleAdapter
from eigenzoo.formats.model import Model
from eigenzoo.formats.paths import list_folder, read_start
from eigenzoo.formats.pickles.file import PickleStateDict
from eigenzoo.formats.pipeline import Pipeline
from eigenzoo.formats.refused import refuse_foreign
from eigenzoo.formats.remote import is_url
from eigenzoo.formats.remote.hub import fetch_model
from eigenzoo.formats.remote.hub_id import find_id
from eigenzoo.formats.remote.mirror import mirror_url
from eigenzoo.formats.remote.record import by_url


def open_model(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Model:
    """Open the model at `path`, at a URL, or of an id of the hub (`org/name@revision`), by its headers.

    URLs and ids are text; a `Path` is a place of this machine.

    Raises FormatError that says what was found where nothing is readable, and UnsupportedError for a pickle without
    `allow_pickle`.
    """
    if isinstance(path, str):
        place = None if is_url(path) else find_id(path)
        path = fetch_model(place, allow_pickle=allow_pickle) if place else mirror_url(path) if is_url(path) else path
    path = Path(path)
    try:
        return _open(path, allow_pickle)
    except FormatError as error:
        raise by_url(error, path) from error.__cause__


def _open(path: Path, allow_pickle: bool) -> Model:
    kind = _kind(path)
    if kind in (None, "state-dict") and os.path.isdir(path) and set(list_folder(path)).issuperset(BUNDLE_FILES):
        raise FormatError(
            "this is a bundle, not a zoo or a model", where=str(path), next_step="name the folder or file of a model"
        )
    openers: dict[str, Callable[[], Model]] = {
        "adapter": lambda: _adapter(path, allow_pickle),
        "checkpoint": lambda: Checkpoint(path),
        "pipeline": lambda: Pipeline(path),
        "state-dict": lambda: _open_bare(path),
        "pickle": lambda: _open_pickle(path, allow_pickle),
    }
    if kind in openers:
        return openers[kind]()
    refuse_unreadable(kind, list_folder(path) if path.is_dir() else [path.name], str(path))
    if kind is None and path.is_file():
        refuse_foreign(read_start(path, 4), str(path))
    raise FormatError(f"no model here: {_found(path)}", where=str(path), rule=READABLE)


def _adapter(path: Path, allow_pickle: bool) -> Model:
    """A pickled adapter is one that has no other weights."""
    pickled = not (path / WEIGHTS_FILE).exists() and (path / PICKLE_FILE).exists()
    return PickleAdapter(path, allow_pickle=allow_pickle) if pickled else LoraAdapter(path)


def _open_bare(path: Path) -> Model:
    """Open one safetensors file: full weights, or by its keys a LoRA of a diffusion model."""
    opened = StateDict(path)
    return DiffusionLora(opened) if is_diffusion_lora(opened.tensors) else opened


def _open_pickle(path: Path, allow_pickle: bool) -> Model:
    opened = PickleStateDict(path, allow_pickle=allow_pickle)
    if is_diffusion_lora(opened.tensors):
        raise UnsupportedError(
            "a LoRA of a diffusion model in a pickle",
            where=str(path),
            rule="such LoRAs are read from .safetensors",
            next_step="save its tensors with safetensors.torch.save_file",
        )
    return opened


def is_model(path: str | Path) -> bool:
    """Tell by file names alone whether `path` is meant to be one model, readable or not."""
    return _kind(Path(path)) is not None


def _kind(path: Path) -> str | None:
    if os.path.isdir(path):
        return kind_of_folder(set(list_folder(path)))
    return kind_of_file(path.name) if os.path.isfile(path) else None


def _found(path: Path) -> str:
    """Describe what lies at a path that is no model."""
    if not path.exists():
        return "nothing of this name exists"
    if not path.is_dir():
        return f"a file with the ending {path.suffix!r}"
    names = list_folder(path)
    if not names:
        return "an empty folder"
    weights = sum(name.endswith(FILE_SUFFIXES) for name in names)
    if weights > 1:
        return f"a folder with {weights} weight files, which are several models (open them one by one, or as a zoo)"
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"a folder with {shown}"
