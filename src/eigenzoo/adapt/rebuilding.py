"""Rebuild a whole model in the zoo's format from an adapter file.

With a start at the zoo's mean (or any other of its points), the weights are M + L(c), as the bundle rebuilds them. With start zero
they are those of the trained model plus L(c), and that model is needed. All other tensors come from a model of the bundle or from
the named model. Other trained parameters replace theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenzoo.adapt import adapter_file
from eigenzoo.adapt.adapter_file import AdapterFile
from eigenzoo.adapt.fingerprints import of_weights
from eigenzoo.adapt.maps import map_of
from eigenzoo.errors import BundleError, FormatError, UsageError
from eigenzoo.formats.bundle.contents import Template
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.model import Model
from eigenzoo.formats.side_files import CONFIG
from eigenzoo.formats.writers import cast_to
from eigenzoo.linalg import lora
from eigenzoo.linalg.lora import Cut
from eigenzoo.subspace.coefficients import Coefficients
from eigenzoo.subspace.module_places import PREFIXES
from eigenzoo.subspace.rebuilt import MaxRank, RebuiltModel
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.template import ZooTemplate


def rebuild(
    space: Subspace,
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    like: str | None = None,
    max_lora_rank: MaxRank = None,
) -> RebuiltModel:
    """Return the whole model of an adapter file. The cost is that of `Subspace.rebuild`.

    Args:
        model: the checkpoint that was trained; required for start `zero` of full weights. It provides all tensors that are not
            layers.
        like: the model of the bundle that provides these tensors if `model` is not given. Default: the first.
        max_lora_rank: the largest rank of an adapter's update, as in `Subspace.rebuild`.

    Raises UsageError if a required model is not given. Raises BundleError if it is another model, or if it lacks one of the other
    trained parameters.
    """
    adapter, name = adapter_file.read(path, space), Path(path).stem
    if model is not None and like is not None:
        raise UsageError(
            "both --model and --like (model=, like=) are given",
            where=str(path),
            rule="one model gives all tensors that are not layers",
            next_step="leave one of them out",
        )
    named = None if model is None else space.open(model)
    if named is not None:
        template: Template = ZooTemplate(named, 0)
    else:
        template = space.template(like if like is not None else space.names[0])
    filled = _Filled(template, adapter, str(path))
    record = Coefficients(name, adapter.values, {}, 0.0, {}, {}, filled)
    rebuilt = space.rebuild(record, max_lora_rank=max_lora_rank)  # it is checked like every other model
    if adapter.mean:
        return rebuilt
    if space.view == "update":
        return _Change(
            name,
            space.layers,
            adapter.values,
            filled,
            space.view,
            lambda: _nothing(name),
            max_lora_rank=max_lora_rank,
        )
    trained = space.base if named is None else named.models[0]
    if trained is None:
        raise UsageError(
            "was trained from start zero, as a change of a model's weights",
            where=str(path),
            rule="these weights are not in the bundle",
            next_step="name the model with --model",
        )
    _check_weights(adapter, trained, space, str(path))
    # View `delta` adds its layers to the trained model here.
    return _Change(name, space.layers, adapter.values, filled, "delta", lambda: trained)


class _Change(RebuiltModel):
    """A model whose layers are given weights plus L(c), without the mean."""

    def _rebuild(self, name: str) -> Tensor:
        return map_of(self._layers[name], torch.float64).matrix(self._values[name].double())

    def _rebuild_update(self, name: str, max_rank: int | None) -> Cut:
        basis, values = self._layers[name], self._values[name].double()
        layer = map_of(basis, torch.float64)
        factors = layer.factors(values, False)
        if factors is None:
            factors = layer.matrix(values), torch.eye(basis.layer.shape[1], dtype=torch.float64)
        return lora.cut_product(*factors, max_rank)


class _Filled(Template):
    """A template with the other trained parameters instead of its own, and without metadata about its own task."""

    def __init__(self, template: Template, adapter: AdapterFile, where: str) -> None:
        self._template, self._classes = template, _classes(adapter.about.get("classes"), where)
        self._besides = _placed(template, adapter, where)
        shapes = {name: tuple(values.shape) for name, values in self._besides.items()}
        for name, shape in shapes.items():
            if shape != template.layout.tensors[name].shape and self._classes is None:
                raise BundleError(
                    f"holds {list(shape)} values for a tensor of {list(template.layout.tensors[name].shape)}",
                    where=f"{where}, '{name}'",
                    next_step="name the model that was trained with --model",
                )
        files = {
            file: tuple(replace(tensor, shape=shapes.get(tensor.name, tensor.shape)) for tensor in tensors)
            for file, tensors in template.layout.files.items()
        }
        self.layout = replace(template.layout, files=files)
        self.config, self.left_at, self.side_files = template.config, template.left_at, template.side_files
        self.not_carried = template.not_carried
        task = {"task": adapter.about["task"]} if "task" in adapter.about else {}
        self.metadata = {file: {"format": "pt", **task} for file in template.metadata}
        self.carried = tuple(dict.fromkeys([*template.carried, *self._besides]))

    def read_carried(self, name: str) -> Tensor:
        """Read a tensor that is not a layer."""
        if name in self._besides:
            return cast_to(self.layout.tensors[name], self._besides[name])
        return self._template.read_carried(name)

    def read_side_file(self, name: str) -> bytes:
        """Read a file beside the weights. A config gets the classes of the task."""
        data = self._template.read_side_file(name)
        if name != CONFIG or self._classes is None:
            return data
        config: dict[str, Any] = dict(parse_json(data, where=name))
        config["id2label"] = {str(number): label for number, label in enumerate(self._classes)}
        config["label2id"] = {label: number for number, label in enumerate(self._classes)}
        return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _placed(template: Template, adapter: AdapterFile, where: str) -> dict[str, Tensor]:
    """Return the other trained parameters by their names in the files."""
    saved = _texts(adapter.about.get("names", "{}"), f"{where}, names")
    tensors, placed = template.layout.tensors, {}
    for name, values in adapter.besides.items():
        name_in_file = saved.get(name, name)
        names = [prefix + name_in_file for prefix in ("", *PREFIXES) if prefix + name_in_file in tensors]
        if not names:
            raise BundleError(
                "was trained besides, and has no place in the zoo's format",
                where=f"{where}, '{name}'",
                rule="adapters hold updates alone" if template.layout.updates else "the model has no such tensor",
                next_step="put it into the model that it belongs to, or train coefficients alone",
            )
        placed[names[0]] = values
    return placed


def _texts(text: str, where: str) -> Mapping[str, str]:
    values = parse_json(text.encode("utf-8"), where=where)
    if not all(isinstance(value, str) for value in values.values()):
        raise FormatError("is no table of names", where=where)
    return values


def _classes(text: str | None, where: str) -> list[str] | None:
    """Read the names of the classes for a config."""
    if text is None:
        return None
    try:
        classes = json.loads(text)
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise FormatError("has no list of names as its classes", where=where)
    return classes


def _check_weights(adapter: AdapterFile, trained: Model, space: Subspace, where: str) -> None:
    """Raise unless the weights are those on which the coefficients were trained."""
    missing = [name for name in space.layers if name not in trained.tensors]
    if missing:
        raise BundleError(f"has no layer '{missing[0]}'", where=str(trained.path))
    recorded = adapter.about.get("weights")
    if recorded is not None and recorded != of_weights((name, trained.read(name)) for name in space.layers):
        raise BundleError(
            "is not the model that was trained: its weights differ",
            where=str(trained.path),
            rule=f"start zero is a change of the weights that {where} was trained on",
        )


def _nothing(name: str) -> Model:
    raise BundleError("adapters need no base", where=name)
