"""Decide which weights of a zoo are layers, and what happens to the others.

A layer is a floating-point tensor (or LoRA update) with the same shape in every model. A difference is an error that names the
model. The exceptions are task heads of other shapes, excluded tensors, and differences that `allow_missing` accepts. These are
left out with a reason, and carried unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from eigenzoo.errors import FormatError, MismatchError, ZooError
from eigenzoo.formats.layout import ADAPTERS, FORMATS
from eigenzoo.formats.lora.zero_updates import ZooModule, fill_adapter, modules_of, unfilled, zero_modules
from eigenzoo.formats.model import MAX_NAME, Model
from eigenzoo.formats.written_by import written_by
from eigenzoo.records import Layer, LeftOut
from eigenzoo.weights.roles import glob_of, is_task_head, role
from eigenzoo.weights.splits import SplitRule
from eigenzoo.zoo.layers import LayerSource, dtype_name, layer_sources, widest
from eigenzoo.zoo.prefixes import layers_error, prefix_error

MAX_MODULES = 100_000
"""Modules that adapters may have together where each gets an update of zero for those that it lacks: each costs memory."""

MAX_ZEROS = 400_000
"""Updates of zero in a zoo: each costs a kilobyte of memory, more than its adapter's file may have."""

EXCLUDED = "excluded"
"""The reason of what include and exclude leave out."""


@dataclass(frozen=True)
class Selection:
    """What a user asked to see of a zoo: the view, layer globs (matched on names and on roles), leniency, and fused weights
    that are cut into layers of their own.

    With `missing` = `zero`, `modules` are those that count as updates of zero in adapters that lack them: they stay the same in
    a part of the zoo, in another process and in a bundle. `parts` are layers that some models of the whole zoo have apart and
    others fused.
    """

    view: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_missing: bool = False
    only: frozenset[str] | None = None
    split: tuple[SplitRule, ...] = ()
    missing: str = "error"
    modules: tuple[ZooModule, ...] = ()
    parts: frozenset[str] = frozenset()

    def excludes(self, layer: str) -> bool:
        """Tell whether the globs leave a layer out; `only` names layers to the letter."""
        if self.only is not None:
            return layer not in self.only
        names = (layer, role(layer))
        if self.include and not any(fnmatchcase(name, glob) for name in names for glob in self.include):
            return True
        return any(fnmatchcase(name, glob) for name in names for glob in self.exclude)


def fill_models(
    models: Sequence[Model], names: Sequence[str], selection: Selection
) -> tuple[tuple[Model, ...], Selection]:
    """Return adapters with updates of zero for the modules that they lack, and the selection with all modules of the zoo."""
    if selection.missing != "zero":
        return tuple(models), selection
    by_name = {(module.family, module.update.module): module for module in selection.modules}
    for model in models:
        for module in modules_of(model.format, unfilled(model).updates.values()):
            by_name.setdefault((module.family, module.update.module), module)
    if len(by_name) > MAX_MODULES:
        raise ZooError(
            f"all adapters together have {len(by_name):,} different modules",
            rule=f"at most {MAX_MODULES:,} are allowed where missing ones count as zero",
            next_step="open only adapters of one base",
        )
    modules = tuple(module for module in by_name.values() if not selection.excludes(module.update.module))
    filled: list[Model] = []
    num_zeros = 0
    for model, name in zip(models, names, strict=True):
        filled.append(fill_adapter(model, modules, name))
        num_zeros += len(zero_modules(filled[-1]))
        if num_zeros > MAX_ZEROS:
            raise ZooError(
                f"the adapters lack more than {MAX_ZEROS:,} modules",
                where=name,
                rule="at most so many are counted as zero in one zoo",
                next_step="--exclude the modules that few adapters have, or open only adapters that train the same modules",
            )
    return tuple(filled), replace(selection, modules=modules)


@dataclass(frozen=True)
class Match:
    """The layers of a zoo, where each model keeps them, and what is left out."""

    layers: dict[str, Layer]
    sources: tuple[dict[str, LayerSource], ...]
    left_out: tuple[LeftOut, ...]
    excluded: tuple[str, ...] = ()


