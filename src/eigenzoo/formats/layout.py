"""What a writer must know of a model to write one like it: files, names, dtypes and shapes, and nothing of its values.

A layout is stored in bundles, which others may have written: reading one checks everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from eigenzoo.errors import FormatError
from eigenzoo.formats.checkpoint import Checkpoint, tensors_by_file
from eigenzoo.formats.kinds import INDEXES
from eigenzoo.formats.lora.peft_folder import WEIGHTS_FILE
from eigenzoo.formats.lora.zero_updates import unfilled
from eigenzoo.formats.model import LoraUpdate, Model, Parts, TensorInfo, part_name
from eigenzoo.formats.paths import relative_name
from eigenzoo.formats.pickles.file import PickleModel
from eigenzoo.formats.safetensors.dtypes import dtype_name, dtype_of
from eigenzoo.formats.safetensors.header import MAX_TENSORS, is_shape
from eigenzoo.weights.splits import MAX_PARTS

FORMATS = ("checkpoint", "state-dict", "lora", "diffusion-lora", "pipeline")
ADAPTERS = ("lora", "diffusion-lora")
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder: the name of every LoRA of a diffusion model that is written."""


@dataclass(frozen=True)
class TensorLayout:
    """One tensor as it is written; `dtype` is the name that safetensors gives it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch calls it."""
        return dtype_of(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class ModelLayout:
    """The files of a model and what lies in each, in order.

    Attributes:
        format: checkpoint, state-dict, lora, diffusion-lora or pipeline.
        files: per file the tensors in the order of their bytes.
        index: the name of a sharded checkpoint's index.
        updates: for adapters, each module's factors.
        splits: the tensors that are cut into layers of their own, which a writer joins again.
        names: of tensors that are called otherwise in the files, their names there.
    """

    format: str
    files: Mapping[str, tuple[TensorLayout, ...]]
    index: str | None = None
    updates: Mapping[str, LoraUpdate] = field(default_factory=dict)
    splits: Mapping[str, Parts] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def name_in(self, file: str, name: str) -> str:
        """Return what a file calls a tensor: of a pipeline, its name without the component."""
        if self.format == "pipeline":
            return name.removeprefix(f"{file.partition('/')[0]}.")
        return self.names.get(name, name)

    @property
    def pieces(self) -> dict[str, TensorLayout]:
        """Every tensor by its name, those that are cut as their parts."""
        tensors = self.tensors
        for name, parts in self.splits.items():
            whole = tensors.pop(name)
            for part, rows in parts:
                piece = part_name(name, part)
                tensors[piece] = TensorLayout(piece, whole.dtype, (rows, *whole.shape[1:]))
        return tensors

    @property
    def tensors(self) -> dict[str, TensorLayout]:
        """Every tensor by its name."""
        return {tensor.name: tensor for tensors in self.files.values() for tensor in tensors}

    def to_json(self) -> dict[str, Any]:
        """Give the layout as JSON values."""
        updates = {
            module: {"key_a": update.key_a, "key_b": update.key_b, "rank": update.rank, "scale": update.scale}
            | ({} if update.key_alpha is None else {"key_alpha": update.key_alpha})
            for module, update in self.updates.items()
        }
        document: dict[str, Any] = {
            "format": self.format,
            "index": self.index,
            "files": {
                file: [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in tensors]
                for file, tensors in self.files.items()
            },
            "updates": updates,
        }
        if self.splits:
            document["splits"] = {name: [list(part) for part in parts] for name, parts in self.splits.items()}
        if self.names:
            document["names"] = dict(self.names)
        return document

    @classmethod
    def from_json(cls, value: Any) -> ModelLayout:
        """Read a layout back, checking types, names and sizes; raises FormatError or UnsafePathError."""
        if not isinstance(value, dict) or set(value) - {"splits", "names"} != {"format", "index", "files", "updates"}:
            raise FormatError(
                "this is not an object with exactly format, index, files, updates, splits and names", where="layout"
            )
        if value["format"] not in FORMATS:
            raise FormatError(
                f"the format is {str(value['format'])[:40]!r}", where="layout", rule=f"it is one of {FORMATS}"
            )
        files = _files(value["files"])
        index = value["index"]
        if index is not None and index not in INDEXES:
            raise FormatError("the index has an unknown name", where="layout", rule=f"it is one of {INDEXES}")
        if value["format"] == "pipeline":
            _check_components(files, index)
        elif index is None and value["format"] not in ADAPTERS and len(files) > 1:
            raise FormatError("there are several files, but no index", where="layout")
        layout = cls(value["format"], files, index)
        updates = _updates(value["updates"], layout.tensors)
        adapter = layout.format in ADAPTERS
        if bool(updates) != adapter or (adapter and len(files) != 1):
            raise FormatError(
                "a lora has one file and at least one update, and other formats have no updates", where="layout"
            )
        if layout.format == "lora" and any(update.key_alpha for update in updates.values()):
            raise FormatError("there is a tensor of α, but the adapter's config states α", where="layout")
        splits, names = _splits(value.get("splits", {}), layout), _names(value.get("names", {}), layout)
        return cls(layout.format, files, index, updates, splits, names)


def layout_of(model: Model) -> ModelLayout:
    """Describe a model as it will be written: one that was pickled as safetensors, a LoRA of a diffusion model as `LORA_FILE`."""
    pickled = unfilled(model)
    if isinstance(pickled, PickleModel):
        kind, file = pickled.written_as
        listed = _written(model, model.tensors.values())
        return ModelLayout(kind, {file: listed}, None, dict(model.updates), model.splits, model.names)
    grouped = tensors_by_file(model)
    files = {file: _written(model, grouped.get(file, ())) for file in model.metadata}
    if model.format in ADAPTERS:
        # One layout for all that are alike: a bundle holds it once, and it is longer than a model's coefficients.
        files = dict(zip([WEIGHTS_FILE if model.format == "lora" else LORA_FILE], files.values(), strict=True))
    index = model.index if isinstance(model, Checkpoint) else None
    return ModelLayout(model.format, files, index, dict(model.updates), model.splits, model.names)


def _written(model: Model, infos: Iterable[TensorInfo]) -> tuple[TensorLayout, ...]:
    """The tensors of one file as they are written, parts joined."""
    whole = {part_name(name, part): name for name, parts in model.splits.items() for part, _ in parts}
    tensors: dict[str, TensorLayout] = {}
    for info in infos:
        name, shape = whole.get(info.name, info.name), info.shape
        if name != info.name:
            shape = (sum(rows for _, rows in model.splits[name]), *shape[1:])
        tensors[name] = TensorLayout(name, dtype_name(info.dtype), shape)
    return tuple(tensors.values())


def _files(value: Any) -> dict[str, tuple[TensorLayout, ...]]:
    if not isinstance(value, dict) or not value:
        raise FormatError("files is not a mapping from file names to tensors", where="layout")
    names: set[str] = set()
    files = {}
    for file, tensors in value.items():
        relative_name(file)
        if not file.endswith(".safetensors") or not isinstance(tensors, list):
            raise FormatError(f"{file[:100]!r} is not a .safetensors file with a list of tensors", where="layout")
        files[file] = tuple(_tensor(tensor) for tensor in tensors)
        for tensor in files[file]:
            if tensor.name in names:
                raise FormatError(f"tensor {tensor.name[:200]!r} occurs twice", where="layout")
            names.add(tensor.name)
    if len(names) > MAX_TENSORS:
        raise FormatError(f"there are {len(names)} tensors", where="layout", rule=f"at most {MAX_TENSORS}")
    return files


def _check_components(files: Mapping[str, tuple[TensorLayout, ...]], index: str | None) -> None:
    """Check that a pipeline's files lie in the folders of components, whose names their tensors have before their own."""
    for file, tensors in files.items():
        component, _, name = file.partition("/")
        if index is not None or not component.isidentifier() or not name or "/" in name:
            raise FormatError(f"{file[:100]!r} is not a file of a component", where="layout")
        for tensor in tensors:
            if not tensor.name.startswith(f"{component}.") or tensor.name == f"{component}.":
                raise FormatError(
                    f"tensor {tensor.name[:200]!r} is in {file[:100]!r}, the file of another component", where="layout"
                )


def _tensor(value: Any) -> TensorLayout:
    if not isinstance(value, list) or len(value) != 3:
        raise FormatError("a tensor is not [name, dtype, shape]", where="layout")
    name, dtype, shape = value
    if not isinstance(name, str) or not name or not isinstance(dtype, str):
        raise FormatError("a tensor's name or dtype is not a string", where="layout")
    if not is_shape(shape):
        raise FormatError(f"the shape of {name[:200]!r} is not a list of sizes", where="layout")
    dtype_of(dtype)
    return TensorLayout(name, dtype, tuple(shape))


def _splits(value: Any, layout: ModelLayout) -> dict[str, Parts]:
    """Read which tensors are cut; the parts are all of a tensor's rows, and no other tensor has their names."""
    if not isinstance(value, dict) or (value and layout.format in ADAPTERS):
        raise FormatError("splits is not a mapping from tensors of full weights", where="layout")
    tensors, splits, taken = layout.tensors, {}, set(layout.tensors)
    for name, parts in value.items():
        where = f"layout, split of {name[:200]!r}"
        if not isinstance(parts, list) or not 2 <= len(parts) <= MAX_PARTS:
            raise FormatError("this is not a list of parts", where=where)
        for part in parts:
            if not isinstance(part, list) or len(part) != 2 or not isinstance(part[0], str) or type(part[1]) is not int:
                raise FormatError("a part is not [name, rows]", where=where)
            if part[1] < 1 or not part[0] or part_name(name, part[0]) in taken:
                raise FormatError("a part has no rows, no name, or the name of another part", where=where)
            taken.add(part_name(name, part[0]))
        if name not in tensors or tensors[name].shape[:1] != (sum(rows for _, rows in parts),):
            raise FormatError("the parts do not cover the rows of a tensor", where=where)
        splits[name] = tuple((part, rows) for part, rows in parts)
    return splits


def _names(value: Any, layout: ModelLayout) -> dict[str, str]:
    """Read what tensors are called in the files, if they are called otherwise; no two of them have one name there."""
    plain = layout.format in ("checkpoint", "state-dict")
    if not isinstance(value, dict) or (value and not plain) or not value.keys() <= layout.tensors.keys():
        raise FormatError("names is not a mapping from tensors of a checkpoint", where="layout")
    written = [value.get(name, name) for name in layout.tensors]
    if not all(isinstance(name, str) and name for name in written) or len(set(written)) < len(written):
        raise FormatError("two tensors have one name in the files, or one has none", where="layout, names")
    return value


def _updates(value: Any, tensors: Mapping[str, TensorLayout]) -> dict[str, LoraUpdate]:
    if not isinstance(value, dict):
        raise FormatError("updates is not a mapping from modules", where="layout")
    updates: dict[str, LoraUpdate] = {}
    keys: set[str] = set()
    for module, entry in value.items():
        update = _update(module, entry, tensors)
        if len(update.keys) < len(value[module]) - 2 or keys & update.keys:
            raise FormatError(f"a factor of {module[:200]!r} is used twice", where="layout")
        keys |= update.keys
        updates[module] = update
    return updates


def _update(module: str, entry: Any, tensors: Mapping[str, TensorLayout]) -> LoraUpdate:
    where = f"layout, module {module[:200]!r}"
    if not isinstance(entry, dict) or set(entry) - {"key_alpha"} != {"key_a", "key_b", "rank", "scale"}:
        raise FormatError(
            "this is not an object with exactly key_a, key_b, rank and scale, and optionally key_alpha", where=where
        )
    rank, scale = entry["rank"], entry["scale"]
    factors = [tensors.get(key) if isinstance(key, str) else None for key in (entry["key_a"], entry["key_b"])]
    factor_a, factor_b = factors
    if factor_a is None or factor_b is None:
        raise FormatError("a factor is not a tensor of the files", where=where)
    if type(rank) is not int or type(scale) not in (int, float) or not -1e300 < scale < 1e300:
        raise FormatError("rank or scale is not a finite number", where=where)
    a, b = factor_a.shape, factor_b.shape
    if not 2 <= len(a) <= 5 or len(a) != len(b) or a[0] != rank or b[1] != rank or rank < 1 or 0 in a + b:
        raise FormatError(f"the factors have shapes {a} and {b}, but the rank is {rank}", where=where)
    if any(size != 1 for size in b[2:]):
        raise FormatError(f"B has shape {b}", where=where, rule="B of a convolution has kernel size 1")
    key_alpha = entry.get("key_alpha")
    if "key_alpha" in entry:
        alpha = tensors.get(key_alpha) if isinstance(key_alpha, str) else None
        if alpha is None or prod(alpha.shape) != 1:
            raise FormatError("α is not a tensor of one value in the files", where=where)
    shapes = (factor_a.shape, factor_b.shape)
    return LoraUpdate(module, factor_a.name, factor_b.name, (b[0], prod(a[1:])), rank, float(scale), shapes, key_alpha)
