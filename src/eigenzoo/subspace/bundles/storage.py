"""Write bases, moments and coefficients into a bundle's folder, and read them back."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenzoo.errors import BundleError
from eigenzoo.formats.bundle.basis_files import BasisFiles
from eigenzoo.formats.bundle.coded_tensors import CODED_PARTS, SCALE, CodedTensors, code_shape, is_coded
from eigenzoo.formats.bundle.contents import ContentStore, Template, put_template
from eigenzoo.formats.bundle.folder import (
    MOMENTS,
    StoredCoefficients,
    coefficient_file,
    file_sha256,
    write_coefficients,
)
from eigenzoo.formats.bundle.manifest import LayerRecord, ModelRecord, SourceRecord
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.writers import TensorLayout, write_tensors
from eigenzoo.linalg.quantised import SCALES, code_dtype, num_blocks
from eigenzoo.records import Layer
from eigenzoo.subspace.bases.basis import FLAT, STACKED, LayerBasis, StoredAs, TensorReader
from eigenzoo.subspace.bases.flat import FlatBasis
from eigenzoo.subspace.bases.stacked import StackedBasis
from eigenzoo.subspace.bases.tucker import TuckerBasis
from eigenzoo.subspace.moments.layer_moments import LayerMoments

REFERENCE = "reference_models"
"""Metadata key of the moments: the number of models whose mean is the reference."""


def layer_record(layer: Layer, form: str, ranks: Mapping[str, int], has_mean: bool) -> LayerRecord:
    """Describe a fitted layer for the manifest."""
    return LayerRecord.model_validate(
        {
            "name": layer.name,
            "kind": layer.kind,
            "form": form,
            "shape": list(layer.shape),
            "tensor_shape": list(layer.tensor_shape),
            "unfolding": layer.unfolding,
            "dtype": layer.dtype,
            "num_bytes": layer.num_bytes,
            "ranks": dict(ranks),
            "has_mean": has_mean,
        }
    )


def read_basis(
    record: LayerRecord,
    center: str,
    files: BasisFiles,
    stored: StoredAs | None = None,
    tensors: TensorReader | None = None,
) -> LayerBasis:
    """Return a layer's basis after its tensors' shapes are checked against the record. `tensors` reads it instead of the files."""
    stored = stored or StoredAs()
    layer = Layer(
        record.name,
        record.kind,
        (record.shape[0], record.shape[1]),
        tuple(record.tensor_shape),
        record.unfolding,
        record.dtype,
        record.num_bytes,
    )
    ranks: dict[str, int] = dict(record.ranks)  # type: ignore[arg-type]
    basis: LayerBasis
    if record.form == STACKED:
        basis = StackedBasis(layer, ranks, center, tensors or files, stored=stored)
    elif record.form == FLAT:
        basis = FlatBasis(layer, ranks, center, tensors or files, has_mean=record.has_mean, stored=stored)
    else:
        basis = TuckerBasis(layer, ranks, center, tensors or files, has_mean=record.has_mean, stored=stored)
    _check_dtypes(layer.name, files, stored.coding)
    shapes = _checked_shapes(basis, files, record.has_mean)
    if not stored.coding:
        return basis
    return replace(basis, tensors=CodedTensors(basis.tensors, stored.coding, shapes))


def _check_dtypes(layer: str, files: BasisFiles, coding: str) -> None:
    """Raise BundleError unless ranks are integers, tables are float64, bases are floating-point, and codes those of the coding."""
    for part, dtype in files.dtypes(layer).items():
        if coding and part in CODED_PARTS:
            fits, rule = dtype == code_dtype(coding), f"codes of {coding} are {dtype_name(code_dtype(coding))}"
        elif coding and part.endswith(SCALE):
            fits, rule = dtype == SCALES, f"scales are {dtype_name(SCALES)}"
        elif part == "ranks":
            fits, rule = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool), "ranks are integers"
        elif part in ("scales", "weights", "products"):
            fits, rule = dtype == torch.float64, "scales, weights and products are float64"
        else:
            fits, rule = dtype.is_floating_point, "bases are floating-point"
        if not fits:
            raise BundleError(f"dtype {dtype_name(dtype)}", where=f"tensor '{layer}/{part}'", rule=rule)


def _checked_shapes(basis: LayerBasis, files: BasisFiles, has_mean: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's parts, by the names of their tensors; raises BundleError where a header says another."""
    layer, ranks, coding = basis.layer, basis.ranks, basis.stored.coding
    expected: dict[str, tuple[int, ...]] = {}
    if isinstance(basis, StackedBasis):
        rows, num_models = _stacked_sizes(layer, files, coding)
        size = 1 + ranks["models"]
        expected = {
            "factors_b": (rows, layer.shape[0]),
            "factors_a": (rows, layer.shape[1]),
            "scales": (num_models,),
            "weights": (size, num_models),
            "products": (size, size),
        }
    elif isinstance(basis, FlatBasis):
        expected = {"models": (ranks["models"], *layer.shape)}
    elif isinstance(basis, TuckerBasis):
        expected = {
            axis: (layer.shape[side], ranks[axis]) for side, axis in enumerate(("outputs", "inputs")) if axis in ranks
        }
        if "models" in ranks:
            expected["models"] = (ranks["models"], *basis.core_shape)
    named = {f"{layer.name}/{part}": shape for part, shape in expected.items()}
    stored = named
    if coding:
        coded = {name: shape for name, shape in named.items() if is_coded(name)}
        scales = {name + SCALE: (num_blocks(prod(shape)),) for name, shape in coded.items()}
        stored = {**named, **{name: code_shape(shape, coding) for name, shape in coded.items()}, **scales}
    for name, shape in stored.items():
        if prod(shape) and files.shape(name) != shape:
            raise BundleError(
                f"shape {list(files.shape(name))}", where=f"tensor '{name}'", rule=f"the manifest says {list(shape)}"
            )
    if has_mean and not isinstance(basis, StackedBasis):
        full_shape = basis.core_shape if isinstance(basis, TuckerBasis) and layer.kind == "update" else layer.shape
        shape = files.shape(f"{layer.name}/mean")
        if len(shape) != 2 or any(size not in (1, full) for size, full in zip(shape, full_shape, strict=True)):
            raise BundleError(
                f"shape {list(shape)}",
                where=f"tensor '{layer.name}/mean'",
                rule=f"it is broadcast to {list(full_shape)}",
            )
    return named


