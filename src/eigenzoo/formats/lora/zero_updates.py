"""Adapters that lack some modules of their zoo, seen with an update of zero for each: the module is then as in the base.

A rebuilt model may have an update where its own file had none, so its layout, its config and what a header says of its
targets name all of these modules.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from eigenzoo.errors import MismatchError
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.lora.diffusion_file import METADATA_KEY
from eigenzoo.formats.lora.diffusion_keys import split_key
from eigenzoo.formats.lora.peft_folder import ATTENTION_OUT, PREFIX
from eigenzoo.formats.model import LoraUpdate, Model, TensorInfo
from eigenzoo.weights.roles import glob_of

OTHER_TARGETS = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Entries of a config that choose modules beside `target_modules`."""


@dataclass(frozen=True)
class ZooModule:
    """One module of a zoo and the keys that some adapter has for it; `family` is how these keys are spelled."""

    family: str
    update: LoraUpdate


def modules_of(format: str, updates: Iterable[LoraUpdate]) -> list[ZooModule]:
    """Return the modules of one adapter."""
    return [ZooModule(_family(format, update), update) for update in updates]


def _family(format: str, update: LoraUpdate) -> str:
    """How a file spells its keys. Files of diffusion models have several spellings, and no program reads a mixture."""
    key = split_key(update.key_a) if format == "diffusion-lora" else None
    if key is None:
        return format
    flat = "" if "." in key.stem else "flat"
    return f"{format} {flat}{update.key_a.removeprefix(key.stem)} {'' if update.key_alpha is None else 'alpha'}"


def unfilled(model: Model) -> Model:
    """Return the adapter as it is in its files."""
    return model.inner if isinstance(model, FilledAdapter) else model


def zero_modules(model: Model) -> tuple[str, ...]:
    """The modules whose update is zero because the adapter has none."""
    return tuple(model.zeros) if isinstance(model, FilledAdapter) else ()


def fill_adapter(model: Model, modules: Iterable[ZooModule], name: str) -> Model:
    """Return an adapter with updates of zero for the modules that it lacks; the same one where it lacks none.

    Raises MismatchError where the file trains such a module in another way, or where no file with its keys has the module.
    """
    model = unfilled(model)
    if not model.updates:
        return model
    own = next(iter(model.updates.values()))
    family = _family(model.format, own)
    wanted: dict[str, LoraUpdate] = {}
    same_family: dict[str, LoraUpdate] = {}
    for candidate in modules:
        if candidate.update.module not in model.updates:
            wanted.setdefault(candidate.update.module, candidate.update)
            if candidate.family == family:
                same_family.setdefault(candidate.update.module, candidate.update)
    if not wanted:
        return model
    others = frozenset(model.other_tensors)
    for module in wanted:
        _check_untrained(others, module, name)
        if module not in same_family:
            raise MismatchError(
                f"{name} has no such layer, and no file with keys of the same kind has it",
                where=f"layer '{module}'",
                rule="a zero update gets a key of the same kind as the file's other keys",
                next_step="load the files with diffusers and save them again with save_lora_weights, so that they agree; "
                "or leave the layer out with --exclude",
            )
    return FilledAdapter(model, {module: _zero(same_family[module], own) for module in wanted})


def _check_untrained(others: Collection[str], module: str, name: str) -> None:
    """Refuse a module whose whole weight is among the file's tensors that are no factors: its update is not zero."""
    for prefix, part in product(("", PREFIX), ("", "modules_to_save.")):
        key = f"{prefix}{module}.{part}weight"
        if key in others:
            raise MismatchError(
                f"{name} holds the whole weight of this module, {key!r}",
                where=f"layer '{module}'",
                rule="only a module that an adapter does not change counts as a zero update",
                next_step=f"--exclude '{glob_of(module)}' carries it unchanged",
            )


def _zero(like: LoraUpdate, own: LoraUpdate) -> LoraUpdate:
    """An update of rank 1 with the keys of another adapter's, and α as in the adapter's own file."""
    shape_a, shape_b = like.factor_shapes
    return replace(
        like,
        rank=1,
        scale=1.0 if like.key_alpha is None else own.scale * own.rank,
        factor_shapes=((1, *shape_a[1:]), (shape_b[0], 1, *shape_b[2:])),
    )


