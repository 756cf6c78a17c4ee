"""Bytes: what a basis of given ranks costs, and what a fitted subspace costs beside its zoo.

Legend: N models, O outputs, I inputs, P kept outputs, Q kept inputs, K kept directions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from eigenzoo.formats.bundle.folder import MOMENTS, file_sizes, write_manifest
from eigenzoo.formats.bundle.manifest import FileRecord, Manifest, ModelRecord, SourceRecord
from eigenzoo.records import ByteCount, Layer
from eigenzoo.subspace.bundles.card import write_card
from eigenzoo.subspace.bundles.saving import MEASURED

COEFFICIENT_BYTES = 4
FILE_OVERHEAD = 280
"""Header of one model's file in a bundle, measured, its name apart."""

MANIFEST_PER_LAYER = 700
"""What a layer takes in the manifest, at most: its record, its fit, and what it has discarded; its name apart."""

CARD_AND_REPORT = 2300
"""What a card and a report take besides, measured."""

MANIFEST_PER_MODEL = 580
"""What a model takes in the manifest, measured: its record, its source, and the checksums of its files."""


TENSOR_HEADER = 110
"""What a tensor's own file in rest/ has besides its values."""

RECORD_BYTES = 140
"""What a file of rest/ takes in the manifest's list of files: name, bytes and checksum."""


ANY_CHECKSUM = "0" * 64
"""What stands for a checksum where only its length counts."""


def basis_bytes(
    layer: Layer,
    ranks: Mapping[str, int],
    axes: Sequence[str],
    itemsize: int,
    update_ranks: int = 0,
    num_models: int = 0,
) -> int:
    """Bytes of a layer's center and bases; for form `stacked`, of ΣR = `update_ranks` factors and the table of weights."""
    outputs, inputs = layer.shape
    if tuple(axes) == ("models",):
        if layer.kind == "update":
            factors = update_ranks * (outputs + inputs) * torch.finfo(getattr(torch, layer.dtype)).bits // 8
            rows = 1 + ranks["models"]
            return factors + 8 * (rows * (num_models + rows) + num_models) + 4 * num_models
        return layer.num_values * (max(itemsize, 4) + itemsize * ranks["models"])
    kept_outputs, kept_inputs = ranks.get("outputs", outputs), ranks.get("inputs", inputs)
    core = kept_outputs * kept_inputs
    mean = core if layer.kind == "update" else layer.num_values
    sides = (outputs * kept_outputs if kept_outputs < outputs else 0) + (
        inputs * kept_inputs if kept_inputs < inputs else 0
    )
    return max(itemsize, 4) * mean + itemsize * (sides + ranks.get("models", 0) * core)


def coefficient_bytes(layer: Layer, ranks: Mapping[str, int], axes: Sequence[str]) -> int:
    """Bytes of one model's coefficients of a layer."""
    if "models" in axes:
        return COEFFICIENT_BYTES * ranks["models"]
    return COEFFICIENT_BYTES * ranks.get("outputs", layer.shape[0]) * ranks.get("inputs", layer.shape[1])


def break_even(fixed: int, per_model: float, zoo_per_model: float) -> int | None:
    """Return the least N with fixed + N · per_model < N · zoo_per_model, or None where there is none.

    >>> break_even(1000, 10, 110)
    11
    """
    saved = zoo_per_model - per_model
    return ceil(fixed / saved + 1e-9) if saved > 0 else None


def count_bytes(
    folder: Path, models: Sequence[ModelRecord], num_layers: int, zoo_layers: int, zoo_whole: int
) -> ByteCount:
    """Count a subspace's files beside the zoo they came from: everything but the moments, which are counted apart.

    `per_model` is the average of what models bring and do not share: their coefficients' files, their records, and the
    contents in rest/ that no other model has. The manifest is counted by what models and layers take in it, since it
    holds this count itself.
    """
    sizes = file_sizes(folder)
    basis = sum(size for name, size in sizes.items() if name.startswith("basis"))
    coefficients = sum(size for name, size in sizes.items() if name.startswith("coefficients/"))
    uses = Counter(content for model in models for content in set(_contents(model)))
    rest = {Path(name).stem: size + RECORD_BYTES for name, size in sizes.items() if name.startswith("rest/")}
    own = sum(size for content, size in rest.items() if uses[content] < 2 or len(models) == 1)
    per_model = (coefficients + own) // len(models) + MANIFEST_PER_MODEL
    own_names = sum(4 + len(name.encode()) for model in models for name in model.not_carried)
    per_model += own_names // len(models)
    fixed = basis + sum(rest.values()) - own + CARD_AND_REPORT + MANIFEST_PER_LAYER * num_layers
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
    """Bytes that a subspace's files take once it is saved, moments apart: those that are written, its manifest and its card.

    What `save` adds to the manifest, checksums, has a known length; paths of models are counted as they are from `folder`.
    """
    sizes = file_sizes(folder)
    files = {name: FileRecord(bytes=size, sha256=ANY_CHECKSUM) for name, size in sizes.items()}
    models = [model.model_copy(update={"source": _with_checksums(model.source)}) for model in manifest.models]
    report = {key: value for key, value in manifest.report.items() if key not in MEASURED}
    written = whole = sum(size for name, size in sizes.items() if name != MOMENTS)
    with TemporaryDirectory() as name:
        place = Path(name)
        # The number of bytes is written too, and may take one more.
        for _ in range(3):
            report["bytes"] = {**report["bytes"], "whole_bundle": whole}
            described = manifest.model_copy(update={"models": models, "report": report, "files": files})
            write_manifest(place, described)
            write_card(place, described)
            whole = written + sum(file_sizes(place).values())
    return whole


def _with_checksums(source: SourceRecord) -> SourceRecord:
    files = {name: file.model_copy(update={"sha256": ANY_CHECKSUM}) for name, file in source.files.items()}
    return source.model_copy(update={"files": files})


def _contents(model: ModelRecord) -> list[str]:
    """Ids of everything in rest/ that a model needs."""
    config = [] if model.config is None else [model.config]
    return [model.layout, *config, *model.side_files.values(), *model.carried.values()]
