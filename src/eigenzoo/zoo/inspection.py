"""Inspect: what a zoo holds, before anything is fitted to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenzoo.formats.model import Model
from eigenzoo.formats.remote import source_url
from eigenzoo.records import Layer, LeftOut, Progress, SkippedModel, no_progress, plain
from eigenzoo.weights.roles import role
from eigenzoo.zoo.layers import dtype_name
from eigenzoo.zoo.zoo import Zoo

NUM_LISTENERS = 8
"""How many numbers are kept of an update's answer: two different updates agree in all of them with probability zero."""

SAME_FUNCTION = 1e-5
"""Relative difference of two adapters' answers to random inputs below which they are the same update, factored twice."""


@dataclass(frozen=True)
class ModelReport:
    """One model: format, files' bytes, dtypes, ranks of its updates, and how many values are NaN or Inf."""

    name: str
    path: str
    format: str
    num_bytes: int
    num_values: int
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]
    content: str
    num_non_finite: int
    non_finite_in: tuple[str, ...]
    ignored_files: tuple[str, ...]


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

    @property
    def num_non_finite(self) -> int:
        """Values that are NaN or Inf, over all models."""
        return sum(model.num_non_finite for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dict(plain(self))


def inspect(zoo: Zoo, *, progress: Progress = no_progress) -> Inspection:
    """Read a zoo once and say what it holds; one tensor is held at a time.

    Two adapters are the same in function when scaled updates answer random inputs alike; factors may differ.
    """
    reports, answers = [], []
    for place, (model, name) in enumerate(zip(zoo.models, zoo.names, strict=True)):
        reports.append(_model_report(model, name))
        answers.append(_answers(model))
        progress("reading models", place + 1, len(zoo))
    return Inspection(
        len(zoo),
        len(zoo.layers),
        zoo.view,
        tuple(reports),
        _roles(zoo),
        zoo.left_out,
        zoo.skipped,
        zoo.warnings,
        _groups((report.content, report.name) for report in reports),
        _same_function(zoo.names, answers),
        zoo.layer_bytes,
        zoo.num_bytes,
    )


def _model_report(model: Model, name: str) -> ModelReport:
    content, num_bad, bad = hashlib.sha256(), 0, []
    for key in sorted(model.tensors):
        info = model.tensors[key]
        values = model.read(key)
        content.update(f"{key} {info.dtype} {info.shape} ".encode())
        content.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if values.is_floating_point() and info.dtype.itemsize > 1:
            count = int((~torch.isfinite(values)).sum())
            num_bad += count
            bad += [key] if count else []
    infos = model.tensors.values()
    return ModelReport(
        name,
        source_url(model.path) or str(model.path),
        model.format,
        model.nbytes,
        sum(torch.Size(info.shape).numel() for info in infos),
        tuple(sorted({dtype_name(info.dtype) for info in infos})),
        tuple(sorted({update.rank for update in model.updates.values()})),
        content.hexdigest(),
        num_bad,
        tuple(bad),
        model.ignored_files,
    )


def _roles(zoo: Zoo) -> tuple[RoleReport, ...]:
    groups: dict[tuple[str, tuple[int, int], str, str], list[Layer]] = {}
    for name, layer in zoo.layers.items():
        groups.setdefault((role(name), layer.shape, layer.unfolding, layer.dtype), []).append(layer)
    rows = []
    for (called, shape, unfolding, dtype), layers in groups.items():
        ranks = {
            model.updates[layer.name].rank for layer in layers for model in zoo.models if layer.name in model.updates
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


def _answers(model: Model) -> dict[str, Tensor]:
    """Each update's yᵀ(s·B·A)x for a fixed random x and eight y per module; nothing for a model of full weights."""
    answers = {}
    for module, update in model.updates.items():
        seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "little")
        draw = torch.Generator().manual_seed(seed)
        probe = torch.randn(update.shape[1], generator=draw, dtype=torch.float64)
        listeners = torch.randn(NUM_LISTENERS, update.shape[0], generator=draw, dtype=torch.float64)
        b_OR, a_RI = model.read_factors(module)
        answers[module] = update.scale * (listeners @ (b_OR.double() @ (a_RI.double() @ probe)))
    return answers


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


def _groups(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    found: dict[str, list[str]] = {}
    for content, name in pairs:
        found.setdefault(content, []).append(name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)