def match_models(models: Sequence[Model], names: Sequence[str], selection: Selection, base: Model | None) -> Match:
    """Match models layer by layer; raises MismatchError for the first layer that differs and may not."""
    _refuse_mixed_kinds(models, names)
    _refuse_mixed_adapters(models, names)
    every_source = _SourcesOfAll(models, selection.view)
    base_sources = layer_sources(base, "weight") if base is not None and selection.view == "delta" else None
    every = every_source.count_names()
    layers: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    problems: list[MismatchError] = []
    for layer_name, count in every.items():
        if selection.excludes(layer_name):
            reasons[layer_name] = EXCLUDED
            continue
        _check_name(layer_name)
        problem = every_source.difference(layer_name, count, names, base_sources)
        if problem is None:
            layers[layer_name] = every_source.merged(layer_name)
        elif selection.allow_missing or (is_task_head(layer_name) and count == len(models)):
            reasons[layer_name] = problem.what
        else:
            problems.append(problem)
    # Layers that some models lack can be left out, unless nothing is left then.
    counts = [count for name, count in every.items() if reasons.get(name) != EXCLUDED]
    apart = bool(counts) and not layers and max(counts) < len(models)
    if problems:
        problems[0] = _with_tools(problems[0], models, names)
    if problems or not layers:
        named = prefix_error(models, names)
        if named is None and base is not None:
            named = prefix_error([models[0], base], [names[0], "the base"])
        if named is not None:
            raise named
    if problems:
        raise _all_in_one(problems, _in_common(selection.view) if apart else None)
    if not layers and selection.only:
        raise layers_error(every, selection.only, names[0]) or MismatchError(
            "has none of the bundle's layers",
            where=names[0],
            rule=f"the bundle has {len(selection.only):,}, such as '{min(selection.only)}'",
            next_step="name a model of the bundle's architecture, in the format of its zoo",
        )
    if not layers:
        raise ZooError(
            "no layer is left to analyse",
            rule="a layer is a floating-point tensor with the same shape in all models",
            next_step=_in_common(selection.view) if apart else "widen --include or narrow --exclude",
        )
    left_out = [LeftOut(name, reason, every[name]) for name, reason in reasons.items()]
    return Match(
        layers,
        every_source.sources_of(layers),
        tuple(left_out + every_source.unread()),
        tuple(name for name, reason in reasons.items() if reason == EXCLUDED),
    )


def _with_tools(problem: MismatchError, models: Sequence[Model], names: Sequence[str]) -> MismatchError:
    """Name the tools that wrote the differing models, if their files name several."""
    tools: dict[str, str] = {}
    for model, name in zip(models, names, strict=True):
        if tool := written_by(model).partition(" ")[0]:
            tools.setdefault(tool, name)
    if len(tools) < 2:
        return problem
    tools_of_models = ", ".join(f"{name} was written by {tool}" for tool, name in list(tools.items())[:3])
    what = f"{problem.what} ({tools_of_models})"
    return MismatchError(what, where=problem.where, rule=problem.rule, next_step=problem.next_step)


def _check_name(layer: str) -> None:
    """Refuse a name that no bundle can hold, before any weight is read."""
    if len(layer) > MAX_NAME:
        raise FormatError(
            f"a layer name of {len(layer):,} characters",
            where=f"layer '{layer[:60]}…'",
            rule=f"layer names have at most {MAX_NAME:,}",
            next_step=f"leave the layer out: --exclude '{glob_of(layer[:20])}*'",
        )


def _refuse_mixed_kinds(models: Sequence[Model], names: Sequence[str]) -> None:
    """Refuse adapters beside full weights, and name the few that are of the other kind."""
    adapters = [name for model, name in zip(models, names, strict=True) if model.format in ADAPTERS]
    # Old models that a bundle recalls have their own format.
    whole = {*FORMATS, "pickle"} - set(ADAPTERS)
    weights = [name for model, name in zip(models, names, strict=True) if model.format in whole]
    if not adapters or not weights:
        return
    few, what, others = (
        (weights, "not a LoRA adapter", "LoRA adapters")
        if len(weights) <= len(adapters)
        else (adapters, "a LoRA adapter", "not")
    )
    shown = ", ".join(few[:3]) + (f" and {len(few) - 3} more" if len(few) > 3 else "")
    raise MismatchError(
        f"{few[0]} is {what}, but {len(models) - len(few)} of {len(models)} models are {others}",
        rule="the models of one zoo are all adapters or all full weights",
        next_step=f"leave out {shown}: name the other models, or {_skipping(models[names.index(few[0])].path)}",
    )


def _skipping(path: Path) -> str:
    """Say how a model is skipped: a folder passes over names that begin with `_`, but not a list of paths."""
    if path.name.startswith(("_", ".")):
        return f"name the folder {path.parent}: it skips names that begin with {path.name[0]!r}"
    return "begin its folder's name with '_', so that it is skipped"


def _refuse_mixed_adapters(models: Sequence[Model], names: Sequence[str]) -> None:
    """Refuse adapters of several formats, because their module names differ."""
    first: dict[str, str] = {}
    for model, name in zip(models, names, strict=True):
        if model.format in ADAPTERS:
            first.setdefault(model.format, name)
    if len(first) > 1:
        formats = " and ".join(f"{name} is a {format_}" for format_, name in first.items())
        raise MismatchError(
            formats,
            rule="all adapters of a zoo have the same format",
            next_step="save them all with diffusers (save_lora_weights), or all with PEFT (save_pretrained)",
        )


