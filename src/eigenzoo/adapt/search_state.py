"""Save the state of an unfinished search: the evaluated values in order, without objects of other libraries.

CMA-ES is a deterministic function of a seed and the evaluated values. So a search resumes by replaying the values without an
evaluation. Nothing is unpickled, so files from strangers are safe.

One safetensors file: `origin` (A,) float32, θ₀; `values` (E,) float64, the minimised values beginning with that of θ₀; `last` (·,
D) float64, the points of the last generation, which reveal that another library version draws differently. The metadata are
`format` and `search`, the hash of all other inputs.

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
        values: the value of θ₀ and then those of whole generations.
        last: the points (·, D) of the last generation.
    """

    origin: Tensor
    values: list[float]
    last: NDArray[np.float64]


def search_key(adapted: Adapted, options: Mapping[str, Any]) -> str:
    """Return the hash of all inputs of a search except its metric: the basis, the start of the coefficients, and the options."""
    digest = hashlib.sha256(json.dumps([adapted.space.manifest.basis_id, dict(options)], sort_keys=True).encode())
    for name, weight in adapted.weights.items():
        digest.update(f"{name} {list(weight.trained.start.shape)} {adapted.start.mean}".encode())
        for values in (weight.trained.start, weight.trained.scales):
            digest.update(values.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_state(path: Path, key: str, state: SearchState) -> None:
    """Write the state of a search. The old file stays complete until the new one replaces it."""
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
    """Read the state of a search. Raises FormatError if the file is not a state, and UsageError if it is of another search."""
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
