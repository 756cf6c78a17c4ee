"""Read merge recipes in mergekit's YAML.

    merge_method: ties
    base_model: base
    models:
      - model: base+adapters/code            # an adapter on the base, which stays an adapter
        parameters: {weight: 1.0, density: [1.0, 0.5]}
    parameters:
      density: 0.3
      weight: [{filter: mlp, value: 0.5}, {value: 1.0}]
    dtype: float32
    out_dtype: bfloat16

A parameter is a number, a list of numbers over the depth of the network (linear between them), or a list of filters, of which the
first whose text is part of a tensor's name applies. Those of a model precede those of the recipe.

Other people wrote the file: it is read by YAML's safe loader, and everything that is not understood is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.formats.paths import read_bounded

MAX_RECIPE_BYTES = 2**20
MAX_MODELS = 4096

NOT_DONE = {
    "slices": "stacking layers of several models makes another architecture",
    "modules": "modules that are merged apart are not supported",
    "tokenizer_source": "vocabularies are not merged",
    "tokenizer": "vocabularies are not merged",
    "chat_template": "chat templates are not merged",
}
"""Entries that mergekit knows, and why they are refused here."""

ENTRIES = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
DTYPES = ("float32", "float16", "bfloat16", "float64")

Number = int | float | bool

_BLOCK = re.compile(r"(?:^|\.)(\d{1,5})(?:\.|$)")


@dataclass(frozen=True)
class RecipeModel:
    """A source: the path of a model, the path of an adapter on it, if any, and its parameters."""

    path: str
    adapter: str | None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked.

    Attributes:
        method: as mergekit names it.
        base: path of the base model, or None.
        models: the sources without the base. One that is the base itself has a zero update.
        parameters: those of all models.
        dtype, out_dtype: of the computation and of the file, or None.
        base_parameters: of the base, where it is among the models.
    """

    method: str
    base: str | None
    models: tuple[RecipeModel, ...]
    parameters: Mapping[str, Any]
    dtype: str | None
    out_dtype: str | None
    base_parameters: Mapping[str, Any] | None = None

    @property
    def is_of_adapters(self) -> bool:
        """Whether every source is an adapter on one base, so that the merge is an adapter and needs no base."""
        return bool(self.models) and all(model.adapter is not None for model in self.models)

    def shared(self, name: str, tensor: str, depth: float) -> Number | None:
        """Return a parameter of all models for one tensor at a depth from 0 to 1; None where it is not given."""
        return self._first([self.parameters], name, tensor, depth)

    def of_model(self, model: RecipeModel, name: str, tensor: str, depth: float) -> Number | None:
        """Return a parameter of one model for one tensor: its own, or that of all models."""
        return self._first([model.parameters, self.parameters], name, tensor, depth)

    def _first(self, scopes: list[Mapping[str, Any]], name: str, tensor: str, depth: float) -> Number | None:
        for scope in scopes:
            value = _evaluate(scope[name], tensor, depth) if name in scope else None
            if value is not None:
                return value
        return None

    @property
    def parameter_names(self) -> frozenset[str]:
        """All parameters that the recipe gives."""
        return frozenset(self.parameters).union(*(model.parameters for model in self.models))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's safe loader without aliases, by which a small file can stand for a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node as the safe loader does."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the values out")
        return super().compose_node(parent, index)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe. Relative paths in it are those from the working folder, as in mergekit.

    Raises:
        FormatError: for a file that is not a recipe.
        UnsupportedError: for entries that mergekit knows and eigenzoo does not.
    """
    where = str(path)
    try:
        text = read_bounded(Path(path), MAX_RECIPE_BYTES, where=where).decode("utf-8")
        document = yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise FormatError(f"is not YAML{line}: {problem[:120]}", where=where) from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise FormatError("is not a recipe", where=where, rule=f"a recipe has the entries {', '.join(ENTRIES)}")
    for name in sorted(set(document) - set(ENTRIES)):
        if name in NOT_DONE:
            raise UnsupportedError(f"entry {name!r}", where=where, rule=NOT_DONE[name], next_step="use mergekit for it")
        raise FormatError(
            f"has the unknown entry {name[:40]!r}", where=where, rule=f"a recipe has {', '.join(ENTRIES)}"
        )
    method, base = document.get("merge_method"), document.get("base_model")
    if not isinstance(method, str):
        raise FormatError("names no merge_method", where=where, next_step="add merge_method: ties, for example")
    listed = document.get("models")
    if not isinstance(listed, list) or not listed or len(listed) > MAX_MODELS:
        raise FormatError("lists no models", where=where, rule=f"models is a list of 1 to {MAX_MODELS} entries")
    if base is not None and (not isinstance(base, str) or "+" in base):
        raise FormatError(f"base_model is {str(base)[:60]!r}", where=where, rule="it is the path of a model")
    models = [_model(entry, number, where) for number, entry in enumerate(listed)]
    own = [model for model in models if model.path == base and model.adapter is None]
    return Recipe(
        method,
        base,
        tuple(model for model in models if model not in own),
        _parameters(document.get("parameters"), where),
        _dtype(document.get("dtype"), "dtype", where),
        _dtype(document.get("out_dtype"), "out_dtype", where),
        own[0].parameters if own else None,
    )


def _model(entry: Any, number: int, where: str) -> RecipeModel:
    if isinstance(entry, str):
        entry = {"model": entry}
    known = {"model", "parameters"}
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str) or set(entry) - known:
        raise FormatError(f"models[{number}] is {str(entry)[:60]!r}", where=where, rule="it has model and parameters")
    path, plus, adapter = entry["model"].partition("+")
    if not path or (plus and not adapter):
        raise FormatError(
            f"models[{number}] is {entry['model'][:60]!r}", where=where, rule="it is PATH, or BASE+ADAPTER"
        )
    return RecipeModel(path, adapter or None, _parameters(entry.get("parameters"), where))


def _parameters(given: Any, where: str) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise FormatError(f"parameters are {str(given)[:60]!r}", where=where, rule="they are names and values")
    for name, setting in given.items():
        for value in _values(setting, where, name):
            if not isinstance(value, bool | int | float) or not isfinite(value):
                raise FormatError(
                    f"parameter {name[:40]!r} has {str(value)[:40]!r}",
                    where=where,
                    rule="it is a number, a list of numbers, or a list of {filter, value}",
                )
    return given


def _values(setting: Any, where: str, name: str) -> Iterator[Any]:
    """Yield all values of a setting."""
    entries = setting if isinstance(setting, list) else [setting]
    if not entries or len(entries) > MAX_MODELS:
        raise FormatError(f"parameter {name[:40]!r} has {len(entries)} values", where=where)
    filters = [entry for entry in entries if isinstance(entry, dict)]
    for entry in filters:
        value, wanted = entry.get("value"), entry.get("filter")
        listed = value if isinstance(value, list) else [value]
        if set(entry) - {"filter", "value"} or any(isinstance(each, dict) for each in listed):
            raise FormatError(
                f"parameter {name[:40]!r} has {str(entry)[:60]!r}",
                where=where,
                rule="a filter is {filter: TEXT, value: NUMBER}",
            )
        if not isinstance(wanted, str | None):
            raise FormatError(
                f"parameter {name[:40]!r} has filter {str(wanted)[:40]!r}", where=where, rule="a filter is a text"
            )
        yield from _values(value, where, name)
    if filters and len(filters) < len(entries):
        raise FormatError(f"parameter {name[:40]!r} mixes numbers and filters", where=where)
    if not filters:
        yield from entries


def _dtype(given: Any, name: str, where: str) -> str | None:
    if given is None:
        return None
    if given not in DTYPES:
        raise FormatError(f"{name} is {str(given)[:40]!r}", where=where, rule=f"it is one of {', '.join(DTYPES)}")
    return str(given)


def _evaluate(setting: Any, tensor: str, depth: float) -> Number | None:
    """Return the value of a setting for one tensor; None where no filter is part of its name."""
    entries = setting if isinstance(setting, list) else [setting]
    if isinstance(entries[0], dict):
        for entry in entries:
            wanted = entry.get("filter")
            if wanted in (None, "*") or wanted in tensor:
                return _evaluate(entry["value"], tensor, depth)
        return None
    if all(isinstance(entry, bool) for entry in entries):
        return bool(entries[int(depth * (len(entries) - 1))])
    place = depth * (len(entries) - 1)
    first = min(int(place), len(entries) - 1)
    second, share = min(first + 1, len(entries) - 1), place - first
    return float((1 - share) * entries[first] + share * entries[second])


def depths(tensors: Collection[str]) -> dict[str, float]:
    """Return how deep each tensor lies: 0 in the first block, 1 in the last, 0 outside of the blocks, as in mergekit.

    >>> depths(["embed.weight", "layers.0.q", "layers.1.q", "layers.2.q"])
    {'embed.weight': 0.0, 'layers.0.q': 0.0, 'layers.1.q': 0.5, 'layers.2.q': 1.0}
    """
    blocks = {name: int(match[1]) if (match := _BLOCK.search(name)) else None for name in tensors}
    last = max((block for block in blocks.values() if block is not None), default=0)
    return {name: 0.0 if block is None else (block / last if last else 1.0) for name, block in blocks.items()}


def check_parameters(recipe: Recipe, known: Collection[str]) -> None:
    """Raise UsageError for a parameter that the method does not have."""
    unknown = sorted(recipe.parameter_names - set(known))
    if unknown:
        raise UsageError(
            f"parameter {unknown[0]!r}", where=f"method {recipe.method}", rule=f"it has {', '.join(known) or 'none'}"
        )
