"""From an adapter file to a whole model in the zoo's own format.

Started from the zoo's mean (or any of its points), the weights are what the bundle rebuilds: M + L(c). Started from zero, they
are those of the model that was trained plus L(c), and that model is needed. Everything else is a model of the bundle's, or the
model that is named; what was trained besides takes the place of what is there.
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
from eigenzoo.adapt.places import PREFIXES
from eigenzoo.errors import BundleError, FormatError, UsageError
from eigenzoo.formats.bundle.contents import Template
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.model import Model
from eigenzoo.formats.side_files import CONFIG
from eigenzoo.formats.writers import cast_to
from eigenzoo.linalg import lora
from eigenzoo.linalg.lora import Factors
from eigenzoo.subspace.coefficients import Coefficients
from eigenzoo.subspace.rebuilt import RebuiltModel
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.template import ZooTemplate


def rebuild(
    space: Subspace,
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    like: str | None = None,
    max_lora_rank: int | None = None,
) -> RebuiltModel:
    """Return the whole model that an adapter file stands for; cost as of `Subspace.rebuild`.

    Args:
        model: the checkpoint that was trained; needed for start `zero` of full weights. It gives all tensors that are not layers.
        like: the model of the bundle that gives it, where no model is named; by default the first.
        max_lora_rank: of adapters, the largest rank of an update, as of `Subspace.rebuild`.

    Raises UsageError where a model is needed and not named, BundleError where it is another one, or where what was trained
    besides has no place in it.
    """
    found, name = adapter_file.read(path, space), Path(path).stem
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
    filled = _Filled(template, found, str(path))
    record = Coefficients(name, found.values, {}, 0.0, {}, {}, filled)
    rebuilt = space.rebuild(record, max_lora_rank=max_lora_rank)  # its checks are those of every other model
    if found.mean:
        return rebuilt
    if space.view == "update":
        return _Change(
            name,
            space.layers,
            found.values,
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
    _check_weights(found, trained, space, str(path))
    # What view `delta` adds its layers to is here the model that was trained.
    return _Change(name, space.layers, found.values, filled, "delta", lambda: trained)


class _Change(RebuiltModel):
    """A model whose layers are L(c) alone, the mean left out, on top of the weights that it is given."""

    def _rebuild(self, name: str) -> Tensor | Factors:
        basis, values = self._layers[name], self._values[name].double()
        layer = map_of(basis, torch.float64)
        if basis.layer.kind != "update":
            return layer.matrix(values)
        factors = layer.factors(values, False)
        if factors is None:
            factors = layer.matrix(values), torch.eye(basis.layer.shape[1], dtype=torch.float64)
        return lora.truncated(*factors)[0]


class _Filled(Template):
    """A template with what was trained besides in the place of its own, and none of what its metadata say of its own task."""

    def __init__(self, template: Template, found: AdapterFile, where: str) -> None:
        self._template, self._classes = template, _classes(found.about.get("classes"), where)
        self._besides = _placed(template, found, where)
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
        task = {"task": found.about["task"]} if "task" in found.about else {}
        self.metadata = {file: {"format": "pt", **task} for file in template.metadata}
        self.carried = tuple(dict.fromkeys([*template.carried, *self._besides]))

    def read_carried(self, name: str) -> Tensor:
        """Read a tensor that no layer holds."""
        if name in self._besides:
            return cast_to(self.layout.tensors[name], self._besides[name])
        return self._template.read_carried(name)

    def read_side_file(self, name: str) -> bytes:
        """Read a file beside the weights; a config with the classes of the task."""
        data = self._template.read_side_file(name)
        if name != CONFIG or self._classes is None:
            return data
        config: dict[str, Any] = dict(parse_json(data, where=name))
        config["id2label"] = {str(number): label for number, label in enumerate(self._classes)}
        config["label2id"] = {label: number for number, label in enumerate(self._classes)}
        return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _placed(template: Template, found: AdapterFile, where: str) -> dict[str, Tensor]:
    """Return what was trained besides by the names of the files."""
    saved = _texts(found.about.get("names", "{}"), f"{where}, names")
    tensors, placed = template.layout.tensors, {}
    for name, values in found.besides.items():
        known = saved.get(name, name)
        names = [prefix + known for prefix in ("", *PREFIXES) if prefix + known in tensors]
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
    """Read the names of the classes, which go into a config."""
    if text is None:
        return None
    try:
        classes = json.loads(text)
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise FormatError("has no list of names as its classes", where=where)
    return classes


def _check_weights(found: AdapterFile, trained: Model, space: Subspace, where: str) -> None:
    """Raise unless the weights are those that coefficients were trained on."""
    missing = [name for name in space.layers if name not in trained.tensors]
    if missing:
        raise BundleError(f"has no layer '{missing[0]}'", where=str(trained.path))
    recorded = found.about.get("weights")
    if recorded is not None and recorded != of_weights((name, trained.read(name)) for name in space.layers):
        raise BundleError(
            "is not the model that was trained: its weights differ",
            where=str(trained.path),
            rule=f"start zero is a change of the weights that {where} was trained on",
        )


def _nothing(name: str) -> Model:
    raise BundleError("adapters need no base", where=name)
