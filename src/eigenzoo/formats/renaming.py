"""Models under other names: a task model seen as the encoder that it holds, whose names lack its prefix.

A view is another dictionary of names and places over the same files. Whatever is written of such a model has the names of its files
again: a layout knows them (`ModelLayout.names`), and an adapter's updates keep their keys.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from weakref import WeakValueDictionary

from eigenzoo.formats.checkpoint import Checkpoint, StateDict
from eigenzoo.formats.lora.peft_folder import LoraAdapter
from eigenzoo.formats.model import Model
from eigenzoo.formats.safetensors.header import HeaderContents


def renamed_model(model: Model, names: Mapping[str, str]) -> Model:
    """Return a model under other names; the same model where its format has no such view.

    Args:
        model: an adapter of PEFT's or a checkpoint in safetensors, whole.
        names: of some modules of the adapter, or tensors of the checkpoint, what they are called instead.
    """
    if isinstance(model, LoraAdapter):
        return model.under_names(names)
    if not isinstance(model, Checkpoint | StateDict) or model.splits:
        return model
    seen = copy.copy(model)
    seen.take_files({name: file.seen_as(_renamed(file.contents, names)) for name, file in model.files.items()})
    seen.names = MappingProxyType({new: old for old, new in names.items()})
    return seen


# One object for all files that agree, as their headers are; each holds the header that it was made of.
_cached: WeakValueDictionary[tuple[int, str], HeaderContents] = WeakValueDictionary()


def _renamed(contents: HeaderContents, names: Mapping[str, str]) -> HeaderContents:
    key = id(contents), repr(sorted(names.items()))
    if key not in _cached:
        tensors = {
            names.get(name, name): replace(info, name=names.get(name, name)) for name, info in contents.tensors.items()
        }
        positions = {names.get(name, name): position for name, position in contents.positions.items()}
        view = HeaderContents(
            MappingProxyType(tensors), MappingProxyType(positions), contents.metadata, made_of=contents
        )
        _cached[key] = view
        return view
    return _cached[key]
