"""Estimate a bundle's size for given ranks from the zoo's headers, and measure the size of a written bundle.

Legend: N models, O outputs, I inputs, P kept outputs, Q kept inputs, K kept directions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from eigenzoo.errors import UsageError
from eigenzoo.formats.bundle.basis_files import header_room
from eigenzoo.formats.bundle.contents import canonical_json, tensor_id
from eigenzoo.formats.bundle.folder import MOMENTS, file_sizes, write_manifest
from eigenzoo.formats.bundle.manifest import MAX_LEFT, FileRecord, Manifest, ModelRecord, SourceRecord
from eigenzoo.formats.layout import layout_of
from eigenzoo.formats.side_files import listed_first
from eigenzoo.linalg import low_rank
from eigenzoo.linalg.quantised import value_bytes
from eigenzoo.records import ByteCount, Layer, plain
from eigenzoo.subspace.bases.basis import CORES, MAX_TENSORS, STACKED, form_of
from eigenzoo.subspace.bundles.card import write_card
from eigenzoo.subspace.bundles.saving import MEASURED
from eigenzoo.subspace.stored import StoredSubspace
from eigenzoo.zoo.stack import UpdateStack
from eigenzoo.zoo.zoo import Zoo

COEFFICIENT_BYTES = 4


class ItemSizes(NamedTuple):
    """Bytes of a value of bases, with its share of a scale where they are quantised, and of a coefficient."""

    basis: float
    coefficient: int = COEFFICIENT_BYTES


FILE_OVERHEAD = 280
"""Measured bytes of the header of one model's file in a bundle, without its name."""

MANIFEST_PER_LAYER = 700
"""Largest number of bytes of a layer in the manifest: its record, its fit and its discarded energy, without its name."""

CARD_AND_REPORT = 2300
"""Measured bytes of the card and of the report without its layers."""

MANIFEST_PER_MODEL = 580
"""Measured bytes of a model in the manifest: its record, its source, and the checksums of its files."""

TENSOR_HEADER = 110
"""Bytes of a tensor's file in rest/ without its values."""

RECORD_BYTES = 140
"""Bytes of a file of rest/ in the manifest's list of files: name, size and checksum."""

MODELS = ("models",)

ANY_CHECKSUM = "0" * 64
"""A placeholder with the length of a checksum."""


def basis_bytes(
    layer: Layer,
    ranks: Mapping[str, int],
    axes: Sequence[str],
    itemsize: float,
    update_ranks: int = 0,
    num_models: int = 0,
) -> int:
    """Return the bytes of a layer's center and bases, or for form `stacked` of ΣR = `update_ranks` factors and the table.

    Factors keep the dtype of their files, unless bases are quantised.
    """
    outputs, inputs = layer.shape
    if tuple(axes) == ("models",):
        if layer.kind == "update":
            own = torch.finfo(getattr(torch, layer.dtype)).bits // 8
            factors = ceil(update_ranks * (outputs + inputs) * (itemsize if itemsize < 2 else own))
            rows = 1 + ranks["models"]
            return factors + 8 * (rows * (num_models + rows) + num_models) + 4 * num_models
        return ceil(layer.num_values * (max(itemsize, 4) + itemsize * ranks["models"]))
    kept_outputs, kept_inputs = ranks.get("outputs", outputs), ranks.get("inputs", inputs)
    core = kept_outputs * kept_inputs
    mean = core if layer.kind == "update" else layer.num_values
    sides = (outputs * kept_outputs if kept_outputs < outputs else 0) + (
        inputs * kept_inputs if kept_inputs < inputs else 0
    )
    return ceil(max(itemsize, 4) * mean + itemsize * (sides + ranks.get("models", 0) * core))


def coefficient_bytes(
    layer: Layer, ranks: Mapping[str, int], axes: Sequence[str], itemsize: int = COEFFICIENT_BYTES
) -> int:
    """Return the bytes of one model's coefficients in a layer; of cut cores those of their factors, where these are fewer."""
    if "models" in axes:
        return itemsize * ranks["models"]
    core = ranks.get("outputs", layer.shape[0]), ranks.get("inputs", layer.shape[1])
    is_cut = CORES in ranks and low_rank.pays(core, ranks[CORES])
    return itemsize * (low_rank.num_numbers(core, ranks[CORES]) if is_cut else core[0] * core[1])


def break_even(fixed: int, per_model: float, zoo_per_model: float) -> int | None:
    """Return the least N with fixed + N · per_model < N · zoo_per_model, or None where there is none.

    >>> break_even(1000, 10, 110)
    11
    """
    saved = zoo_per_model - per_model
    return ceil(fixed / saved + 1e-9) if saved > 0 else None


