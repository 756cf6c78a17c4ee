"""Bytes: what a basis of given ranks costs, and what a fitted subspace costs beside its zoo.

Legend: N models, O outputs, I inputs, P kept outputs, Q kept inputs, K kept directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

import torch

from eigenzoo.formats.bundle import MOMENTS
from eigenzoo.records import ByteCount, Layer

COEFFICIENT_BYTES = 4
FILE_OVERHEAD = 280
"""Header of one model's file in a bundle, measured, its name apart."""

MANIFEST_PER_LAYER = 700
"""What a layer takes in the manifest, at most: its record, its fit, and what it has discarded; its name apart."""

CARD_AND_REPORT = 2300
"""What a card and a report take besides, measured."""

MANIFEST_PER_MODEL = 580
"""What a model takes in the manifest, measured: its record, its source, and the checksums of its files."""


RECORD_BYTES = 140
"""What a file of rest/ takes in the manifest's list of files: name, bytes and checksum."""


def basis_bytes(
    layer: Layer, ranks: Mapping[str, int], axes: Sequence[str], itemsize: int, update_ranks: int = 0
) -> int:
    """Bytes of a layer's center and bases; `update_ranks` is ΣR, the ranks of all models' updates, for form `stacked`."""
    outputs, inputs = layer.shape
    if tuple(axes) == ("models",):
        if layer.kind == "update":
            return update_ranks * (outputs + inputs) * torch.finfo(getattr(torch, layer.dtype)).bits // 8
        return itemsize * layer.num_values * (1 + ranks["models"])
    kept_outputs, kept_inputs = ranks.get("outputs", outputs), ranks.get("inputs", inputs)
    core = kept_outputs * kept_inputs
    mean = core if layer.kind == "update" else layer.num_values
    sides = (outputs * kept_outputs if kept_outputs < outputs else 0) + (
        inputs * kept_inputs if kept_inputs < inputs else 0
    )
    return itemsize * (mean + sides + ranks.get("models", 0) * core)


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


def count_bytes(folder: Path, zoo_layers: int, zoo_whole: int, num_models: int) -> ByteCount:
    """Count a subspace's files beside the zoo they came from: everything but the card; the moments apart.

    `per_model` is the average of what models brought: their coefficients' files and the contents in rest/. The manifest is
    counted by what a model and a layer take in it, since it holds this count itself.
    """
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    basis = sum(size for name, size in sizes.items() if name.startswith("basis"))
    coefficients = sum(size for name, size in sizes.items() if name.startswith("coefficients/"))
    rest = sum(size for name, size in sizes.items() if name.startswith("rest/"))
    per_model = (coefficients + rest) // num_models + MANIFEST_PER_MODEL
    whole = basis + per_model * num_models
    return ByteCount(
        zoo_layers,
        basis + coefficients,
        per_model,
        zoo_whole,
        whole,
        sizes.get(MOMENTS, 0),
        break_even(basis, per_model, zoo_whole / num_models),
    )
