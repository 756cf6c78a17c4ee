"""Save and load the file of an adapted model. It contains the coefficients and nothing that the bundle contains.

One safetensors file. Tensors:

* `coefficients`: float32, of all layers in the order of the bundle, row-major. Low-rank cores are stored as their two
  factors, whose product contains the mean's core if the mean of updates is part of the weights;
* `besides.<name>`: other trained parameters.

Metadata:

* `format`; `basis`: the id of the bundle's basis, the hash of its shards' checksums;
* `mean`: whether the zoo's mean is part of the weights. If it is not, `weights` is the fingerprint of the changed weights;
* `augment` and `augment_seed`: number and seed of additional random directions, if there are any;
* optional, for rebuilt models: `names` (of other trained parameters in files, if they differ), `classes` (of a task with other
  classes than the model's) and `task` (of the nursery).

Legend: C coefficients of all layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenzoo.adapt.attach import Adapted
from eigenzoo.adapt.augment import NONE, Augmentation
from eigenzoo.adapt.fingerprints import of_weights
from eigenzoo.errors import BundleError, FormatError, UsageError
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.writer import header_bytes
from eigenzoo.subspace.bases.basis import LayerBasis
from eigenzoo.subspace.coefficient_file import FORMAT, flat_numbers, write_coefficient_file
from eigenzoo.subspace.subspace import Subspace

BESIDES = "besides."


@dataclass(frozen=True)
class AdapterFile:
    """The contents of an adapter file, checked against a bundle.

    Attributes:
        values: coefficients by layer.
        besides: other trained parameters by name.
        mean: whether the zoo's mean is part of the weights.
        about: the metadata.
        augmentation: additional random directions; `values` contains their coefficients too.
        numbers: the values as they are trained and stored: two factors of low-rank cores.
    """

    values: Mapping[str, Tensor]
    besides: Mapping[str, Tensor]
    mean: bool
    about: Mapping[str, str]
    augmentation: Augmentation = NONE
    numbers: Mapping[str, Tensor] = field(default_factory=dict)


def save(
    adapted: Adapted,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write a module's coefficients to a file and return its path. The file appears complete or not at all.

    `about` is additional metadata; see the top of the file. `force` replaces an existing adapter file, but no other file.
    """
    values = adapted.numbers()
    tensors = {"coefficients": torch.cat([values[name].reshape(-1).float() for name in adapted.space.layers])}
    tensors |= {BESIDES + name: parameter.detach().cpu().contiguous() for name, parameter in adapted.besides.items()}
    metadata = {
        "format": FORMAT,
        "basis": adapted.space.manifest.basis_id,
        "mean": "true" if adapted.start.mean else "false",
        **(about or {}),
        **_described(adapted.augmentation),
    }
    if not adapted.start.mean and adapted.space.view != "update":
        metadata["weights"] = of_weights(_changed_weights(adapted))
    return write_coefficient_file(Path(path), tensors, metadata, force)


def save_moved(
    file: AdapterFile,
    values: Mapping[str, Tensor],
    space: Subspace,
    path: str | os.PathLike[str],
    about: Mapping[str, str],
) -> Path:
    """Write the contents of a file again, with coefficients of another subspace and without random directions. Return its path."""
    tensors = {"coefficients": flat_numbers(values, space, mean=file.mean)}
    tensors |= {BESIDES + name: tensor.contiguous() for name, tensor in file.besides.items()}
    metadata = {name: text for name, text in file.about.items() if name not in _described(Augmentation(1))}
    return write_coefficient_file(Path(path), tensors, {**metadata, "basis": space.manifest.basis_id, **about}, False)


def read(path: str | os.PathLike[str], space: Subspace, *, augmented: bool = False) -> AdapterFile:
    """Read an adapter file. Raises BundleError if it belongs to another basis, and FormatError if it is not an adapter file.

    `augmented` also accepts files with random directions. Otherwise they are a BundleError, because no bundle rebuilds them.
    """
    file = SafetensorsFile(Path(path))
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
    augmentation = _augmentation(file)
    if augmentation.num and not augmented:
        raise BundleError(
            f"was trained in {augmentation.num} random directions of each layer besides the zoo's",
            where=str(path),
            rule="the bundle alone does not rebuild them",
            next_step="attach with augment and seed of the file, load it, and detach",
        )
    mean = file.metadata.get("mean") == "true"
    shapes = {name: augmentation.shape(basis) for name, basis in space.layers.items()}
    forms = {name: augmentation.form(basis, mean=mean) for name, basis in space.layers.items()}
    sizes = [form.num_numbers if form is not None else prod(shapes[name]) for name, form in forms.items()]
    expected = sum(sizes)
    if info.shape != (expected,):
        raise BundleError(
            f"holds {info.shape[0]} coefficients", where=str(path), rule=f"the bundle's layers have {expected}"
        )
    flat = file.read("coefficients")
    if not bool(torch.isfinite(flat).all()):
        raise BundleError("holds coefficients that are NaN or Inf", where=str(path))
    besides = {name.removeprefix(BESIDES): file.read(name) for name in file.tensors if name.startswith(BESIDES)}
    numbers = {
        name: part if forms[name] is not None else part.view(shapes[name])
        for name, part in zip(shapes, torch.split(flat, sizes), strict=True)
    }
    values = {name: part if (form := forms[name]) is None else form.matrices(part) for name, part in numbers.items()}
    return AdapterFile(values, besides, mean, file.metadata, augmentation, numbers)