@dataclass(frozen=True)
class Overhead:
    """Upper bound of the bytes that do not depend on ranks: `shared` of the bundle, and the average of one model."""

    shared: int
    per_model: int


@dataclass(frozen=True)
class Contents:
    """Bytes of carried contents, each counted once: contents of several models, and contents of one model alone."""

    shared: int
    unshared: int


def contents(zoo: Zoo) -> Contents:
    """Read and count the carried contents and the documents of models."""
    uses: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for index in range(len(zoo)):
        of_model = _contents(zoo, index)
        uses.update(of_model.keys())
        sizes.update(of_model)
    unshared = sum(size for content, size in sizes.items() if uses[content] == 1)
    return Contents(sum(sizes.values()) - unshared, unshared)


def overhead(zoo: Zoo, axes: tuple[str, ...], carried: Contents, itemsize: float = 4) -> Overhead:
    """Count headers, the manifest, and carried contents. Quantised bases (`itemsize` below 2) also have scales."""
    num_tensors = MAX_TENSORS[form_of({layer.kind for layer in zoo.layers.values()}, axes)] * (2 if itemsize < 2 else 1)
    layers = header_room(list(zoo.layers), num_tensors) + sum(
        MANIFEST_PER_LAYER + 4 * len(name.encode()) for name in zoo.layers
    )
    names = sum(60 + len(name.encode()) for index in range(len(zoo)) for name in zoo.carried(index))
    texts = sum(6 * len(name.encode("utf-8", "surrogatepass")) for name in zoo.names) + sum(
        len(str(model.metadata)) for model in zoo.models
    )
    texts += sum(4 + len(name.encode()) for model in zoo.models for name in listed_first(model.beside, MAX_LEFT))
    per_model = (
        FILE_OVERHEAD + MANIFEST_PER_MODEL + 4 * len(zoo.layers) + ceil((carried.unshared + names + texts) / len(zoo))
    )
    return Overhead(CARD_AND_REPORT + layers + carried.shared, per_model)


def _contents(zoo: Zoo, index: int) -> dict[str, int]:
    """Return the bytes in rest/ of one model's contents besides its coefficients, by content."""
    model = zoo.models[index]
    documents = [layout_of(model).to_json()]
    documents += [dict(model.config)] if model.config is not None else []
    bytes_of = {hashlib.sha256(text).hexdigest(): len(text) for text in map(canonical_json, documents)}
    for file in model.side_files:
        data = model.read_side_file(file)
        bytes_of[hashlib.sha256(data).hexdigest()] = len(data)
    for name in zoo.carried(index):
        values = zoo.read_carried(index, name)
        bytes_of[tensor_id(values)] = values.nbytes + TENSOR_HEADER
    return {content: size + RECORD_BYTES for content, size in bytes_of.items()}


def count_bytes(
    folder: Path, models: Sequence[ModelRecord], num_layers: int, zoo_layers: int, zoo_whole: int
) -> ByteCount:
    """Count the bytes of a subspace's files and of the zoo. Moments are counted separately.

    `per_model` is the average over models of the bytes that they do not share: their coefficients' files, their records, and the
    contents in rest/ that no other model has. The manifest is counted by its entries of models and layers, since it contains this
    count.
    """
    sizes = file_sizes(folder)
    basis = sum(size for name, size in sizes.items() if name.startswith("basis"))
    coefficients = sum(size for name, size in sizes.items() if name.startswith("coefficients/"))
    uses = Counter(content for model in models for content in set(_content_ids(model)))
    rest = {Path(name).stem: size + RECORD_BYTES for name, size in sizes.items() if name.startswith("rest/")}
    unshared = sum(size for content, size in rest.items() if uses[content] < 2 or len(models) == 1)
    per_model = (coefficients + unshared) // len(models) + MANIFEST_PER_MODEL
    own_names = sum(4 + len(name.encode()) for model in models for name in model.not_carried)
    per_model += own_names // len(models)
    fixed = basis + sum(rest.values()) - unshared + CARD_AND_REPORT + MANIFEST_PER_LAYER * num_layers
    return ByteCount(
        zoo_layers,
        basis + coefficients,
        per_model,
        zoo_whole,
        fixed + per_model * len(models),
        sizes.get(MOMENTS, 0),
        break_even(fixed, per_model, zoo_whole / len(models)),
    )


