"""Features of inputs in files that others wrote: a safetensors file, or a plain .npy file read without numpy's parser.

The header of an .npy file is a Python literal. numpy evaluates it; here it must have the one form that numpy writes for a matrix
of numbers, so that nothing is evaluated and no object can be in it.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eigenzoo.errors import FormatError
from eigenzoo.formats.paths import did_you_mean
from eigenzoo.formats.safetensors.file import SafetensorsFile

MOST_INPUTS = 2**26
"""Values of one file of inputs: 65,536 inputs of 1,024 features."""

MOST_EXAMPLES = 2**24
"""Values of one file of examples, which are held several times over in float64."""

_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    rb"\{'descr': *'([<|=](?:f[248]|[iu][1248]))', *'fortran_order': *(True|False), *"
    rb"'shape': *\((\d{1,18}), *(\d{1,18})\),? *\} *\n?"
)
_NPY_RULE = "an .npy file of features holds a matrix of numbers, as numpy.save writes it"
_INPUTS = "inputs"


def read_inputs(path: str | os.PathLike[str]) -> Tensor:
    """Read features (X, D): an .npy file, or a safetensors file with one tensor, or one that is called `inputs`."""
    file = _there(Path(path))
    if file.suffix == ".npy":
        return _read_npy(file)
    opened = SafetensorsFile(file)
    name = _INPUTS if len(opened.tensors) != 1 else next(iter(opened.tensors))
    if name not in opened.tensors:
        raise FormatError(
            f"{len(opened.tensors)} tensors, and none is called {_INPUTS!r}",
            where=str(path),
            rule=f"a file of inputs holds one tensor, or one called {_INPUTS!r}",
        )
    return _read_tensors(opened, [name], MOST_INPUTS)[name]


def read_examples(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read features (n, D) by model: a safetensors file with one tensor per model, named after it."""
    file = _there(Path(path))
    if file.suffix == ".npy":
        raise FormatError(
            "an .npy file has no names of models",
            where=str(path),
            rule="examples are a safetensors file with one tensor per model, named after the model",
            next_step="write it with safetensors.numpy.save_file({'model': features}, path)",
        )
    opened = SafetensorsFile(file)
    return _read_tensors(opened, list(opened.tensors), MOST_EXAMPLES)


def _there(path: Path) -> Path:
    if not path.exists():
        raise FormatError("there is no such file", where=str(path), next_step=did_you_mean(str(path)))
    return path


def _read_tensors(opened: SafetensorsFile, names: list[str], most: int) -> dict[str, Tensor]:
    for name in names:
        info = opened.tensors[name]
        if len(info.shape) != 2 or not (info.dtype.is_floating_point or info.dtype in _INTEGERS):
            raise FormatError(
                f"shape {list(info.shape)}, {str(info.dtype).removeprefix('torch.')}",
                where=f"{opened.path}, tensor {name[:200]!r}",
                rule="features are numbers, one row per input and one column per feature",
            )
    _check_size(sum(opened.tensors[name].shape[0] * opened.tensors[name].shape[1] for name in names), most, opened.path)
    return {name: opened.read(name) for name in names}


_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def _check_size(count: int, most: int, path: Path) -> None:
    if count > most:
        raise FormatError(
            f"{count:,} values", where=str(path), rule=f"at most {most:,} are read at once", next_step="split the file"
        )


def _read_npy(path: Path) -> Tensor:
    """Read a matrix of an .npy file; FormatError for any other content."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path)) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FormatError("is not a regular file", where=str(path), rule=_NPY_RULE)
    with os.fdopen(descriptor, "rb") as file:
        start = file.read(12)
        version = start[6:8]
        length = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}.get(version)
        if start[:6] != _MAGIC or length is None:
            raise FormatError("is not an .npy file", where=str(path), rule=_NPY_RULE)
        begin = 8 + length
        size = int.from_bytes(start[8:begin], "little")
        file.seek(begin)
        header = file.read(min(size, 2**16))
        found = _HEADER.fullmatch(header)
        if found is None:
            raise FormatError("the header is not that of a matrix of numbers", where=str(path), rule=_NPY_RULE)
        dtype, columns_first = np.dtype(found[1].decode()), found[2] == b"True"
        rows, columns = int(found[3]), int(found[4])
        _check_size(rows * columns, MOST_INPUTS, path)
        if status.st_size != begin + size + rows * columns * dtype.itemsize:
            raise FormatError(
                f"{status.st_size:,} bytes do not fit a header of shape [{rows}, {columns}], {dtype}",
                where=str(path),
                rule="the values follow the header, and nothing else",
                next_step="write or copy the file again, whole",
            )
        values = np.fromfile(file, dtype, rows * columns)
    if len(values) != rows * columns:
        raise FormatError("the file became shorter while it was read", where=str(path))
    matrix = values.reshape((columns, rows)).T if columns_first else values.reshape((rows, columns))
    # Unsigned integers of more than a byte have no arithmetic in torch.
    plain = matrix.astype(np.float64) if dtype.kind == "u" and dtype.itemsize > 1 else matrix
    return torch.from_numpy(np.ascontiguousarray(plain))