def _stacked_sizes(record: Layer, files: BasisFiles, coding: str) -> tuple[int, int]:
    """Return the rows of the stacked factors and the number of models, after checking that the ranks add up."""
    layer = record.name
    factors, models = files.shape(f"{layer}/factors_b"), files.shape(f"{layer}/ranks")
    if len(models) == 1 and coding:
        # Codes may be flat: their number of rows is what the ranks say, and their shape is compared with it.
        factors = (int(files.read(f"{layer}/ranks").long().sum()), record.shape[0])
    if len(factors) != 2 or len(models) != 1:
        raise BundleError(f"shapes {list(factors)} and {list(models)}", where=f"tensors '{layer}/factors_b' and ranks")
    ranks = files.read(f"{layer}/ranks").long()
    if bool((ranks < 0).any()) or int(ranks.sum()) != factors[0]:
        raise BundleError(
            f"ranks that add up to {int(ranks.sum())}",
            where=f"tensor '{layer}/ranks'",
            rule=f"its factors have {factors[0]} rows",
        )
    return factors[0], models[0]


def write_moments(folder: Path, moments: Mapping[str, LayerMoments]) -> None:
    """Write the Gram of every layer."""
    values = {key: value for name, layer in moments.items() for key, value in moment_tensors(name, layer).items()}
    num_reference = next(iter(moments.values())).num_reference
    write_moment_tensors(folder / MOMENTS, values, num_reference)


