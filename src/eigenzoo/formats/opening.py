"""Which format lies at a path, decided by file names, and of a bare file by its keys; the files are checked by the format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.checkpoint import Checkpoint, StateDict
from eigenzoo.formats.kinds import (
    FILE_SUFFIXES,
    READABLE,
    kind_of_file,
    kind_of_folder,
    refuse_unreadable,
)
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.lora.diffusion_file import DiffusionLora
from eigenzoo.formats.lora.factor_names import DIFFUSION, MLX, PEFT, factor_kind
from eigenzoo.formats.lora.mlx_folder import MLX_FILE, MlxAdapter
from eigenzoo.formats.lora.peft_folder import PICKLE_FILE, WEIGHTS_FILE, LoraAdapter, PickleAdapter
from eigenzoo.formats.model import Model
from eigenzoo.formats.paths import did_you_mean, list_folder, read_start
from eigenzoo.formats.pickles.file import PickleStateDict
from eigenzoo.formats.pipeline import Pipeline
from eigenzoo.formats.refused import refuse_foreign
from eigenzoo.formats.remote import is_url
from eigenzoo.formats.remote.hub import fetch_model
from eigenzoo.formats.remote.hub_id import find_id
from eigenzoo.formats.remote.mirror import mirror_url
from eigenzoo.formats.remote.record import by_url
from eigenzoo.formats.tree import Disk, is_bundle


def open_model(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Model:
    """Open the model at `path`, at a URL, or of an id of the hub (`org/name@revision`), by its headers.

    URLs and ids are text; a `Path` is a place of this machine.

    Raises FormatError that says what was found where nothing is readable, and UnsupportedError for a pickle without
    `allow_pickle`.
    """
    if isinstance(path, str):
        hub_id = None if is_url(path) else find_id(path)
        path = fetch_model(hub_id, allow_pickle=allow_pickle) if hub_id else mirror_url(path) if is_url(path) else path
    path = whole_model(Path(path))
    try:
        return _open(path, allow_pickle)
    except FormatError as error:
        raise by_url(error, path) from error.__cause__


def _open(path: Path, allow_pickle: bool) -> Model:
    kind = _kind(path)
    if kind in (None, "state-dict") and os.path.isdir(path) and is_bundle(Disk(str(path))):
        raise FormatError(
            "this is a bundle, not a zoo or a model", where=str(path), next_step="name the folder or file of a model"
        )
    openers: dict[str, Callable[[], Model]] = {
        "adapter": lambda: _adapter(path, allow_pickle),
        "checkpoint": lambda: _weights(Checkpoint(path)),
        "pipeline": lambda: _weights(Pipeline(path)),
        "state-dict": lambda: _open_bare(path),
        "pickle": lambda: _weights(PickleStateDict(path, allow_pickle=allow_pickle)),
    }
    if kind in openers:
        return openers[kind]()
    refuse_unreadable(kind, list_folder(path) if path.is_dir() else [path.name], str(path))
    if kind is None and path.is_file():
        refuse_foreign(read_start(path, 4), str(path))
    if not os.path.lexists(path) and (near := did_you_mean(path)):
        raise FormatError("there is no such file or folder", where=str(path), next_step=near)
    raise FormatError(f"there is no model here: {_contents_shown(path)}", where=str(path), rule=READABLE)


def whole_model(path: Path) -> Path:
    """Return the folder of an adapter whose weights a path names; any other path as it is.

    The weights of an adapter say nothing without the config beside them.
    """
    is_weights = path.name in (WEIGHTS_FILE, PICKLE_FILE, MLX_FILE)
    return path.parent if is_weights and os.path.isfile(path.parent / CONFIG_FILE) and os.path.isfile(path) else path


def _adapter(path: Path, allow_pickle: bool) -> Model:
    """A pickled adapter is one that has no other weights; one of mlx-lm has its own file and none of PEFT's."""
    if not (path / WEIGHTS_FILE).exists():
        if (path / PICKLE_FILE).exists():
            return PickleAdapter(path, allow_pickle=allow_pickle)
        if (path / MLX_FILE).exists():
            return MlxAdapter(path)
    return LoraAdapter(path)


def _open_bare(path: Path) -> Model:
    """Open one safetensors file: full weights, or the factors of a LoRA, with their config beside them where they need one."""
    opened = StateDict(path)
    kind = factor_kind(opened.tensors, str(path))
    if kind == DIFFUSION:
        return DiffusionLora(opened)
    if kind is not None and path.is_file() and os.path.isfile(path.parent / CONFIG_FILE):
        return LoraAdapter(path) if kind == PEFT else MlxAdapter(path)
    return opened if kind is None else _refuse_factors(kind, opened)


def _weights(opened: Model) -> Model:
    """Refuse factors that lie where weights are meant to be."""
    kind = factor_kind(opened.tensors, str(opened.path))
    return opened if kind is None else _refuse_factors(kind, opened)


def _refuse_factors(kind: str, opened: Model) -> NoReturn:
    what, rule, next_step = _REFUSED_FACTORS[kind]
    if kind == DIFFUSION and not isinstance(opened, PickleStateDict):
        what, next_step = (
            "the file is a LoRA of a diffusion model with the name of whole weights",
            "name the file instead of the folder",
        )
    raise UnsupportedError(what, where=str(opened.path), rule=rule, next_step=next_step)


_REFUSED_FACTORS = {
    PEFT: (
        f"there are factors of a PEFT adapter, but no {CONFIG_FILE}",
        "the scale is in that file, and factors are never read as weights",
        f"put them as {WEIGHTS_FILE} into a folder with their {CONFIG_FILE}, as save_pretrained does; if it is lost, write one "
        'with {"peft_type": "LORA", "r": …, "lora_alpha": …, "target_modules": […]} as it was trained',
    ),
    MLX: (
        f"there are factors of an mlx-lm adapter, but no {CONFIG_FILE}",
        "the scale is in that file, and factors are never read as weights",
        f"put them as {MLX_FILE} into a folder with the {CONFIG_FILE} that mlx_lm.lora wrote",
    ),
    DIFFUSION: (
        "the file is a pickle with a LoRA of a diffusion model",
        "such LoRAs are read only from .safetensors",
        "save its tensors with safetensors.torch.save_file",
    ),
}
"""Per kind of factors: what is wrong, the rule, and the next step."""


def is_model(path: str | Path) -> bool:
    """Tell by file names alone whether `path` is meant to be one model, readable or not."""
    return _kind(Path(path)) is not None


def _kind(path: Path) -> str | None:
    if os.path.isdir(path):
        return kind_of_folder(set(list_folder(path)))
    return kind_of_file(path.name) if os.path.isfile(path) else None


def _contents_shown(path: Path) -> str:
    """Describe what lies at a path that is no model."""
    if not path.exists():
        return "nothing of this name exists"
    if not path.is_dir():
        return f"a file with the ending {path.suffix!r} (if '*' named it, name the folder {path.parent} instead, which skips it)"
    names = list_folder(path)
    if not names:
        return "an empty folder"
    weights = sum(name.endswith(FILE_SUFFIXES) for name in names)
    if weights > 1:
        return f"a folder with {weights} weight files, which are several models (open them one by one, or as a zoo)"
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"a folder with {shown}"
