"""Bytes against loss: bundles in every dtype, and models that are compressed each by itself, on zoos of the nursery.

    python -m bench --only bytes

Every sixth model is held out. Of the others a bundle is fitted in each dtype of bases and coefficients. Held-out models are
projected, rebuilt and measured on their task. Beside it each model is kept by itself: its layers (of an adapter the factors, of a
fine-tune the differences from its parent) rounded in the same ways, or its files compressed by zstd, which loses nothing.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import eigenzoo as ez
from bench.sizes import BytesPlan
from bench.suite import Record, tell
from eigenzoo import nursery
from eigenzoo.cli.demo import HELD_OUT
from eigenzoo.linalg.quantised import CODINGS, SCALES, dequantise, num_blocks, num_codes, quantise
from eigenzoo.nursery.recipe import PARENT, RECIPE

Metric = Callable[[Path], float]

DTYPES = ("float32", "bfloat16", "int8", "nf4")
HALF = "bfloat16"
ZSTD_LEVEL = 19


@dataclass(frozen=True)
class Row:
    """A way to keep models: bytes of one more and of all fitted ones, energy lost of fitted and held-out models, their score."""

    name: str
    per_model: float
    whole: float
    lost: float
    held_out: float
    score: float
    spread: float


def run_bytes(plan: BytesPlan, home: Path, metric: Metric | None = None) -> Record:
    """Measure one zoo, which is trained in `home` unless it is there."""
    path = home / plan.kind
    if not (path / RECIPE).exists():
        tell(f"training {plan.kind}")
        nursery.make(plan.kind, path)
    base = path / PARENT if plan.view == "delta" else None
    zoo = ez.open_zoo(path, view=plan.view, base=base)
    held_names = zoo.names[HELD_OUT - 1 :: HELD_OUT]
    measured = Measured(
        zoo.select(names=[name for name in zoo.names if name not in held_names]),
        zoo.select(names=held_names),
        base,
        metric or nursery.metric(path),
    )
    tell(f"bytes of {plan.kind}")
    rows = [*measured.alone(), *(row for rank in plan.ranks for row in measured.bundles(rank))]
    return {
        "kind": plan.kind,
        "title": plan.title,
        "fitted": len(measured.fitted),
        "held_out": len(measured.held),
        "rows": [vars(row) for row in rows],
    }


@dataclass(frozen=True)
class Measured:
    """Models that are fitted and held out, the parent that fine-tunes are differences from, and the metric."""

    fitted: ez.Zoo
    held: ez.Zoo
    base: Path | None
    metric: Metric

    def bundles(self, rank: Mapping[str, int]) -> Iterator[Row]:
        """Fit in every dtype of bases, and in those of coefficients."""
        for dtype in DTYPES:
            for half in (False, True):
                yield self._bundle(rank, dtype, HALF if half else "float32")

    def _bundle(self, rank: Mapping[str, int], dtype: str, coefficients_dtype: str) -> Row:
        with tempfile.TemporaryDirectory() as name:
            fit = ez.fit(self.fitted, dict(rank), dtype=dtype, coefficients_dtype=coefficients_dtype)
            space = ez.load(fit.save(Path(name) / "bundle"), base=self.base)
            projected = space.project_many(self.held)
            paths = [space.rebuild(model).save(Path(name) / model.name) for model in projected.values()]
            scores = [self.metric(path) for path in paths]
        energy = sum(sum(model.energies.values()) for model in projected.values())
        outside = sum(sum(model.outside.values()) for model in projected.values())
        counted = space.report["bytes"]
        label = ", ".join(f"{axis} {kept}" for axis, kept in rank.items())
        label = f"bundle, {label}: {dtype}" + (
            "" if coefficients_dtype == "float32" else f", coefficients {coefficients_dtype}"
        )
        sizes = counted["per_model"], counted["whole_bundle"]
        return Row(label, *sizes, space.report["residual"], outside / energy, *_average(scores))

    def alone(self) -> Iterator[Row]:
        """Keep each model by itself: as it is, compressed without loss, and rounded."""
        scores = _average([self.metric(model.path) for model in self.held.models])
        files = [file for model in self.fitted.models for file in model.weight_files()]
        whole = sum(file.stat().st_size for file in files)
        num_models = len(self.fitted)
        yield Row("each by itself: files", whole / num_models, whole, 0.0, 0.0, *scores)
        compressed = [_zstd(file.read_bytes()) for file in files]
        if None not in compressed:
            size = sum(size or 0 for size in compressed)
            yield Row(f"each by itself: zstd -{ZSTD_LEVEL}", size / num_models, size, 0.0, 0.0, *scores)
        for dtype in DTYPES[1:]:
            with tempfile.TemporaryDirectory() as name:
                fitted, held = (self._rounded(zoo, dtype, Path(name)) for zoo in (self.fitted, self.held))
                values = _average([self.metric(path) for path in held.paths])
                row = Row(
                    f"each by itself: {dtype}", fitted.size / num_models, fitted.size, fitted.lost, held.lost, *values
                )
            yield row

    def _rounded(self, zoo: ez.Zoo, dtype: str, folder: Path) -> Rounded:
        """Write models whose layers are rounded, and count what they take and lose."""
        parent = {} if self.base is None else _tensors(next(self.base.glob("*.safetensors")))
        names, size, paths = _layer_tensors(zoo), 0, []
        for model in zoo.models:
            source = model.weight_files()[0]
            tensors, kept = _tensors(source), {}
            size += source.stat().st_size
            for name, values in tensors.items():
                known = parent.get(name, torch.zeros(())).to(values) if name in names else None
                kept[name] = values if known is None else (known + rounded(values - known, dtype)).to(values.dtype)
                size -= values.nbytes - stored_size(values, dtype) if known is not None else 0
            target = folder / model.path.name
            target.mkdir()
            for file in model.path.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            with safe_open(source, "pt") as opened:
                save_file(kept, target / source.name, opened.metadata())
            paths.append(target)
        found = ez.open_zoo(paths, view=zoo.view, base=self.base).select(include=tuple(zoo.layers))
        return Rounded(paths, size, lost(zoo, found))


@dataclass(frozen=True)
class Rounded:
    """Models with rounded layers: their paths, bytes, and the share of the layers' energy that rounding took."""

    paths: Sequence[Path]
    size: int
    lost: float


