"""Values of remote tensors, read by ranges into tensors of the caller's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eigenzoo.errors import UnsupportedError
from eigenzoo.formats.remote.fetching import Request, fetch
from eigenzoo.formats.remote.retrying import MAX_BYTES
from eigenzoo.formats.remote.source import RemoteFile
from eigenzoo.formats.safetensors.tensor_bytes import as_bytes

Values = tuple[RemoteFile, int, torch.dtype, Tensor]
"""A file, the byte at which values begin, their dtype, and a contiguous 1-D tensor that takes them."""


def fetch_values(wanted: Sequence[Values]) -> None:
    """Fill tensors with values of remote files, all in one fetch; other dtypes convert by way of a bounded scratch."""
    requests: list[Request] = []
    converted: list[tuple[Tensor, Tensor]] = []
    num_bytes = 0
    for file, position, dtype, out in wanted:
        out = out.detach()
        if out.dtype == dtype:
            requests.append((file, position, as_bytes(out)))
            continue
        if dtype.is_complex and not out.dtype.is_complex:
            raise UnsupportedError(f"complex values cannot be read as {out.dtype}", where=file.url)
        step = MAX_BYTES // dtype.itemsize
        for start in range(0, out.numel(), step):
            part = out[start : start + step]
            raw = torch.empty(part.numel(), dtype=dtype)
            if num_bytes + raw.nbytes > MAX_BYTES:
                _fetch_converted(requests, converted)
                requests, converted, num_bytes = [], [], 0
            num_bytes += raw.nbytes
            requests.append((file, position + start * dtype.itemsize, as_bytes(raw)))
            converted.append((part, raw))
    _fetch_converted(requests, converted)


def _fetch_converted(requests: Sequence[Request], converted: Sequence[tuple[Tensor, Tensor]]) -> None:
    fetch(requests)
    for part, raw in converted:
        part.copy_(raw)