def write_moment_tensors(
    path: Path, values: Mapping[str, Tensor], num_reference: int, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of moments to a file. They may not be on the disk yet when this returns."""
    layout = [TensorLayout(name, "F64", tuple(tensor.shape)) for name, tensor in values.items()]
    described = {REFERENCE: str(num_reference), **(metadata or {})}
    write_tensors(path, layout, values.__getitem__, described, sync=False)


def moment_tensors(name: str, layer: LayerMoments) -> dict[str, Tensor]:
    """Return one layer's moments as tensors for storage."""
    values = {f"{name}/gram": layer.gram_NN, f"{name}/cross": layer.cross_N}
    values[f"{name}/reference_energy"] = torch.tensor([layer.reference_energy], dtype=torch.float64)
    values[f"{name}/round_off"] = torch.tensor([layer.round_off], dtype=torch.float64)
    if layer.shift_N is not None:
        values[f"{name}/shift"] = layer.shift_N
        values[f"{name}/shift_energy"] = torch.tensor([layer.shift_energy], dtype=torch.float64)
    if layer.entries is not None:
        values[f"{name}/entries"] = torch.tensor([layer.entries], dtype=torch.float64)
    traits = {"sums": layer.sums_N, "singular": layer.singular_NR, "starts": layer.starts_NN}
    return values | {f"{name}/{part}": value for part, value in traits.items() if value is not None}


def num_models_stored(file: SafetensorsFile, layer: Layer) -> int:
    """Return the number of models in a layer's moments: all, or the first ones if later models were added without moments."""
    info = file.tensors.get(f"{layer.name}/gram")
    return info.shape[0] if info is not None and info.shape else 0


def read_moments(file: SafetensorsFile, layer: Layer, num_models: int) -> LayerMoments:
    """Read one layer's moments and check their shapes."""

    def read(part: str, shape: tuple[int, ...]) -> Tensor:
        info = file.tensors.get(f"{layer.name}/{part}")
        if info is None or info.shape != shape or info.dtype != torch.float64:
            raise BundleError(
                "is missing or of another shape", where=f"moment '{layer.name}/{part}'", rule=f"float64 {list(shape)}"
            )
        values = file.read(info.name)
        if not bool(torch.isfinite(values).all()):
            raise BundleError("holds NaN or Inf", where=f"moment '{layer.name}/{part}'", rule="moments are finite")
        return values

    count = file.metadata.get(REFERENCE, "")
    if not (count.isascii() and count.isdigit() and len(count) < 9 and 1 <= int(count) <= num_models):
        raise BundleError(
            f"the reference is of {count[:20]!r} models", where=str(file.path), rule=f"a number from 1 to {num_models}"
        )
    moments = LayerMoments(
        read("gram", (num_models, num_models)),
        read("cross", (num_models,)),
        float(read("reference_energy", (1,))),
        layer.num_values,
        int(count),
    )
    moments = replace(moments, round_off=float(read("round_off", (1,))), **_traits(file, layer, num_models, read))
    if f"{layer.name}/shift" not in file.tensors:
        return moments
    return replace(moments, shift_N=read("shift", (num_models,)), shift_energy=float(read("shift_energy", (1,))))


def _traits(
    file: SafetensorsFile, layer: Layer, num_models: int, read: Callable[[str, tuple[int, ...]], Tensor]
) -> dict[str, Any]:
    """Read the stored traits. Growth from a bundle alone stores none."""
    singular = file.tensors.get(f"{layer.name}/singular")
    width = singular.shape[1] if singular is not None and len(singular.shape) == 2 else 0
    shapes = {"sums": (num_models,), "singular": (num_models, width), "starts": (num_models, num_models)}
    fields = {"sums": "sums_N", "singular": "singular_NR", "starts": "starts_NN"}
    traits = {
        fields[part]: read(part, shape) for part, shape in shapes.items() if f"{layer.name}/{part}" in file.tensors
    }
    return {**traits, "entries": float(read("entries", (1,)))} if f"{layer.name}/entries" in file.tensors else traits


def write_model(
    folder: Path,
    name: str,
    basis_id: str,
    values: Sequence[Tensor],
    residuals: Sequence[float],
    template: Template,
    source: SourceRecord,
    energies: Sequence[float] | None = None,
    dtype: str = "float32",
) -> ModelRecord:
    """Write one model's coefficients, in `dtype`, and contents, and return its record.

    `energies` are given if the moments do not contain them.
    """
    file = coefficient_file(name)
    flat = torch.cat([value.reshape(-1).float() for value in values]) if values else torch.zeros(0)
    energies_L = None if energies is None else torch.tensor(energies, dtype=torch.float64)
    stored = StoredCoefficients(flat, torch.tensor(residuals, dtype=torch.float32), energies_L)
    write_coefficients(folder / file, name, basis_id, stored, dtype)
    contents = put_template(ContentStore(folder / "rest"), template)
    return ModelRecord.model_validate({"name": name, "coefficients": file, "source": source, **contents})


def split_coefficients(flat: Tensor, layers: Mapping[str, LayerBasis]) -> dict[str, Tensor]:
    """Split one model's vector, or the vectors of many models (N, …), into the layers' coefficients."""
    values, start = {}, 0
    for name, basis in layers.items():
        values[name] = basis.read_coefficients(flat[..., start : start + basis.num_coefficients])
        start += basis.num_coefficients
    return values


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Link a file that never changes into another folder, or copy it across file systems."""
    if os.path.islink(source):
        source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def link_all(folder: Path, target: Path, files: Iterable[str]) -> None:
    """Link files of a folder into another one, under the same names."""
    made: set[str] = set()
    for file in files:
        parent = os.path.dirname(file)
        if parent not in made:
            (target / parent).mkdir(exist_ok=True)
            made.add(parent)
        link_or_copy(f"{folder}/{file}", f"{target}/{file}")


def identify(basis: BasisFiles) -> str:
    """Return the id of a basis: the hash of its shards' checksums. Shards without a checksum are read."""
    records = basis.records
    sums = [records[path.name].sha256 if path.name in records else file_sha256(path) for path in basis.paths]
    return hashlib.sha256("".join(sums).encode()).hexdigest()
