"""Runs of values of many files at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eigenzoo.formats.remote.values import Values, fetch_values
from eigenzoo.formats.safetensors_file import SafetensorsFile
from eigenzoo.formats.tensor_bytes import check_out


def read_many(requests: Sequence[tuple[SafetensorsFile, str, int, int]], outs: Sequence[Tensor]) -> None:
    """Fill each of `outs` (1-D, contiguous) with values start:stop of a tensor of a file; another dtype converts.

    What is remote is fetched together: as long as the slowest range, and not as long as all of them one by one.
    """
    remote: list[Values] = []
    for (file, name, start, stop), out in zip(requests, outs, strict=True):
        if file.remote is None:
            file.read_flat(name, start, stop, out)
            continue
        check_out(out, stop - start)
        position, dtype = file.locate(name, start, stop)
        remote.append((file.remote, position, dtype, out))
    fetch_values(remote)
