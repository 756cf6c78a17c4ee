"""The same run of values of many models, read into the rows of one tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.formats import open_files
from eigenzoo.formats.checkpoint import SafetensorsModel
from eigenzoo.formats.lora.zero_updates import unfilled
from eigenzoo.formats.model import Model
from eigenzoo.formats.remote.values import fetch_values
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.tensor_bytes import as_bytes


class RowReader:
    """Reads one tensor of each of many models, all of one size.

    Values that need no conversion go straight from a file into a row: a pass is tens of thousands of short reads, and what Python
    does around each of them counts. What lies elsewhere is asked for together.
    """

    def __init__(self, models: Sequence[Model], names: Sequence[str]) -> None:
        self._models, self._names = tuple(models), tuple(names)
        self._locations: list[tuple[SafetensorsFile | None, int, torch.dtype]] = []
        shapes = set()
        for model, name in zip(models, names, strict=True):
            info, file = model.tensors[name], _file(model, name)
            self._locations.append((file, 0 if file is None else file.locate(name, 0, 0)[0], info.dtype))
            shapes.add(info.shape)
        self._size = min(map(prod, shapes), default=0)

    def read(self, start: int, stop: int, rows: Tensor) -> None:
        """Fill row n of `rows`, contiguous (N, stop − start), with values start:stop of model n's tensor, converted."""
        if not 0 <= start <= stop <= self._size:
            raise UsageError(f"values {start}:{stop} of tensors of {self._size}")
        dtype = rows.dtype
        view, width, offset = as_bytes(rows), (stop - start) * dtype.itemsize, start * dtype.itemsize
        elsewhere = []
        for index, (file, position, own) in enumerate(self._locations):
            file_open = None if file is None else open_files.find(file.target, file.identity)
            if file is not None and file.remote is not None:
                elsewhere.append((file.remote, position + start * own.itemsize, own, rows[index]))
            elif file_open is not None and own == dtype:
                part = view[index * width : (index + 1) * width]
                if os.preadv(file_open.fileno(), [part], position + offset) != width:
                    self._models[index].read_flat(self._names[index], start, stop, out=rows[index])
            else:
                self._models[index].read_flat(self._names[index], start, stop, out=rows[index])
        if elsewhere:
            fetch_values(elsewhere)


def read_factors(models: Sequence[Model], modules: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield B (outputs, rank) and A (rank, inputs) of one update of each of many models, in their own dtype, the scale not applied.

    Those of models in a store are asked for together.
    """
    elsewhere = [_files_of(model, module) for model, module in zip(models, modules, strict=True)]
    fetched: dict[int, tuple[Tensor, Tensor]] = {}
    wanted = []
    for index, (model, module, files) in enumerate(zip(models, modules, elsewhere, strict=True)):
        if not files:
            continue
        update = model.updates[module]
        values = []
        for file, key in zip(files, (update.key_b, update.key_a), strict=True):
            info = model.tensors[key]
            out = torch.empty(prod(info.shape), dtype=info.dtype)
            assert file.remote is not None
            wanted.append((file.remote, *file.locate(key, 0, out.numel()), out))
            values.append(out)
        outputs, inputs = update.shape
        fetched[index] = values[0].view(outputs, update.rank), values[1].view(update.rank, inputs)
    if wanted:
        fetch_values(wanted)
    for index, (model, module) in enumerate(zip(models, modules, strict=True)):
        yield fetched.pop(index) if index in fetched else model.read_factors(module)


def _files_of(model: Model, module: str) -> list[SafetensorsFile]:
    """The remote files of B and A; nothing of a model at hand."""
    update = model.updates[module]
    files = [_file(model, key) for key in (update.key_b, update.key_a)]
    return [file for file in files if file is not None and file.remote is not None]


def _file(model: Model, name: str) -> SafetensorsFile | None:
    original = unfilled(model)
    return original.file_of(name) if isinstance(original, SafetensorsModel) and name in original.tensors else None
