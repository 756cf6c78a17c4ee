"""The files beside the weights that make a model usable: known names, small, in its folder or one folder below; nothing else is
carried, and what is not is named."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.kinds import FILE_SUFFIXES, kind_of_folder
from eigenzoo.formats.paths import (
    MAX_SIDE_BYTES,
    OUTPUT_RECORD,
    RECORD_FILE,
    inside,
    is_regular,
    list_folder,
    read_start,
)
from eigenzoo.formats.refused import FOREIGN, FOREIGN_NAMES
from eigenzoo.formats.stand_ins import POINTER_BYTES, stand_in

__all__ = [
    "CONFIG",
    "MODULES",
    "MAX_SIDE_BYTES",
    "SIDE_FILES",
    "Beside",
    "is_carried_from",
    "is_module",
    "is_side_file",
    "is_too_large",
    "list_side_files",
    "listed_first",
    "refuse_quantised",
    "tell_left",
    "weights_among",
]

CONFIG = "config.json"
MODULES = "modules.json"
"""In a folder of sentence-transformers, the modules that a text goes through; each has a folder, the first may have the root."""

SIDE_FILES = frozenset(
    {
        CONFIG,
        "generation_config.json",
        # processors of transformers
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        *("audio_tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
        # tokenizers of transformers
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "entity_vocab.json"),
        *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "byte_maps.json", "tekken.json"),
        *("tokenizer.model", "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model"),
        *("sentencepiece.bpe.model", "source.spm", "target.spm"),
        # diffusers
        *("model_index.json", "scheduler_config.json"),
        # sentence-transformers
        *(MODULES, "config_sentence_transformers.json", "router_config.json"),
        *(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlnet")),
        *("sentence_xlm-roberta_config.json", "cnn_config.json", "lstm_config.json", "wordembedding_config.json"),
    }
)

MODULE_WEIGHTS = "model.safetensors"
"""Weights of a module of sentence-transformers, such as `2_Dense`: carried as they are, up to the size of a side file."""

_MODULE = re.compile(r"\d{1,2}_[A-Za-z]\w{0,63}", re.ASCII)
_TEMPLATES = "additional_chat_templates"
_TEMPLATE = re.compile(r"\w[\w.-]{0,99}\.jinja", re.ASCII)

_COPY_FOLDERS = ("onnx", "openvino", "original", "gguf", "coreml", "flax", "tf")
"""Folders in which repositories keep the same weights for other libraries."""

_WHOLE = {"model", "diffusion_pytorch_model", "pytorch_model"}
"""Stems of the files that hold all weights of a model; an adapter's hold only what was trained."""

_STATE = re.compile(
    r"optimizer.*|scheduler.*|scaler.*|rng_.*|random_states.*|training_args.*|.*_optim_states.*|.*model_states.*|zero_pp_rank.*"
)
"""What a trainer keeps to go on: no weights of the model that are not in its own files."""

_LONGEST = 1000
"""Characters of a name that is kept, with its escapes; a folder and a file in it have five hundred bytes."""

_LISTED = 1000
"""Names of a folder below that are looked at."""


