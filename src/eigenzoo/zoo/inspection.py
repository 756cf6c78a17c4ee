"""Inspect the contents of a zoo before a fit."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from eigenzoo.display import counted, html_table, in_bytes
from eigenzoo.formats.lora.zero_updates import unfilled, zero_modules
from eigenzoo.formats.model import Model
from eigenzoo.formats.remote import source_url
from eigenzoo.formats.written_by import written_by
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import local_workers
from eigenzoo.records import Layer, LeftOut, Progress, SkippedModel, no_progress, plain
from eigenzoo.weights.roles import role
from eigenzoo.zoo.answers import MOST_PROBED, make_probe, probed_updates, same_function
from eigenzoo.zoo.contents import Contents, ContentsReader
from eigenzoo.zoo.layers import dtype_name
from eigenzoo.zoo.left_files import LeftFile, left_files
from eigenzoo.zoo.runs import run_paths, training_runs
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zero_models import say_zero
from eigenzoo.zoo.zoo import Zoo, open_zoo


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
        parts = [f"{count} {name if count == 1 else plural[name]}" for name, count in remarks.items() if count]
        if self.num_non_finite:
            parts.insert(0, f"{self.num_non_finite:,} values are NaN or Inf")
        return f"Inspection({size}, {in_bytes(self.whole_bytes)}): {', '.join(parts) or 'nothing to report'}"

    def _repr_html_(self) -> str:
        rows = [
            (each.role, f"{each.shape[0]} × {each.shape[1]}", each.dtype, each.num_layers, in_bytes(each.num_bytes))
            for each in self.roles
        ]
        return html_table(repr(self), ("role", "shape", "dtype", "layers", "bytes in one model"), rows)


@own_settings()
def inspect(zoo: Zoo | Source, *, progress: Progress = no_progress) -> Inspection:
    """Read a zoo once and list its models, layers, duplicates, NaN and Inf. Each worker has 16 MiB of weights in memory at a time.

    `zoo` is an opened zoo, or anything that `open_zoo` accepts.

    Models whose tensors have equal shapes and sums are read a second time to compare their SHA-256. Two adapters have the same
    function if their scaled updates give equal outputs for random inputs; their factors can differ. Adapters with larger
    updates than `MOST_PROBED` are not compared like that, which a warning says.
    """
    zoo = zoo if isinstance(zoo, Zoo) else open_zoo(zoo)
    models = dict(zip(zoo.names, map(unfilled, zoo.models), strict=True))
    with local_workers() as workers:
        reader = ContentsReader(make_probe(zoo.models), workers.resources.block_bytes)
        read = dict(workers.each("reading models", lambda name: reader.read(models[name]), zoo.names, progress))
        alike = [
            name for group in _groups((contents.digest, name) for name, contents in read.items()) for name in group
        ]
        hashed = dict(workers.each("comparing models", lambda name: reader.hash(models[name]), alike, progress))
    return Inspection(
        len(zoo),
        len(zoo.layers),
        zoo.view,
        tuple(
            _report(models[name], name, read[name], len(zero_modules(model)))
            for name, model in zip(zoo.names, zoo.models, strict=True)
        ),
        _roles(zoo),
        zoo.left_out,
        zoo.skipped,
        (
            *zoo.warnings,
            *say_zero([name for name, contents in read.items() if contents.answers.are_zero], zoo.view),
            *(
                f"{name}: not compared by function: more than {MOST_PROBED:,} inputs or outputs of a layer, or ranks of all"
                for name, model in models.items()
                if model.updates and not probed_updates(model)
            ),
        ),
        _groups((content, name) for name, content in hashed.items()),
        tuple(
            tuple(zoo.names[number] for number in group)
            for group in same_function([contents.answers for contents in read.values()])
        ),
        zoo.layer_bytes,
        zoo.num_bytes,
        left_files(zoo.models),
        training_runs(run_paths(zoo.models, zoo.names)),
        zoo.hidden,
    )


def _report(model: Model, name: str, contents: Contents, num_zeros: int) -> ModelReport:
    infos = model.tensors.values()
    return ModelReport(
        name,
        source_url(model.path) or str(model.path),
        model.format,
        model.nbytes,
        sum(prod(info.shape) for info in infos),
        tuple(sorted({dtype_name(info.dtype) for info in infos})),
        tuple(sorted({update.rank for update in model.updates.values()})),
        sum(contents.non_finite.values()),
        tuple(sorted(contents.non_finite)),
        model.ignored_files,
        written_by(model),
        num_zeros,
    )


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


def _groups(pairs: Iterable[tuple[Hashable, str]]) -> tuple[tuple[str, ...], ...]:
    groups: dict[Hashable, list[str]] = {}
    for content, name in pairs:
        groups.setdefault(content, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
