"""The file of an adapted model: its coefficients, and nothing that the bundle holds.

One safetensors file: `coefficients`, float32, all layers' in the order of the bundle, row-major; the tensors that were trained
besides, under their names after `besides.`; and in the metadata `format`, `basis` (the id of the bundle's basis, the checksum of
its shards), `mean` (whether the zoo's mean is part of the weights) and, where it is not, nothing else: the base is the user's.

Legend: C coefficients of all layers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.adapt.attach import Adapted
from eigenzoo.errors import BundleError, FormatError
from eigenzoo.formats.dtypes import dtype_name
from eigenzoo.formats.output import new_file
from eigenzoo.formats.safetensors_file import SafetensorsFile
from eigenzoo.formats.writers import TensorLayout, write_tensors
from eigenzoo.subspace.storage import split_coefficients
from eigenzoo.subspace.subspace import Subspace

FORMAT = "eigenzoo-coefficients"
BESIDES = "besides."


@dataclass(frozen=True)
class AdapterFile:
    """What such a file holds, checked against a bundle.

    Attributes:
        values: by layer.
        besides: by name.
        mean: whether the zoo's mean is part of the weights.
    """

    values: Mapping[str, Tensor]
    besides: Mapping[str, Tensor]
    mean: bool


def save(adapted: Adapted, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a module's coefficients to a file, which appears whole or not at all; returns its path."""
    values = adapted.coefficients()
    tensors = {"coefficients": torch.cat([values[name].reshape(-1).float() for name in adapted.space.layers])}
    tensors |= {BESIDES + name: parameter.detach().cpu().contiguous() for name, parameter in adapted.besides.items()}
    metadata = {
        "format": FORMAT,
        "basis": adapted.space.manifest.basis_id,
        "mean": "true" if adapted.start.mean else "false",
    }
    layout = [TensorLayout(name, dtype_name(values.dtype), tuple(values.shape)) for name, values in tensors.items()]
    target = Path(path)
    with new_file(target, force=force) as staging:
        write_tensors(staging, layout, tensors.__getitem__, metadata, sync=False)
    return target


def read(path: str | os.PathLike[str], space: Subspace) -> AdapterFile:
    """Read a file; raises BundleError where it belongs to another basis, and FormatError where it is none."""
    file = SafetensorsFile(Path(path))
    expected = sum(basis.num_coefficients for basis in space.layers.values())
    info = file.tensors.get("coefficients")
    if file.metadata.get("format") != FORMAT or info is None or info.dtype != torch.float32 or len(info.shape) != 1:
        raise FormatError("holds no coefficients", where=str(path), rule="eigenzoo adapt writes such files")
    if file.metadata.get("basis") != space.manifest.basis_id:
        raise BundleError(
            "belongs to another basis",
            where=str(path),
            rule=f"the basis of {space.path} is {space.manifest.basis_id}",
            next_step="name the bundle that it was trained in",
        )
    if info.shape != (expected,):
        raise BundleError(
            f"holds {info.shape[0]} coefficients", where=str(path), rule=f"the bundle's layers have {expected}"
        )
    flat = file.read("coefficients")
    if not bool(torch.isfinite(flat).all()):
        raise BundleError("holds coefficients that are NaN or Inf", where=str(path))
    besides = {name.removeprefix(BESIDES): file.read(name) for name in file.tensors if name.startswith(BESIDES)}
    return AdapterFile(split_coefficients(flat, space.layers), besides, file.metadata.get("mean") == "true")


def load(path: str | os.PathLike[str], adapted: Adapted) -> None:
    """Put what a file holds into an adapted module, which must have been attached with the same kind of start."""
    found = read(path, adapted.space)
    if found.mean != adapted.start.mean or set(found.besides) != set(adapted.besides):
        raise BundleError(
            "was trained from another kind of start, or with other parameters besides",
            where=str(path),
            rule=f"mean {adapted.start.mean}, besides: {', '.join(adapted.besides) or 'none'}",
            next_step="attach with the start and the parameters of the training",
        )
    adapted.set_coefficients(found.values)
    with torch.no_grad():
        for name, parameter in adapted.besides.items():
            parameter.copy_(found.besides[name])