class _SourcesOfAll:
    """The possible layers of each model. Models that differ only in values are examined once.

    Attributes:
        models: all of them.
        sources: of each model; models that differ only in values share one dictionary.
        kinds: the index of the first model of each kind, in the order of the models.
    """

    def __init__(self, models: Sequence[Model], view: str) -> None:
        self.models = models
        self.sources = [layer_sources(model, view) for model in models]
        first_of: dict[int, int] = {}
        for index, sources in enumerate(self.sources):
            first_of.setdefault(id(sources), index)
        self.kinds = list(first_of.values())
        self._counts = Counter(id(sources) for sources in self.sources)

    def _count(self, index: int) -> int:
        """Return how many models are like this one."""
        return self._counts[id(self.sources[index])]

    def count_names(self) -> Counter[str]:
        """Return how many models have a layer of each name."""
        every: Counter[str] = Counter()
        for index in self.kinds:
            every.update(dict.fromkeys(self.sources[index], self._count(index)))
        return every

    def difference(
        self, layer: str, count: int, names: Sequence[str], base: dict[str, LayerSource] | None
    ) -> MismatchError | None:
        """Return the first way in which a layer differs between models, or between them and their base."""
        first = next(index for index in self.kinds if layer in self.sources[index])
        if count < len(self.sources):
            missing = next(index for index in self.kinds if layer not in self.sources[index])
            num = len(self.sources) - count
            lack = "1 model lacks" if num == 1 else f"{num} models lack"
            return _mismatch(
                f"{names[missing]} has no such layer, but {names[first]} has it ({lack} it)",
                layer,
                as_zero=self.sources[first][layer].layer.kind == "update",
            )
        shape = self.sources[first][layer].layer.tensor_shape
        for index in self.kinds:
            other = self.sources[index][layer].layer.tensor_shape
            if other != shape:
                return _mismatch(f"shape {list(other)} in {names[index]} but {list(shape)} in {names[first]}", layer)
        if base is not None and (layer not in base or base[layer].layer.tensor_shape != shape):
            there = f"has shape {list(base[layer].layer.tensor_shape)}" if layer in base else "is absent"
            return _mismatch(f"shape {list(shape)} in the models, but in the base it {there}", layer)
        return None

    def merged(self, layer: str) -> Layer:
        """Return the layer as the first model has it, with the widest dtype of all models."""
        merged = self.sources[0][layer].layer
        dtypes = {self.sources[index][layer].layer.dtype for index in self.kinds}
        if len(dtypes) > 1:
            merged = replace(merged, dtype=dtype_name(widest(*(getattr(torch, dtype) for dtype in sorted(dtypes)))))
        return merged

    def sources_of(self, layers: Iterable[str]) -> tuple[dict[str, LayerSource], ...]:
        """Return where each model keeps these layers."""
        names = tuple(layers)
        chosen = {}
        for index in self.kinds:
            sources = self.sources[index]
            chosen[id(sources)] = {name: sources[name] for name in names}
        return tuple(chosen[id(sources)] for sources in self.sources)

    def unread(self) -> list[LeftOut]:
        """Tensors that no view reads: integers and buffers of checkpoints, heads and biases beside LoRA factors."""
        reasons: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for index in self.kinds:
            model = self.models[index]
            keys = {source.key for source in self.sources[index].values()}
            for name in model.other_tensors:
                if name not in keys:
                    dtype = dtype_name(model.tensors[name].dtype)
                    reason = "not a LoRA factor" if model.updates else "not a floating weight"
                    reasons[name] = f"{reason} ({dtype})"
                    counts[name] += self._count(index)
        return [LeftOut(name, reason, counts[name]) for name, reason in reasons.items()]


_AS_ZERO = "--missing zero (missing='zero') counts an update that an adapter lacks as zero"


def _mismatch(what: str, layer: str, *, as_zero: bool = False) -> MismatchError:
    next_step = f"--exclude '{glob_of(role(layer))}' or --allow-missing carries it unchanged"
    if as_zero:
        next_step = f"{_AS_ZERO}; {next_step}"
    if layer.endswith((".lora_A", ".lora_B")):
        next_step += "; view 'update' accepts mixed ranks"
    return MismatchError(
        what,
        where=f"layer '{layer}'",
        rule="each layer must have the same shape in all models of a zoo",
        next_step=next_step,
    )


def _in_common(view: str) -> str:
    """Return the next step for models without a common layer."""
    other = "adapters of different bases are not one zoo: name adapters of one base"
    if view == "update":
        return f"{_AS_ZERO}; {other}"
    if view == "factors":
        return f"use view 'update', where {_AS_ZERO}; {other}"
    return "no layer is in all models: name models of one architecture, whose layers have the same names"


def _all_in_one(problems: list[MismatchError], next_step: str | None) -> MismatchError:
    """Return the first error and name the next few. `next_step` replaces its own."""
    first = problems[0]
    others = ", ".join(f"{problem.where} ({problem.what})" for problem in problems[1:6])
    if len(problems) > 6:
        others += f" and {len(problems) - 6} more"
    return MismatchError(
        first.what,
        where=first.where,
        rule=first.rule,
        next_step=(next_step or first.next_step) + (f". Also: {others}" if others else ""),
    )
