"""Weights in PyTorch's pickles: only with permission, and then with `weights_only=True`, never otherwise."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.formats.checkpoint import check_index, read_index
from eigenzoo.formats.kinds import PICKLE_FILE, PICKLE_INDEX, PICKLE_SUFFIXES, pickle_names, weights_stem
from eigenzoo.formats.model import Model, TensorInfo
from eigenzoo.formats.partitioned import refuse_partitioned
from eigenzoo.formats.paths import inside, is_regular, list_folder
from eigenzoo.formats.pickles.contents import check_tensors, state_dict_of
from eigenzoo.formats.pickles.scan import ZIP, check_pickle
from eigenzoo.formats.refused import refuse_foreign
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.tensor_bytes import check_out
from eigenzoo.formats.side_files import list_side_files, refuse_quantised
from eigenzoo.formats.stand_ins import START_BYTES, refuse_stand_in

SUFFIXES = PICKLE_SUFFIXES

_BLOCKED = re.compile(r"GLOBAL ([\w.]{1,100})")
# What torch's reader raises for damaged files: it takes lengths and indexes out of the file as they are.
_DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, BadZipFile),
    *(MemoryError, ArithmeticError, AssertionError, struct.error),
)


class PickleModel(Model):
    """What models in pickles have in common: tensors by name, from one file or from shards.

    Attributes:
        state: the tensors by name.
        written_as: the format and the file name that a rebuilt model is written in, which is safetensors.
    """

    written_as: tuple[str, str]
    state: dict[str, Tensor]
    _files: tuple[Path, ...]

    def take(self, state: dict[str, Tensor], holders: Mapping[str, str], folder: Path) -> None:
        """Take the tensors of a state dict; `holders` says which file has which."""
        self.state = state
        self.tensors = MappingProxyType({name: _info(name, tensor, holders[name]) for name, tensor in state.items()})
        refuse_partitioned(self.tensors)
        files = tuple(dict.fromkeys(holders.values()))
        self._files = tuple(folder / file for file in files)
        self.metadata = MappingProxyType({file: {} for file in files})

    def read(self, name: str) -> Tensor:
        """Read one tensor whole, in its own dtype and shape."""
        return self._tensor(name).detach().clone(memory_format=torch.contiguous_format)

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read values start:stop of the flattened (row-major) tensor, converted into `out` where one is given."""
        values = self._tensor(name).detach().reshape(-1)
        if not 0 <= start <= stop <= values.numel():
            raise UsageError(f"values {start}:{stop} of a tensor of {values.numel()}", where=f"{self.path}, {name!r}")
        if out is None:
            return values[start:stop].clone()
        check_out(out, stop - start)
        if values.is_complex() and not out.is_complex():
            raise UnsupportedError(f"complex values cannot be read as {out.dtype}", where=f"{self.path}, {name!r}")
        return out.copy_(values[start:stop])

    def weight_files(self) -> tuple[Path, ...]:
        """The file, or the shards in the order of their index."""
        return self._files

    def _tensor(self, name: str) -> Tensor:
        tensor = self.state.get(name)
        if tensor is None:
            raise FormatError(f"there is no tensor {name[:200]!r}", where=str(self.path))
        return tensor


class PickleStateDict(PickleModel):
    """A pickled state dict, plain or in a training checkpoint (`pickle_contents`).

    `path` is the file, or a folder with `pytorch_model.bin`, with the index of its shards, or with exactly one pickle.
    """

    format = "pickle"

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        self.path = Path(path)
        folder = self.path.is_dir()
        self.name = self.path.resolve().name if folder else weights_stem(self.path.name)
        self.written_as = ("checkpoint", "model.safetensors") if folder else ("state-dict", f"{self.name}.safetensors")
        try:
            file = find_pickle(self.path) if folder else self.path.name
            refuse_pickle(allow_pickle)
            if file == PICKLE_INDEX:
                entries = read_index(self.path, file)
                self._list_side_files(frozenset({file, *entries.values()}))
                state, holders = _load_shards(self.path, entries)
            else:
                if folder:
                    self._list_side_files(frozenset({file}))
                loaded = load_pickle(inside(self.path, file) if folder else self.path)
                state, notes = state_dict_of(loaded)
                self.warnings += notes
                holders = dict.fromkeys(state, file)
            self.take(state, holders, self.path if folder else self.path.parent)
        except FormatError as error:
            raise error.at(str(self.path)) from error.__cause__

    def _list_side_files(self, weights: frozenset[str]) -> None:
        self.take_beside(list_side_files(self.path, weights))
        refuse_quantised(self.path, self.side_files)


def _load_shards(folder: Path, entries: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the shards that an index names; each is a plain state dict, and together they hold what the index says."""
    loaded = {shard: load_pickle(inside(folder, shard)) for shard in dict.fromkeys(entries.values())}
    for shard, state in loaded.items():
        try:
            check_tensors(state)
        except FormatError as error:
            raise error.at(shard) from None
    check_index(entries, loaded, PICKLE_INDEX)
    return {name: loaded[shard][name] for name, shard in entries.items()}, dict(entries)


def refuse_pickle(allow_pickle: bool) -> None:
    """Refuse unless there is permission: unpickling runs what the file says."""
    if not allow_pickle:
        raise UnsupportedError(
            "the weights are a Python pickle",
            rule="pickles can run code and are read only with permission",
            next_step="convert the model to safetensors, or pass --allow-pickle (allow_pickle=True) if you trust it",
        )


def find_pickle(folder: Path) -> str:
    """Find the one pickle of a folder that holds weights."""
    for name in (PICKLE_FILE, PICKLE_INDEX):
        if (folder / name).exists():
            return name
    pickles = pickles_of(folder)
    if len(pickles) != 1:
        raise FormatError(f"there are {len(pickles)} pickles: {', '.join(pickles[:5])}", rule="exactly one is expected")
    return pickles[0]


def pickles_of(folder: Path) -> list[str]:
    """List a folder's pickles that may hold weights."""
    return pickle_names(list_folder(folder))


def load_pickle(path: Path) -> Any:
    """Unpickle a file of tensors and plain values, never anything else; zip files are mapped, not read."""
    if not is_regular(path):
        raise FormatError("not a regular file")
    with path.open("rb") as stream:
        start = stream.read(START_BYTES)
    magic = start[:4]
    refuse_foreign(magic, path.name)
    refuse_stand_in(start, path.name)
    check_pickle(path)
    zipped = magic == ZIP
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols and archives that are refused or read right all the same
            # Only torch's zip files can be mapped; older ones are read whole, as strictly.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        blocked = _BLOCKED.search(str(error))
        raise UnsupportedError(
            "the pickle holds more than tensors, or is damaged" + (f" ({blocked[1]})" if blocked else ""),
            rule="pickles are read only with weights_only=True",
            next_step="load it where it was made and save its state dict as safetensors",
        ) from error
    except _DAMAGED as error:
        raise FormatError(f"cannot be unpickled ({type(error).__name__}: {str(error)[:200]})") from error
    return loaded


def _info(name: str, tensor: Tensor, file: str) -> TensorInfo:
    where = f"{file}, tensor {name[:200]!r}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UnsupportedError(f"the tensor has layout {tensor.layout} on device {tensor.device}", where=where)
    # A tensor that repeats a few stored values by its strides would take any amount of memory once it is read.
    if prod(tensor.shape) * tensor.dtype.itemsize > tensor.untyped_storage().nbytes():
        raise FormatError(f"shape {tuple(tensor.shape)} is larger than the stored values", where=where)
    try:
        dtype_name(tensor.dtype)
    except FormatError as error:
        raise error.at(where) from None
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), file)