def rounded(values: Tensor, dtype: str) -> Tensor:
    """Values as a dtype holds them."""
    if dtype not in CODINGS:
        return values.to(getattr(torch, dtype)).to(values.dtype)
    return dequantise(*quantise(values.reshape(-1), dtype), dtype, values.numel()).view(values.shape)


def stored_size(values: Tensor, dtype: str) -> int:
    """Bytes of values in a dtype, scales included."""
    count = values.numel()
    if dtype not in CODINGS:
        return count * getattr(torch, dtype).itemsize
    return num_codes(count, dtype) + SCALES.itemsize * num_blocks(count)


def lost(zoo: ez.Zoo, other: ez.Zoo) -> float:
    """Share of the energy of a zoo's layers that lies between its models and others of the same names."""
    distance = energy = 0.0
    for name in zoo.layers:
        first, second = _matrices(zoo, name), _matrices(other, name)
        for model, original in first.items():
            distance += float((second[model] - original).square().sum())
            energy += float(original.square().sum())
    return distance / energy


def _matrices(zoo: ez.Zoo, layer: str) -> dict[str, Tensor]:
    stack: Any = zoo.stack(layer)
    read = (lambda place: torch.mm(*stack.factors(place))) if zoo.view == "update" else stack.matrix
    return {name: read(place).double() for place, name in enumerate(zoo.names)}


def _layer_tensors(zoo: ez.Zoo) -> set[str]:
    """The tensors of a model's file that layers are made of."""
    updates = zoo.models[0].updates
    if not updates:
        return set(zoo.layers)
    return {key for name in zoo.layers for key in (updates[name].key_a, updates[name].key_b)}


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _average(scores: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    spread = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    return statistics.fmean(scores), spread


def _zstd(data: bytes) -> int | None:
    """Bytes after zstd; None where the library is not installed."""
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        return None
    return len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data))