def load(path: str | os.PathLike[str], adapted: Adapted) -> None:
    """Load a file into an adapted module, which must have been attached with the same kind of start.

    Raises BundleError if it was not, or if another trained parameter has another shape. Then nothing has changed.
    """
    file = read(path, adapted.space, augmented=True)
    if file.augmentation != adapted.augmentation:
        raise BundleError(
            f"was trained with augment={file.augmentation.num}, seed={file.augmentation.seed}",
            where=str(path),
            rule=f"the module has augment={adapted.augmentation.num}, seed={adapted.augmentation.seed}",
            next_step="attach with those of the file",
        )
    if file.mean != adapted.start.mean or set(file.besides) != set(adapted.besides):
        raise BundleError(
            "was trained from another kind of start, or with other parameters besides",
            where=str(path),
            rule=f"mean {adapted.start.mean}, besides: {', '.join(adapted.besides) or 'none'}",
            next_step="attach with the start and the parameters of the training",
        )
    for name, parameter in adapted.besides.items():
        if file.besides[name].shape != parameter.shape:
            raise BundleError(
                f"'{name}' has shape {list(file.besides[name].shape)}",
                where=str(path),
                rule=f"the module has {list(parameter.shape)}",
                next_step="load it into a module like the one that was trained",
            )
    for name, weight in adapted.weights.items():
        weight.trained.set_numbers(file.numbers[name])
    with torch.no_grad():
        for name, parameter in adapted.besides.items():
            parameter.copy_(file.besides[name])


def _described(augmentation: Augmentation) -> dict[str, str]:
    if not augmentation.num:
        return {}
    return {"augment": str(augmentation.num), "augment_seed": str(augmentation.seed)}


def _augmentation(file: SafetensorsFile) -> Augmentation:
    """Return a file's random directions. Both numbers must be valid, or both absent."""
    numbers = [file.metadata.get(name) for name in ("augment", "augment_seed")]
    if numbers == [None, None]:
        return NONE
    try:
        num, seed = (int(text[:20]) if text is not None else -1 for text in numbers)
        augmentation = Augmentation(num, seed)
    except (ValueError, UsageError):
        augmentation = NONE
    if not augmentation.num or augmentation.num >= 10**6 or list(_described(augmentation).values()) != numbers:
        raise FormatError("has no numbers as its random directions", where=str(file.path), rule=f"not {numbers}"[:100])
    return augmentation


def _changed_weights(adapted: Adapted) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that the coefficients change, by the names of the bundle's layers."""
    for layer, (path, name) in adapted.places.items():
        parametrizations: Any = adapted.module.get_submodule(path).parametrizations
        yield layer, parametrizations[name].original


LORA_RANK = 8
_DIMENSIONS = (2, 4)
"""Dimensions of weights that LoRA supports: linear layers, embeddings, convolutions. Biases and norms have no LoRA."""


def lora_bytes(layers: Mapping[str, LayerBasis], rank: int = LORA_RANK) -> int:
    """Return the bytes of a float32 PEFT adapter file of this rank with all layers that LoRA supports, without its config."""
    entries = []
    for name, basis in layers.items():
        layer = basis.layer
        if layer.kind == "update" or len(layer.tensor_shape) in _DIMENSIONS:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            entries.append((f"{module}.lora_A.weight", torch.float32, (rank, layer.shape[1])))
            entries.append((f"{module}.lora_B.weight", torch.float32, (layer.shape[0], rank)))
    header = len(header_bytes(entries, {"format": "pt"}))
    return 8 + -(-header // 8) * 8 + sum(4 * shape[0] * shape[1] for _, _, shape in entries)
