"""Write files of coefficients. `adapt.adapter_file` describes and reads them, and writes those that a module was trained for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import FormatError
from eigenzoo.formats.output.whole import new_file
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.writers import TensorLayout, write_tensors
from eigenzoo.subspace.stored import StoredSubspace

FORMAT = "eigenzoo-coefficients"


def save_coefficients(
    values: Mapping[str, Tensor],
    space: StoredSubspace,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write coefficients that no module was trained for, such as those of merged models, and return the path.

    The zoo's mean is part of their weights. Low-rank cores become the nearest ones of their rank: a combination of models has a
    higher rank than each of them. `force` replaces an existing file of coefficients, but no other file.
    """
    tensors = {"coefficients": flat_numbers(values, space, mean=True)}
    metadata = {"format": FORMAT, "basis": space.manifest.basis_id, "mean": "true", **(about or {})}
    return write_coefficient_file(Path(path), tensors, metadata, force)


def is_coefficient_file(path: Path) -> bool:
    """Tell whether a file's metadata declare a file of coefficients."""
    try:
        return path.is_file() and SafetensorsFile(path).metadata.get("format") == FORMAT
    except FormatError:
        return False


def flat_numbers(values: Mapping[str, Tensor], space: StoredSubspace, *, mean: bool) -> Tensor:
    """Return the numbers that a file holds, in the order of the bundle's layers; of low-rank cores the nearest of their rank."""
    forms = {name: basis.low_rank(mean=mean) for name, basis in space.layers.items()}
    numbers = [values[name] if form is None else form.numbers(values[name]) for name, form in forms.items()]
    return torch.cat([part.reshape(-1).float() for part in numbers])


def write_coefficient_file(
    target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], force: bool
) -> Path:
    """Write the tensors of a file of coefficients. It appears complete or not at all."""
    layout = [TensorLayout(name, dtype_name(values.dtype), tuple(values.shape)) for name, values in tensors.items()]
    with new_file(target, force=force, own=is_coefficient_file) as staging:
        write_tensors(staging, layout, tensors.__getitem__, metadata, sync=False)
    return target
