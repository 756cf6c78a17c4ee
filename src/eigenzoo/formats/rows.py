"""The same run of values of many models, read into the rows of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eigenzoo.formats.checkpoint import SafetensorsModel
from eigenzoo.formats.model import Model
from eigenzoo.formats.remote.values import fetch_values
from eigenzoo.formats.tensor_bytes import as_bytes


def read_rows(models: Sequence[Model], names: Sequence[str], start: int, stop: int, rows: Tensor) -> None:
    """Fill row n of `rows`, contiguous (N, stop − start), with values start:stop of tensor `names[n]` of model n, converted.

    Values that need no conversion go straight from the file into the row: a read of many models is many short reads, and what
    Python does around each counts.
    """
    view, width = as_bytes(rows), (stop - start) * rows.dtype.itemsize
    elsewhere = []
    for place, (model, name) in enumerate(zip(models, names, strict=True)):
        file = model.file_of(name) if isinstance(model, SafetensorsModel) else None
        if file is not None and file.remote is not None:
            elsewhere.append((file.remote, *file.locate(name, start, stop), rows[place]))
        elif file is not None and file.tensors[name].dtype == rows.dtype:
            file.read_bytes(name, start, stop, view[place * width : (place + 1) * width])
        else:
            model.read_flat(name, start, stop, out=rows[place])
    if elsewhere:
        # All at once: what is far away is asked for together.
        fetch_values(elsewhere)
