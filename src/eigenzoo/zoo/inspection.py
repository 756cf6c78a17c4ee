"""Inspect: what a zoo holds, before anything is fitted to it."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eigenzoo.display import counted, html_table, in_bytes
from eigenzoo.formats.lora.zero_updates import unfilled, zero_modules
from eigenzoo.formats.model import LoraUpdate, Model
from eigenzoo.formats.remote import source_url
from eigenzoo.formats.safetensors.tensor_bytes import as_bytes
from eigenzoo.formats.written_by import written_by
from eigenzoo.passes.buffers import borrow
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import local_workers
from eigenzoo.records import Layer, LeftOut, Progress, SkippedModel, no_progress, plain
from eigenzoo.weights.roles import role
from eigenzoo.zoo.layers import dtype_name
from eigenzoo.zoo.left_files import LeftFile, left_files
from eigenzoo.zoo.runs import places_of, training_runs
from eigenzoo.zoo.zero_models import say_zero
from eigenzoo.zoo.zoo import Zoo

NUM_LISTENERS = 8
"""How many numbers are kept of an update's answer: two different updates agree in all of them with probability zero."""

SAME_FUNCTION = 1e-5
"""Relative difference of two adapters' answers to random inputs below which they are the same update, factored twice."""


@dataclass(frozen=True)
class ModelReport:
    """One model: format, files' bytes, dtypes, ranks of its updates, how many values are NaN or Inf, and the tool
    that wrote it, where its files say.

    `num_zeros` modules are not in its files and count as updates of zero (`missing='zero'`).
    """

    name: str
    path: str
    format: str
    num_bytes: int
    num_values: int
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]
    num_non_finite: int
    non_finite_in: tuple[str, ...]
    ignored_files: tuple[str, ...]
    written_by: str
    num_zeros: int