def saved_bytes(folder: Path, manifest: Manifest) -> int:
    """Return the bytes of a subspace's files after it is saved, without moments: the written ones, its manifest and its card.

    The checksums that `save` adds to the manifest have a known length. Paths of models are counted relative to `folder`.
    """
    sizes = file_sizes(folder)
    files = {name: FileRecord(bytes=size, sha256=ANY_CHECKSUM) for name, size in sizes.items()}
    models = [model.model_copy(update={"source": _with_checksums(model.source)}) for model in manifest.models]
    report = {key: value for key, value in manifest.report.items() if key not in MEASURED}
    written = num_bytes = sum(size for name, size in sizes.items() if name != MOMENTS)
    with TemporaryDirectory() as name:
        staging = Path(name)
        # The manifest contains the number of bytes, which may have one more digit.
        for _ in range(3):
            report["bytes"] = {**report["bytes"], "whole_bundle": num_bytes}
            described = manifest.model_copy(update={"models": models, "report": report, "files": files})
            write_manifest(staging, described)
            write_card(staging, described)
            num_bytes = written + sum(file_sizes(staging).values())
    return num_bytes


def _with_checksums(source: SourceRecord) -> SourceRecord:
    files = {name: file.model_copy(update={"sha256": ANY_CHECKSUM}) for name, file in source.files.items()}
    return source.model_copy(update={"files": files})


def _content_ids(model: ModelRecord) -> list[str]:
    """Return the ids of a model's contents in rest/."""
    config = [] if model.config is None else [model.config]
    return [model.layout, *config, *model.side_files.values(), *model.carried.values()]


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of one layer: of its mean, of each direction, of each pair of directions, and of each coefficient.

    At rank k its basis has fixed + k · per_direction + k² · per_pair bytes: stacked factors have a table of weights.
    """

    fixed: int
    per_direction: int
    per_coefficient: int = COEFFICIENT_BYTES
    per_pair: int = 0

    def basis(self, rank: int) -> int:
        """Bytes of the layer's basis at a rank."""
        return self.fixed + rank * self.per_direction + rank**2 * self.per_pair


@dataclass(frozen=True)
class Sizes:
    """Bytes of a bundle at any rank.

    Attributes:
        whole_zoo: bytes of all models' files.
        num_models: N.
        shared: bytes of the bundle at any rank: headers, manifest, and carried contents that models share.
        per_model: average bytes of one model, without its coefficients.
        layers: each layer's bytes.
    """

    whole_zoo: int
    num_models: int
    shared: int
    per_model: int
    layers: dict[str, LayerSizes]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dict(plain(self))


def sizes(source: Zoo | StoredSubspace) -> Sizes:
    """Count the bytes of bundles with axis `models`, from a zoo's headers or from a bundle; within a few percent of a saved one.

    Raises UsageError for a bundle with other axes.
    """
    return _of_zoo(source) if isinstance(source, Zoo) else _of_bundle(source)


def _layer_sizes(layer: Layer, update_ranks: int, num_models: int, itemsize: ItemSizes) -> LayerSizes:
    fixed, one, two = (
        basis_bytes(layer, {"models": k}, MODELS, itemsize.basis, update_ranks, num_models) for k in range(3)
    )
    per_pair = (two - 2 * one + fixed) // 2 if layer.kind == "update" else 0
    return LayerSizes(fixed, one - fixed - per_pair, itemsize.coefficient, per_pair)


def _of_zoo(zoo: Zoo) -> Sizes:
    fixed = overhead(zoo, MODELS, contents(zoo))
    layers = {}
    for name, layer in zoo.layers.items():
        stack = zoo.stack(name)
        ranks = sum(stack.ranks) if isinstance(stack, UpdateStack) else 0
        layers[name] = _layer_sizes(layer, ranks, len(zoo), ItemSizes(torch.float32.itemsize))
    return Sizes(zoo.num_bytes, len(zoo), fixed.shared, fixed.per_model, layers)


def _of_bundle(space: StoredSubspace) -> Sizes:
    if space.axes != MODELS:
        raise UsageError(
            f"a bundle of axes {', '.join(space.axes)}", rule="sizes by rank are those of axis models alone"
        )
    manifest = space.manifest
    basis_size = value_bytes(manifest.coding) if manifest.coding else getattr(torch, manifest.dtype).itemsize
    itemsize = ItemSizes(basis_size, getattr(torch, manifest.coefficients_dtype).itemsize)
    counted, num_models = space.report["bytes"], len(space.names)
    layers = {}
    layer_bytes = coefficients = 0
    for name, basis in space.layers.items():
        ranks = int(basis.tensors.read(f"{name}/ranks").sum()) if basis.form == STACKED else 0
        layers[name] = _layer_sizes(basis.layer, ranks, num_models, itemsize)
        layer_bytes += layers[name].basis(basis.ranks["models"])
        coefficients += basis.ranks["models"] * itemsize.coefficient
    per_model = counted["per_model"] - coefficients
    shared = counted["whole_bundle"] - num_models * counted["per_model"] - layer_bytes
    return Sizes(counted["whole_zoo"], num_models, max(shared, 0), per_model, layers)
