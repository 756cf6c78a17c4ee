"""Weights in PyTorch's pickles: only with permission, and then with `weights_only=True`, never otherwise."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.formats.dtypes import dtype_name
from eigenzoo.formats.kinds import PICKLE_FILE, PICKLE_SUFFIXES, pickle_names
from eigenzoo.formats.model import Model, TensorInfo
from eigenzoo.formats.paths import inside, is_regular, list_folder
from eigenzoo.formats.side_files import list_side_files, refuse_quantised
from eigenzoo.formats.tensor_bytes import check_out

SUFFIXES = PICKLE_SUFFIXES
NESTING_KEYS = ("state_dict", "model_state_dict", "model")


class PickleStateDict(Model):
    """A pickled dict of tensors, plain or one level below `state_dict`, `model_state_dict` or `model`.

    `path` is the file, or a folder with `pytorch_model.bin` or exactly one pickle.
    """

    format = "pickle"

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        self.path = Path(path)
        folder = self.path.is_dir()
        self.name = self.path.resolve().name if folder else self.path.stem
        try:
            file = find_pickle(self.path) if folder else self.path.name
            refuse_pickle(allow_pickle)
            target = inside(self.path, file) if folder else self.path
            self.side_files, self.ignored_files = (), ()
            if folder:
                self.side_files, self.ignored_files = list_side_files(self.path, frozenset({file}))
                refuse_quantised(self.path, self.side_files)
            self._state = _state_dict(_load(target))
            tensors = {name: _info(name, tensor, file) for name, tensor in self._state.items()}
        except FormatError as error:
            raise error.at(str(self.path)) from error.__cause__
        self._file = self.path / file if folder else self.path
        self.tensors = MappingProxyType(tensors)
        self.metadata = {file: {}}

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
        """The one file."""
        return (self._file,)

    def _tensor(self, name: str) -> Tensor:
        tensor = self._state.get(name)
        if tensor is None:
            raise FormatError(f"no tensor {name[:200]!r}", where=str(self.path))
        return tensor


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
    if (folder / PICKLE_FILE).exists():
        return PICKLE_FILE
    found = pickles_of(folder)
    if len(found) != 1:
        raise FormatError(f"{len(found)} pickles: {', '.join(found[:5])}", rule="exactly one is read")
    return found[0]


def pickles_of(folder: Path) -> list[str]:
    """List a folder's pickles that may hold weights."""
    return pickle_names(list_folder(folder))


def _load(path: Path) -> Any:
    if not is_regular(path):
        raise FormatError("no plain file")
    with path.open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    try:
        # Only torch's zip files can be mapped; older ones are read whole, as strictly.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UnsupportedError(
            "the pickle holds more than tensors, or is damaged",
            rule="pickles are read with weights_only=True, never otherwise",
            next_step="load it where it was made and save its state dict as safetensors",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, BadZipFile) as error:
        raise FormatError(f"cannot be unpickled ({type(error).__name__}: {str(error)[:200]})") from error


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    """Find the dict of tensors in what was loaded."""
    for key in NESTING_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise FormatError(f"the pickle holds {type(loaded).__name__}", rule="a dict from names to tensors is expected")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise FormatError(
                f"the entry {str(name)[:100]!r} is {type(value).__name__}",
                rule="every entry of a state dict is a tensor",
                next_step="save the state dict alone, as safetensors",
            )
    return dict(loaded)


def _info(name: str, tensor: Tensor, file: str) -> TensorInfo:
    where = f"{file}, tensor {name[:200]!r}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UnsupportedError(f"a tensor of layout {tensor.layout} on {tensor.device}", where=where)
    # A tensor that repeats a few stored values by its strides would take any amount of memory once it is read.
    if prod(tensor.shape) * tensor.dtype.itemsize > tensor.untyped_storage().nbytes():
        raise FormatError(f"shape {tuple(tensor.shape)} is larger than what is stored", where=where)
    try:
        dtype_name(tensor.dtype)
    except FormatError as error:
        raise error.at(where) from None
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), file)
