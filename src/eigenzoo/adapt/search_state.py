"""What is kept of a search that has not ended: the values that it was told, in order, and no object of any library.

CMA-ES is a deterministic function of a seed and the values that it was told. So a search goes on by being told them again, at
no evaluation: nothing is unpickled, and the file is safe to take from anybody.

One safetensors file: `origin` (A,) float32, θ₀; `values` (E,) float64, to be made small, that of θ₀ first; `last` (·, D) float64,
the points of the last generation, by which other draws of another library are noticed. In the metadata `format`, and `search`: the
hash of everything else that decides.

Legend: A all coefficients, E evaluations, D numbers that are searched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eigenzoo.adapt.attach import Adapted
from eigenzoo.errors import FormatError, UsageError
from eigenzoo.formats.output.whole import new_file
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.writers import TensorLayout, write_tensors

FORMAT = "eigenzoo-search"
_PARTS = {"origin": (torch.float32, 1), "values": (torch.float64, 1), "last": (torch.float64, 2)}


@dataclass
class SearchState:
    """A search so far.

    Attributes:
        origin: θ₀ (A,).
        values: what was told, whole generations after the value of θ₀.
        last: the points (·, D) of the last generation.
    """

    origin: Tensor
    values: list[float]
    last: NDArray[np.float64]


def search_key(adapted: Adapted, options: Mapping[str, Any]) -> str:
    """Return the hash of what decides a search besides its metric: the basis, where coefficients start, and the options."""
    digest = hashlib.sha256(json.dumps([adapted.space.manifest.basis_id, dict(options)], sort_keys=True).encode())
    for name, weight in adapted.weights.items():
        digest.update(f"{name} {list(weight.trained.start.shape)} {adapted.start.mean}".encode())
        for values in (weight.trained.start, weight.trained.scales):
            digest.update(values.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_state(path: Path, key: str, state: SearchState) -> None:
    """Write a search so far; the file that was there is whole until the new one is."""
    tensors = {
        "origin": state.origin,
        "values": torch.tensor(state.values, dtype=torch.float64),
        "last": torch.from_numpy(state.last).contiguous(),
    }
    layout = [TensorLayout(name, dtype_name(values.dtype), tuple(values.shape)) for name, values in tensors.items()]
    with new_file(path, force=True, own=_is_state) as staging:
        write_tensors(staging, layout, tensors.__getitem__, {"format": FORMAT, "search": key}, sync=False)


def _is_state(path: Path) -> bool:
    try:
        return SafetensorsFile(path).metadata.get("format") == FORMAT
    except FormatError:
        return False


def read_state(path: Path, key: str, num_all: int, num_searched: int) -> SearchState:
    """Read a search so far; raises FormatError where the file is none, and UsageError where it is another search's."""
    file = SafetensorsFile(path)
    kinds = {name: (info.dtype, len(info.shape)) for name, info in file.tensors.items()}
    if file.metadata.get("format") != FORMAT or kinds != _PARTS:
        raise FormatError("holds no search", where=str(path), rule="eigenzoo.adapt.search writes such files")
    if file.metadata.get("search") != key:
        raise UsageError(
            "is of another search",
            where=str(path),
            rule="a search goes on with the same bundle, start, seed and options, and the same versions of cma and numpy",
            next_step="name another state, or search as before",
        )
    sizes = {name: info.shape for name, info in file.tensors.items()}
    if sizes["origin"] != (num_all,) or sizes["last"][1] != num_searched or sizes["values"][0] < 1 + sizes["last"][0]:
        raise FormatError(
            f"has shapes {sizes}", where=str(path), rule=f"{num_all} coefficients, {num_searched} searched"
        )
    origin, values = file.read("origin"), file.read("values")
    if not bool(torch.isfinite(origin).all()) or not bool(torch.isfinite(values[:1]).all()):
        raise FormatError("holds a start that is NaN or Inf", where=str(path))
    return SearchState(origin, values.tolist(), file.read("last").numpy())