class FilledAdapter(Model):
    """An adapter with updates of zero for modules that its file does not have.

    Attributes:
        inner: the adapter as it is in its files.
        zeros: the updates of zero by module.
    """

    def __init__(self, inner: Model, zeros: Mapping[str, LoraUpdate]) -> None:
        self.inner, self.zeros = inner, MappingProxyType(dict(zeros))
        self.format, self.name, self.path = inner.format, inner.name, inner.path
        self.beside, self.warnings, self.splits = inner.beside, inner.warnings, inner.splits
        own = next(iter(inner.updates.values()))
        infos = {key: inner.tensors[key] for key in (own.key_a, own.key_b)}
        added: dict[str, TensorInfo] = {}
        self._alphas: dict[str, float] = {}
        for update in zeros.values():
            shapes = zip((update.key_a, update.key_b), (own.key_a, own.key_b), update.factor_shapes, strict=True)
            added |= {key: replace(infos[like], name=key, shape=shape) for key, like, shape in shapes}
            if (inner.config or {}).get("lora_bias") and update.key_b.endswith(".weight"):
                # PEFT makes a bias of every target then, and misses one that is not there.
                bias = f"{update.key_b.removesuffix('weight')}bias"
                added[bias] = replace(infos[own.key_b], name=bias, shape=update.shape[:1])
            if update.key_alpha is not None and own.key_alpha is not None:
                added[update.key_alpha] = replace(inner.tensors[own.key_alpha], name=update.key_alpha)
                self._alphas[update.key_alpha] = update.scale
        self._added = added
        self.tensors = MappingProxyType({**inner.tensors, **added})
        self._updates = MappingProxyType({**inner.updates, **zeros})
        self.config = None if inner.config is None else retargeted(inner.config, self._updates)
        self.metadata = {file: _retargeted_header(texts, self._updates) for file, texts in inner.metadata.items()}

    @property
    def updates(self) -> Mapping[str, LoraUpdate]:
        """The adapter's own updates, then those of zero."""
        return self._updates

    def read(self, name: str) -> Tensor:
        """Read one tensor whole; of an update of zero, zeros, with its bias, and its α."""
        info = self._added.get(name)
        if info is None:
            return self.inner.read(name)
        return torch.full(info.shape, self._alphas.get(name, 0.0), dtype=info.dtype)

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read values start:stop of the flattened tensor."""
        if name not in self._added:
            return self.inner.read_flat(name, start, stop, out)
        values = self.read(name).reshape(-1)[start:stop]
        return values if out is None else out.copy_(values)

    def read_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Read B and A of one update; of an update of zero, zeros of rank 1."""
        return super().read_factors(module) if module in self.zeros else self.inner.read_factors(module)

    def weight_files(self) -> tuple[Path, ...]:
        """The adapter's own files."""
        return self.inner.weight_files()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the adapter's own files."""
        return self.inner.nbytes


def retargeted(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Return a config whose targets are these modules by their whole names."""
    targets = sorted({module.removesuffix(ATTENTION_OUT) for module in modules})
    return {**config, "target_modules": targets, **{key: None for key in OTHER_TARGETS if key in config}}


def _config_of(document: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}." if component else ""
    return {key.removeprefix(prefix): value for key, value in document.items() if key.startswith(prefix)}


def _retargeted_header(texts: Mapping[str, str], updates: Mapping[str, LoraUpdate]) -> Mapping[str, str]:
    """Return a header's strings whose configs, of a LoRA of a diffusion model, name all modules that are there now."""
    if METADATA_KEY not in texts:
        return texts
    document = parse_json(texts[METADATA_KEY].encode("utf-8"), where=METADATA_KEY)
    names: dict[str, list[str]] = {}
    for update in updates.values():
        key = split_key(update.key_a)
        if key is not None:
            names.setdefault(key.component, []).append(key.name)
    configs = {component: _config_of(document, component) for component in names}
    # A component that the file lacked has no config yet: any other's says what matters, rank and α being written anew.
    other = next((config for config in configs.values() if config), {})
    for component, targets in names.items():
        config = retargeted(configs[component] or other, targets)
        document |= {f"{component}.{key}" if component else key: value for key, value in config.items()}
    return {**texts, METADATA_KEY: json.dumps(document)}
