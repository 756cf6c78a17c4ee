"""Models some of whose tensors are cut into parts along the outputs.

Rows of the outputs are contiguous in a row-major tensor, so a part is a run of its values and is read like any other
tensor. Nothing is copied, and nothing above this file knows: a cut model has the parts in the place of the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from weakref import WeakValueDictionary

from eigenzoo.errors import UnsupportedError, UsageError
from eigenzoo.formats.checkpoint import SafetensorsModel
from eigenzoo.formats.model import Model, Parts, TensorInfo, part_name
from eigenzoo.formats.pickles.file import PickleModel
from eigenzoo.formats.safetensors.header import HeaderContents
from eigenzoo.weights.splits import SplitRule


def split_model(model: Model, rules: Sequence[SplitRule]) -> Model:
    """Return a model with its tensors cut by the rules; the same model where there are none, or where it is cut so already.

    Raises UsageError for a rule that matches no tensor, that does not divide one, or whose glob meets another's.
    """
    if model.splits:
        whole = {name: sum(rows for _, rows in parts) for name, parts in model.splits.items()}
        splits = {name: rule.cut(name, rows) for name, rows in whole.items() for rule in rules if rule.matches(name)}
        if splits != dict(model.splits):
            raise UsageError("is already split by other rules", where=model.name, next_step="open the model again")
        return model
    return cut_model(model, _find_splits(model, rules)) if rules else model


def _find_splits(model: Model, rules: Sequence[SplitRule]) -> dict[str, Parts]:
    """Apply rules to a model's names and shapes."""
    if model.updates:
        raise UnsupportedError(
            "LoRA adapters cannot be split",
            where=model.name,
            rule="a rule splits only full weights",
            next_step="leave the split out: PEFT stores one update for a fused weight",
        )
    splits: dict[str, Parts] = {}
    for rule in rules:
        matching = [name for name in model.tensors if rule.matches(name)]
        if not matching:
            raise UsageError(
                f"the split {rule.shown} matches no tensor",
                where=model.name,
                rule="a rule is a glob of tensor names and the parts to split them into",
                next_step="`eigenzoo inspect --json` prints the names",
            )
        for name in matching:
            if name in splits:
                raise UsageError("two splits match this tensor", where=f"tensor {name[:200]!r} of {model.name}")
            splits[name] = _cut(model, name, rule)
    taken = [part_name(name, part) for name, parts in splits.items() for part, _ in parts]
    for name in taken:
        if name in model.tensors:
            raise UsageError("is already the name of a tensor", where=f"part {name[:200]!r} of {model.name}")
    return splits


def _cut(model: Model, name: str, rule: SplitRule) -> Parts:
    info = model.tensors[name]
    if not info.shape or not info.dtype.is_floating_point:
        raise UsageError(
            f"a tensor of shape {list(info.shape)} and dtype {info.dtype} cannot be split",
            where=f"tensor {name[:200]!r} of {model.name}",
            rule="floating-point weights are split along their first axis, the outputs",
            next_step="narrow the glob",
        )
    bias = model.tensors.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else None
    if bias is not None and len(info.shape) == 2 and bias.shape == info.shape[1:] != info.shape[:1]:
        raise UnsupportedError(
            f"its bias has {bias.shape[0]} outputs, which are the columns of {list(info.shape)}",
            where=f"tensor {name[:200]!r} of {model.name}",
            rule="a split needs outputs as rows; GPT-2's Conv1D holds inputs × outputs",
            next_step="narrow the glob to leave it out",
        )
    return rule.cut(name, info.shape[0])


def cut_model(model: Model, splits: Mapping[str, Parts]) -> Model:
    """Return a model with these tensors in these parts."""
    if not splits:
        return model
    cut = copy.copy(model)
    cut.splits = MappingProxyType(dict(splits))
    if isinstance(cut, SafetensorsModel):
        cut.take_files({name: file.seen_as(_cut_contents(file.contents, splits)) for name, file in cut.files.items()})
    elif isinstance(cut, PickleModel):
        state, holders = {}, {}
        for name, tensor in cut.state.items():
            holder, start = cut.tensors[name].file, 0
            for part, rows in splits.get(name, ()):
                state[part_name(name, part)] = tensor[start : start + rows]
                holders[part_name(name, part)] = holder
                start += rows
            if name not in splits:
                state[name], holders[name] = tensor, holder
        cut.take(state, holders, cut.folder)
    else:
        raise UnsupportedError(f"a model of kind {model.format!r} cannot be split", where=model.name)
    return cut


# One object for all files that agree, as their headers are; each holds the header that it was made of.
_cached: WeakValueDictionary[tuple[int, str], HeaderContents] = WeakValueDictionary()


def _cut_contents(contents: HeaderContents, splits: Mapping[str, Parts]) -> HeaderContents:
    key = id(contents), repr(sorted(splits.items()))
    cut_contents = _cached.get(key)
    if cut_contents is None:
        tensors: dict[str, TensorInfo] = {}
        positions: dict[str, tuple[int, int]] = {}
        for name, info in contents.tensors.items():
            position, count = contents.positions[name]
            for part, rows in splits.get(name, ()):
                size = rows * prod(info.shape[1:])
                tensors[part_name(name, part)] = replace(
                    info, name=part_name(name, part), shape=(rows, *info.shape[1:])
                )
                positions[part_name(name, part)] = position, size
                position += size * info.dtype.itemsize
            if name not in splits:
                tensors[name], positions[name] = info, (position, count)
        cut_contents = HeaderContents(
            MappingProxyType(tensors), MappingProxyType(positions), contents.metadata, made_of=contents
        )
        _cached[key] = cut_contents
    return cut_contents
