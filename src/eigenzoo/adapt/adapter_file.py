"""The file of an adapted model: its coefficients, and nothing that the bundle holds.

One safetensors file: `coefficients`, float32, all layers' in the order of the bundle, row-major; the tensors that were trained
besides, under their names after `besides.`; and in the metadata `format`, `basis` (the id of the bundle's basis, the checksum of
its shards), `mean` (whether the zoo's mean is part of the weights) and, where it is not, `weights` (the fingerprint of those that
it changes); where random directions were trained besides the zoo's (`augment`), how many and their seed: `augment`, `augment_seed`.
What else a rebuilt model is to know may stand there too: `names` (what files call what was trained besides, where
that differs), `classes` (of a task that has others than the model) and `task` (the nursery's).

Legend: C coefficients of all layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenzoo.adapt.attach import Adapted
from eigenzoo.adapt.augment import NONE, Augmentation
from eigenzoo.adapt.fingerprints import of_weights
from eigenzoo.errors import BundleError, FormatError, UsageError
from eigenzoo.formats.output.whole import new_file
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.writer import header_bytes
from eigenzoo.formats.writers import TensorLayout, write_tensors
from eigenzoo.subspace.bases.basis import LayerBasis
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
        about: the metadata.
        augmentation: random directions besides the zoo's; the values have their coefficients too.
    """

    values: Mapping[str, Tensor]
    besides: Mapping[str, Tensor]
    mean: bool
    about: Mapping[str, str]
    augmentation: Augmentation = NONE


def save(
    adapted: Adapted,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write a module's coefficients to a file, which appears whole or not at all; returns its path.

    `about` is metadata that go along: see the top of the file. With `force` it replaces another such file, and no other.
    """
    values = adapted.coefficients()
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
    return _write(Path(path), tensors, metadata, force)


def save_moved(
    found: AdapterFile,
    values: Mapping[str, Tensor],
    space: Subspace,
    path: str | os.PathLike[str],
    about: Mapping[str, str],
) -> Path:
    """Write what a file held with other coefficients, of another subspace, and without random directions; returns its path."""
    tensors = {"coefficients": torch.cat([values[name].reshape(-1).float() for name in space.layers])}
    tensors |= {BESIDES + name: kept.contiguous() for name, kept in found.besides.items()}
    metadata = {name: text for name, text in found.about.items() if name not in _described(Augmentation(1))}
    return _write(Path(path), tensors, {**metadata, "basis": space.manifest.basis_id, **about}, False)


def read(path: str | os.PathLike[str], space: Subspace, *, augmented: bool = False) -> AdapterFile:
    """Read a file; raises BundleError where it belongs to another basis, and FormatError where it is none.

    With `augmented`, one that was trained in random directions too; without, that is a BundleError: no bundle rebuilds them.
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
    shapes = {name: augmentation.shape(basis) for name, basis in space.layers.items()}
    expected = sum(prod(shape) for shape in shapes.values())
    if info.shape != (expected,):
        raise BundleError(
            f"holds {info.shape[0]} coefficients", where=str(path), rule=f"the bundle's layers have {expected}"
        )
    flat = file.read("coefficients")
    if not bool(torch.isfinite(flat).all()):
        raise BundleError("holds coefficients that are NaN or Inf", where=str(path))
    besides = {name.removeprefix(BESIDES): file.read(name) for name in file.tensors if name.startswith(BESIDES)}
    parts = torch.split(flat, [prod(shape) for shape in shapes.values()])
    values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return AdapterFile(values, besides, file.metadata.get("mean") == "true", file.metadata, augmentation)


def is_adapter_file(path: Path) -> bool:
    """Tell whether a file says that it is such a file."""
    try:
        return path.is_file() and SafetensorsFile(path).metadata.get("format") == FORMAT
    except FormatError:
        return False


def load(path: str | os.PathLike[str], adapted: Adapted) -> None:
    """Put what a file holds into an adapted module, which must have been attached with the same kind of start.

    Raises BundleError where it was not, and where what was trained besides has another shape there; nothing has changed then.
    """
    found = read(path, adapted.space, augmented=True)
    if found.augmentation != adapted.augmentation:
        raise BundleError(
            f"was trained with augment={found.augmentation.num}, seed={found.augmentation.seed}",
            where=str(path),
            rule=f"the module has augment={adapted.augmentation.num}, seed={adapted.augmentation.seed}",
            next_step="attach with those of the file",
        )
    if found.mean != adapted.start.mean or set(found.besides) != set(adapted.besides):
        raise BundleError(
            "was trained from another kind of start, or with other parameters besides",
            where=str(path),
            rule=f"mean {adapted.start.mean}, besides: {', '.join(adapted.besides) or 'none'}",
            next_step="attach with the start and the parameters of the training",
        )
    for name, parameter in adapted.besides.items():
        if found.besides[name].shape != parameter.shape:
            raise BundleError(
                f"'{name}' has shape {list(found.besides[name].shape)}",
                where=str(path),
                rule=f"the module has {list(parameter.shape)}",
                next_step="load it into a module like the one that was trained",
            )
    adapted.set_coefficients(found.values)
    with torch.no_grad():
        for name, parameter in adapted.besides.items():
            parameter.copy_(found.besides[name])


def _write(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], force: bool) -> Path:
    layout = [TensorLayout(name, dtype_name(values.dtype), tuple(values.shape)) for name, values in tensors.items()]
    with new_file(target, force=force, own=is_adapter_file) as staging:
        write_tensors(staging, layout, tensors.__getitem__, metadata, sync=False)
    return target


def _described(augmentation: Augmentation) -> dict[str, str]:
    if not augmentation.num:
        return {}
    return {"augment": str(augmentation.num), "augment_seed": str(augmentation.seed)}


def _augmentation(file: SafetensorsFile) -> Augmentation:
    """What a file says of random directions; both numbers as they are written, or neither."""
    found = [file.metadata.get(name) for name in ("augment", "augment_seed")]
    if found == [None, None]:
        return NONE
    try:
        num, seed = (int(text[:20]) if text is not None else -1 for text in found)
        given = Augmentation(num, seed)
    except (ValueError, UsageError):
        given = NONE
    if not given.num or given.num >= 10**6 or list(_described(given).values()) != found:
        raise FormatError("has no numbers as its random directions", where=str(file.path), rule=f"not {found}"[:100])
    return given


def _changed_weights(adapted: Adapted) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights below the coefficients, by the names of the bundle's layers."""
    for layer, (path, name) in adapted.places.items():
        parametrizations: Any = adapted.module.get_submodule(path).parametrizations
        yield layer, parametrizations[name].original


LORA_RANK = 8
_DIMENSIONS = (2, 4)
"""Of the weights that LoRA takes: linear layers, embeddings, convolutions. Biases and norms have no LoRA."""


def lora_bytes(layers: Mapping[str, LayerBasis], rank: int = LORA_RANK) -> int:
    """Return the bytes of a PEFT adapter file of this rank, in float32, of all layers that LoRA can take; its config apart."""
    entries = []
    for name, basis in layers.items():
        layer = basis.layer
        if layer.kind == "update" or len(layer.tensor_shape) in _DIMENSIONS:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            entries.append((f"{module}.lora_A.weight", torch.float32, (rank, layer.shape[1])))
            entries.append((f"{module}.lora_B.weight", torch.float32, (layer.shape[0], rank)))
    header = len(header_bytes(entries, {"format": "pt"}))
    return 8 + -(-header // 8) * 8 + sum(4 * shape[0] * shape[1] for _, _, shape in entries)