@dataclass(frozen=True)
class Beside:
    """What lies beside a model's weights.

    Attributes:
        carried: files that a rebuilt model has too, named from the model's folder.
        ignored: everything else; a folder is one name, but for those of which something is carried.
        weights: those files of `ignored`, and in ignored folders, that hold values which are not in the model's own files.
        models: the ignored folders that hold models of their own.
        notes: what a user must do to have a file carried.
    """

    carried: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def below(self, folder: str) -> Beside:
        """The same by names from the folder above."""
        parts = (self.carried, self.ignored, self.weights, self.models)
        carried, ignored, weights, models = (tuple(f"{folder}/{name}" for name in part) for part in parts)
        return Beside(carried, ignored, weights, models, tuple(f"{folder}: {note}" for note in self.notes))

    def __add__(self, other: Beside) -> Beside:
        """All of both."""
        return Beside(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


def is_module(name: str) -> bool:
    """Tell whether a folder has the name of a module of sentence-transformers, such as `1_Pooling`."""
    return _MODULE.fullmatch(name) is not None


def is_carried_from(name: str, names: Collection[str]) -> bool:
    """Tell whether a listed file is carried: a known name, of a module only where sentence-transformers' list of them is there."""
    return is_side_file(name) and ("/" not in name or MODULES in names or name.startswith(f"{_TEMPLATES}/"))


def is_side_file(name: str) -> bool:
    """Tell whether a file is carried by its name, from the model's folder.

    >>> is_side_file("tokenizer.json"), is_side_file("1_Pooling/config.json"), is_side_file("1_Pooling/x/config.json")
    (True, True, False)
    """
    folder, slash, last = name.rpartition("/")
    if not slash:
        return name in SIDE_FILES
    if _MODULE.fullmatch(folder):
        return last in SIDE_FILES or last == MODULE_WEIGHTS
    return folder == _TEMPLATES and _TEMPLATE.fullmatch(last) is not None


def weights_among(names: Iterable[str], own: Collection[str]) -> tuple[str, ...]:
    """Return those files beside a model's own that hold weights which its own do not, by their names.

    >>> weights_among(["pytorch_model.bin", "optimizer.pt", "notes.txt", "2_Dense/pytorch_model.bin"], ["model.safetensors"])
    ('2_Dense/pytorch_model.bin',)
    """
    return _weights_beside(names, _stems(own))


def _weights_beside(names: Iterable[str], own: Mapping[str, set[str]]) -> tuple[str, ...]:
    return tuple(name for name in names if _holds_values(name) and not _is_copy(name, own))


def listed_first(beside: Beside, most: int) -> tuple[str, ...]:
    """Keep some of many names that are not carried: weights, then what tells of a training run, then others.

    Bytes of a name that are no text are written as escapes, since JSON has none, up to the characters that a manifest takes.
    """
    names = dict.fromkeys((*beside.weights, *(RUN_STATE,) * (RUN_STATE in beside.ignored), *beside.ignored))
    return tuple(_as_text(name) for name in islice(names, most))


def _as_text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")[:_LONGEST]


RUN_STATE = "trainer_state.json"
"""What transformers' Trainer leaves in every checkpoint of a run."""


_left_at_source: dict[str, tuple[str, ...]] = {}


def tell_left(folder: Path, names: Iterable[str]) -> None:
    """Tell this process what lies beside a model where it came from, and was not downloaded: names from the model's folder."""
    _left_at_source[os.path.realpath(folder)] = tuple(islice(sorted(names), _LISTED))


def list_side_files(folder: Path, weights: frozenset[str], also: frozenset[str] = frozenset()) -> Beside:
    """Sort a folder's entries into what is carried and what is not; weights are neither.

    A known name that is a link out of the folder, no plain file, or too large raises. Folders below are listed once and no deeper,
    and links to folders are not followed. Cost: a listing of each folder.
    """
    side_files = _Sorted(folder, weights)
    names = list_folder(folder)
    # What an index places in folders below is the model's own, and so are these folders.
    own = {*weights, *(file.partition("/")[0] for file in weights if "/" in file)}
    for name in names:
        if name in own:
            continue
        if name in SIDE_FILES or name in also:
            side_files.take(name)
        elif os.path.isdir(folder / name):
            side_files.look_into(name, is_module=MODULES in names and is_module(name))
        else:
            side_files.ignore(name)
    side_files.leave_at_source(_left_at_source.get(os.path.realpath(folder), ()) if _left_at_source else ())
    if is_module(folder.name) and os.path.isfile(folder.parent / MODULES):
        side_files.notes.append(
            f"{folder.name} is one module of a sentence-transformers model, of whose folder nothing else is carried: put what "
            "is rebuilt into a copy of that folder, in this module's place"
        )
    return Beside(
        *(
            tuple(part)
            for part in (
                side_files.carried,
                side_files.ignored,
                side_files.weights,
                side_files.models,
                side_files.notes,
            )
        )
    )


class _Sorted:
    """A folder's entries while they are sorted; the lists are those of `Beside`."""

    def __init__(self, folder: Path, weights: frozenset[str]) -> None:
        self.folder, self._own = folder, weights
        self._stems = _stems(weights)
        self.carried: list[str] = []
        self.ignored: list[str] = []
        self.weights: list[str] = []
        self.models: list[str] = []
        self.notes: list[str] = []

    def take(self, name: str) -> None:
        """Carry a file, but a stand-in for one."""
        kind = _checked(self.folder, name)
        if kind is None:
            self.carried.append(name)
            for folder, stems in _stems([name]).items():
                self._stems.setdefault(folder, set()).update(stems)
            return
        self.ignored.append(name)
        self.notes.append(f"{name} is {kind.what}, and is not carried: {kind.next_step}")

    def ignore(self, name: str) -> None:
        """Leave a file behind; what git and systems hide by a dot is no part of a model, and is not named."""
        if name.startswith(".") and not _holds_values(name):
            return
        self.ignored.append(name)
        self.weights += _weights_beside([name], self._stems)

    def look_into(self, inner: str, *, is_module: bool) -> None:
        """Carry what is known in a folder below, and leave the rest of it behind."""
        names = [] if (self.folder / inner).is_symlink() else _some_names(self.folder / inner)
        carried = (
            [name for name in names if is_side_file(f"{inner}/{name}")] if is_module or inner == _TEMPLATES else []
        )
        if not carried:
            self._ignore_folder(inner, names)
            return
        # Known names first: beside a module's weights that are carried a pickle of them is a copy.
        for name in sorted(names, key=lambda name: name not in carried):
            path = f"{inner}/{name}"
            if name not in carried or (name == MODULE_WEIGHTS and is_too_large(path, _num_bytes(self.folder, path))):
                self.ignore(path)
            else:
                self.take(path)

    def leave_at_source(self, names: Iterable[str]) -> None:
        """Name what was not downloaded."""
        folders: dict[str, list[str]] = {}
        for name in names:
            inner, slash, rest = name.partition("/")
            if os.path.lexists(self.folder / name):
                continue
            if slash and not any(own.startswith(f"{inner}/") for own in (*self._own, *self.carried, *self.ignored)):
                folders.setdefault(inner, []).append(rest)
            else:
                self.ignore(name)
        for inner, rests in folders.items():
            if inner not in self.ignored:
                self._ignore_folder(inner, rests)

    def _ignore_folder(self, inner: str, names: list[str]) -> None:
        if inner.startswith("."):
            return
        self.ignored.append(inner)
        if inner in _COPY_FOLDERS:
            return
        if kind_of_folder(names) in ("adapter", "checkpoint", "pipeline", "shards", "pickle-shards"):
            self.models.append(inner)
        else:
            self.weights += _weights_beside((f"{inner}/{name}" for name in names), self._stems)


def _some_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted({entry.name for entry in islice(entries, _LISTED)} - {RECORD_FILE, OUTPUT_RECORD})
    except OSError:
        return []  # what cannot be listed holds nothing that is known


def is_too_large(name: str, size: int) -> bool:
    """Tell of a known name whether it is a module's weights and too large to carry; other files of that size are an error.

    >>> is_too_large("2_Dense/model.safetensors", 2**30), is_too_large("tokenizer.json", 2**30)
    (True, False)
    """
    return name.endswith(f"/{MODULE_WEIGHTS}") and size > MAX_SIDE_BYTES


def _num_bytes(folder: Path, name: str) -> int:
    target = inside(folder, name)
    return target.stat().st_size if is_regular(target) else 0


def _holds_values(name: str) -> bool:
    """Tell by its name whether a file holds weights of some kind; what a trainer keeps to go on is none."""
    last = name.rpartition("/")[2]
    return last.endswith((*FILE_SUFFIXES, *FOREIGN, ".npz", ".npy")) and _STATE.fullmatch(last) is None


def _stems(weights: Iterable[str]) -> dict[str, set[str]]:
    """Return the stems of weights' files by the folder that they lie in."""
    stems: dict[str, set[str]] = {}
    for name in filter(_holds_values, weights):
        folder, _, last = name.rpartition("/")
        stems.setdefault(folder, set()).add(_stem(last))
    return stems


def _is_copy(name: str, own: Mapping[str, set[str]]) -> bool:
    """Tell whether a file beside weights of these stems holds the same for another library, or in another precision."""
    folder, _, last = name.rpartition("/")
    stems = own.get(folder, set())
    if _stem(last) in stems:  # model.fp16.safetensors beside model.safetensors, adapter_model.bin beside …
        return True
    return bool(stems & _WHOLE) and (
        last in FOREIGN_NAMES or last.endswith(".gguf") or _stem(last) in ("pytorch_model", "consolidated")
    )


def _stem(name: str) -> str:
    """Return a weights file's name without endings, variants and numbers of shards.

    >>> _stem("model.fp16.safetensors"), _stem("pytorch_model-00001-of-00002.bin"), _stem("consolidated.00.pth")
    ('model', 'pytorch_model', 'consolidated')
    """
    return re.sub(r"-\d{5}-of-\d{5}$", "", name.partition(".")[0])


def _checked(folder: Path, name: str) -> FormatError | None:
    """Raise for a known name that cannot be carried; return what a file is that stands for another."""
    target = inside(folder, name)
    if not is_regular(target):
        raise FormatError(f"{name!r} is not a regular file", where=str(folder))
    size = target.stat().st_size
    if size > MAX_SIDE_BYTES:
        raise FormatError(
            f"{name!r} has {size} bytes", where=str(folder), rule=f"such a file has at most {MAX_SIDE_BYTES} bytes"
        )
    # Of the files that are carried unread only what is as short as a pointer is looked at: a zoo has thousands.
    if size > POINTER_BYTES or name == CONFIG:
        return None
    return stand_in(read_start(target, POINTER_BYTES))


def refuse_quantised(folder: Path, side_files: tuple[str, ...]) -> None:
    """Refuse a folder whose config says that its weights are quantised: their numbers are codes, not weights."""
    if CONFIG not in side_files:
        return
    quantization = read_json(inside(folder, CONFIG), where=CONFIG).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedError(
            f"the weights are quantised ({str(method)[:40]})",
            where=CONFIG,
            rule="quantised weights are codes, whose differences have no meaning",
            next_step="dequantise the model (model.dequantize() in transformers), save it, and open that",
        )
