"""The same run of values of many models, read into the rows of one tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod

from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.formats import open_files
from eigenzoo.formats.checkpoint import SafetensorsModel
from eigenzoo.formats.model import Model
from eigenzoo.formats.remote.values import fetch_values
from eigenzoo.formats.safetensors_file import SafetensorsFile
from eigenzoo.formats.tensor_bytes import as_bytes


class RowReader:
    """Reads one tensor of each of many models, all of one size.

    Values that need no conversion go straight from a file into a row: a pass is tens of thousands of short reads, and what Python
    does around each of them counts. What lies elsewhere is asked for together.
    """

    def __init__(self, models: Sequence[Model], names: Sequence[str]) -> None:
        self._models, self._names = tuple(models), tuple(names)
        self._files = [_file(model, name) for model, name in zip(models, names, strict=True)]
        self._starts = [
            0 if file is None else file.locate(name, 0, 0)[0] for file, name in zip(self._files, names, strict=True)
        ]
        self._dtypes = [model.tensors[name].dtype for model, name in zip(models, names, strict=True)]
        self._size = min(prod(model.tensors[name].shape) for model, name in zip(models, names, strict=True))

    def read(self, start: int, stop: int, rows: Tensor) -> None:
        """Fill row n of `rows`, contiguous (N, stop − start), with values start:stop of model n's tensor, converted."""
        if not 0 <= start <= stop <= self._size:
            raise UsageError(f"values {start}:{stop} of tensors of {self._size}")
        dtype = rows.dtype
        view, width, offset = as_bytes(rows), (stop - start) * dtype.itemsize, start * dtype.itemsize
        elsewhere = []
        for place, (file, position, own) in enumerate(zip(self._files, self._starts, self._dtypes, strict=True)):
            kept = None if file is None else open_files.find(file.target)
            if file is not None and file.remote is not None:
                elsewhere.append((file.remote, position + start * own.itemsize, own, rows[place]))
            elif kept is not None and own == dtype:
                part = view[place * width : (place + 1) * width]
                if os.preadv(kept.fileno(), [part], position + offset) != width:
                    self._models[place].read_flat(self._names[place], start, stop, out=rows[place])
            else:
                self._models[place].read_flat(self._names[place], start, stop, out=rows[place])
        if elsewhere:
            fetch_values(elsewhere)


def _file(model: Model, name: str) -> SafetensorsFile | None:
    return model.file_of(name) if isinstance(model, SafetensorsModel) else None