@dataclass(frozen=True)
class RoleReport:
    """Layers of one role and shape: how many, their dtype, values and bytes in one model, and ranks over all models."""

    role: str
    shape: tuple[int, int]
    unfolding: str
    dtype: str
    num_layers: int
    num_values: int
    num_bytes: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """What a zoo holds.

    Attributes:
        duplicates: groups of models with the same tensors, by the hash of names, dtypes, shapes and values.
        same_function: groups of adapters whose updates agree although their factors differ.
        analysed_bytes, whole_bytes: of the layers, and of all weight files.
        runs: groups of models that are checkpoints of one training run.
        not_read: paths of models that were passed over, since their names begin with `.` or `_`.
        not_carried: what lies beside the weights and rebuilt models lack.
    """

    num_models: int
    num_layers: int
    view: str
    models: tuple[ModelReport, ...]
    roles: tuple[RoleReport, ...]
    left_out: tuple[LeftOut, ...]
    skipped: tuple[SkippedModel, ...]
    warnings: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]
    same_function: tuple[tuple[str, ...], ...]
    analysed_bytes: int
    whole_bytes: int
    not_carried: tuple[LeftFile, ...]
    runs: tuple[tuple[str, ...], ...]
    not_read: tuple[str, ...]

    @property
    def num_non_finite(self) -> int:
        """Values that are NaN or Inf, over all models."""
        return sum(model.num_non_finite for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dict(plain(self))

    def __repr__(self) -> str:
        size = f"{counted(self.num_models, 'model')}, {counted(self.num_layers, 'layer')}, view={self.view!r}"
        remarks = {
            "group of copies": len(self.duplicates),
            "group of equal function": len(self.same_function),
            "model skipped": len(self.skipped),
            "warning": len(self.warnings),
        }
        plural = {name: name.replace(" ", "s ", 1) if " " in name else f"{name}s" for name in remarks}
        said = [f"{count} {name if count == 1 else plural[name]}" for name, count in remarks.items() if count]
        if self.num_non_finite:
            said.insert(0, f"{self.num_non_finite:,} values are NaN or Inf")
        return f"Inspection({size}, {in_bytes(self.whole_bytes)}): {', '.join(said) or 'nothing to report'}"

    def _repr_html_(self) -> str:
        rows = [
            (each.role, f"{each.shape[0]} × {each.shape[1]}", each.dtype, each.num_layers, in_bytes(each.num_bytes))
            for each in self.roles
        ]
        return html_table(repr(self), ("role", "shape", "dtype", "layers", "bytes in one model"), rows)


@dataclass(frozen=True)
class _Read:
    """What one read of a model gives.

    Attributes:
        report: what is said of it.
        digest: names, dtypes, shapes and a sum of the bytes of every tensor: models of other digests differ.
        answers: each update's yᵀ(s·B·A)x; nothing for a model of full weights.
    """

    report: ModelReport
    digest: tuple[tuple[object, ...], ...]
    answers: dict[str, Tensor]


@own_settings()
def inspect(zoo: Zoo, *, progress: Progress = no_progress) -> Inspection:
    """Read a zoo once and list its models, layers, duplicates, NaN and Inf. Each worker has one tensor in memory at a time.

    Models whose tensors have equal shapes and sums are read a second time to compare their SHA-256. Two adapters have the same
    function if their scaled updates give equal outputs for random inputs; their factors can differ.
    """
    probe = _probe(zoo)
    zeros = {name: len(zero_modules(model)) for name, model in zip(zoo.names, zoo.models, strict=True)}
    with local_workers() as workers:
        models = dict(zip(zoo.names, map(unfilled, zoo.models), strict=True))
        read = dict(
            workers.each(
                "reading models", lambda name: _read(models[name], name, probe, zeros[name]), zoo.names, progress
            )
        )
        alike = [name for group in _groups((found.digest, name) for name, found in read.items()) for name in group]
        hashed = dict(workers.each("comparing models", lambda name: _content(models[name]), alike, progress))
    return Inspection(
        len(zoo),
        len(zoo.layers),
        zoo.view,
        tuple(found.report for found in read.values()),
        _roles(zoo),
        zoo.left_out,
        zoo.skipped,
        (*zoo.warnings, *say_zero([name for name, found in read.items() if _answers_nothing(found)], zoo.view)),
        _groups((content, name) for name, content in hashed.items()),
        _same_function(zoo.names, [found.answers for found in read.values()]),
        zoo.layer_bytes,
        zoo.num_bytes,
        left_files(zoo.models),
        training_runs(places_of(zoo.models, zoo.names)),
        zoo.hidden,
    )


def _answers_nothing(found: _Read) -> bool:
    """Tell whether an adapter's updates are all zero; of full weights there are no answers."""
    return bool(found.answers) and not any(bool(answer.any()) for answer in found.answers.values())


def _probe(zoo: Zoo) -> tuple[Tensor, Tensor]:
    """A random input x as long as any update's (I,), and random listeners y (listeners, O): the same for all models."""
    shapes = [update.shape for model in zoo.models for update in model.updates.values()]
    draw = torch.Generator().manual_seed(0)
    outputs, inputs = (max((shape[side] for shape in shapes), default=0) for side in (0, 1))
    return (
        torch.randn(inputs, generator=draw, dtype=torch.float32),
        torch.randn(NUM_LISTENERS, outputs, generator=draw, dtype=torch.float32),
    )


def _read(model: Model, name: str, probe: tuple[Tensor, Tensor], num_zeros: int) -> _Read:
    """Read every tensor of one model once, into memory that is used again."""
    sides = {update.key_a: update for update in model.updates.values()}
    sides |= {update.key_b: update for update in model.updates.values()}
    digest, halves, num_bad, bad = [], {}, 0, []
    for key, info in sorted(model.tensors.items()):
        with borrow(1, prod(info.shape), info.dtype) as rows:
            values = model.read_flat(key, 0, rows.shape[1], rows[0])
            digest.append((key, info.dtype, info.shape, _sum_of_bytes(values)))
            count = _num_non_finite(values) if values.is_floating_point() or values.is_complex() else 0
            if count:
                num_bad += count
                bad.append(key)
            if key in sides:
                halves[key] = _half_answer(sides[key], key, values, probe)
    answers = {
        module: update.scale * (halves[update.key_b] @ halves[update.key_a]) for module, update in model.updates.items()
    }
    infos = model.tensors.values()
    report = ModelReport(
        name,
        source_url(model.path) or str(model.path),
        model.format,
        model.nbytes,
        sum(prod(info.shape) for info in infos),
        tuple(sorted({dtype_name(info.dtype) for info in infos})),
        tuple(sorted({update.rank for update in model.updates.values()})),
        num_bad,
        tuple(bad),
        model.ignored_files,
        written_by(model),
        num_zeros,
    )
    return _Read(report, tuple(digest), answers)


def _sum_of_bytes(values: Tensor) -> int:
    """Sum a tensor's bytes as whole numbers of 64 bits, and what is left of them one by one: as fast as memory is read."""
    raw = values.view(torch.uint8).numpy()
    whole = len(raw) - len(raw) % 8
    # Its overflow wraps around, which is as good a sum as any.
    return int(np.add.reduce(raw[:whole].view(np.int64))) + int(raw[whole:].sum(dtype=np.int64))


def _num_non_finite(values: Tensor) -> int:
    """Count NaN and Inf. A finite sum has neither among its terms, and most tensors are done with that."""
    if values.is_complex():
        values = torch.view_as_real(values)
    elif values.dtype.itemsize == 1:  # eight-bit floats have no sums of their own
        values = values.to(torch.float32)
    total = values.sum(dtype=torch.float32 if values.dtype.itemsize < 4 else None)
    return 0 if isfinite(total.item()) else int((~torch.isfinite(values)).sum())


def _half_answer(update: LoraUpdate, key: str, values: Tensor, probe: tuple[Tensor, Tensor]) -> Tensor:
    """Return A·x (R,) or Yᵀ·B (listeners, R) in float64, whichever factor the tensor is.

    Products are float32 where the factors are: their own rounding, which is as large, is far below `SAME_FUNCTION`.
    """
    (outputs, inputs), dtype = update.shape, torch.promote_types(values.dtype, torch.float32)
    input_I, listeners_LO = (part.to(dtype) for part in probe)
    if key == update.key_a:
        return (values.view(update.rank, inputs).to(dtype) @ input_I[:inputs]).double()
    return (listeners_LO[:, :outputs] @ values.view(outputs, update.rank).to(dtype)).double()


def _content(model: Model) -> str:
    """Hash a model's names, dtypes, shapes and values."""
    content = hashlib.sha256()
    for key, info in sorted(model.tensors.items()):
        content.update(f"{key} {info.dtype} {info.shape} ".encode())
        with borrow(1, prod(info.shape), info.dtype) as rows:
            content.update(as_bytes(model.read_flat(key, 0, rows.shape[1], rows[0])))
    return content.hexdigest()


def _roles(zoo: Zoo) -> tuple[RoleReport, ...]:
    groups: dict[tuple[str, tuple[int, int], str, str], list[Layer]] = {}
    for name, layer in zoo.layers.items():
        groups.setdefault((role(name), layer.shape, layer.unfolding, layer.dtype), []).append(layer)
    rows = []
    for (called, shape, unfolding, dtype), layers in groups.items():
        ranks = {
            model.updates[layer.name].rank
            for layer in layers
            for model in map(unfilled, zoo.models)
            if layer.name in model.updates
        }
        rows.append(
            RoleReport(
                called,
                shape,
                unfolding,
                dtype,
                len(layers),
                sum(layer.num_values for layer in layers),
                sum(layer.num_bytes for layer in layers),
                tuple(sorted(ranks)),
            )
        )
    return tuple(rows)


def _same_function(names: tuple[str, ...], answers: list[dict[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Group models whose answers agree with those of a group's first model."""
    groups: list[list[int]] = []
    for place, answer in enumerate(answers):
        home = next((group for group in groups if answer and _agree(answers[group[0]], answer)), None)
        if home is None:
            groups.append([place])
        else:
            home.append(place)
    return tuple(tuple(names[place] for place in group) for group in groups if len(group) > 1)


def _agree(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        float((first[module] - second[module]).norm()) <= SAME_FUNCTION * float(first[module].norm())
        for module in first
    )


def _groups(pairs: Iterable[tuple[Hashable, str]]) -> tuple[tuple[str, ...], ...]:
    found: dict[Hashable, list[str]] = {}
    for content, name in pairs:
        found.setdefault(content, []).append(name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)
