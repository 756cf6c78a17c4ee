"""Adapters of components and loadings, as the code of the universal-subspace papers writes them (Kaushik et al., arXiv 2502.04700
and 2512.05117; repositories toshi2k2/EigenLoRA and toshi2k2/unisub).

One folder a task, with `adapter_model.safetensors`; per module of the base model, W one of subspaceadapter, eigenlora, eigenflux:

    <module>.W_A.components (inputs, K), .W_A.loadings (K, rank)        A = (components · loadings)ᵀ
    <module>.W_B.components (outputs, K), .W_B.loadings (K, rank)       B = components · loadings

with or without `.weight` at the end. The components are the same for all tasks that came from one run; a task may lack its own,
which another one or a file of components gives: `<module>.lora_A.weight` (inputs, K) and `<module>.lora_B.weight` (outputs, K), as
their scripts pickle them in `lola_components.pt`. There is no mean: what the scripts centred by is not kept, and not added back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eigenzoo.errors import DataError, FormatError
from eigenzoo.formats.lora.peft_folder import PICKLE_FILE, PREFIX, WEIGHTS_FILE
from eigenzoo.formats.model import TensorInfo
from eigenzoo.formats.paths import inside
from eigenzoo.formats.pickles.file import PickleStateDict
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.subspaces.factors import (
    ForeignFactor,
    ForeignSubspace,
    check_names,
    check_shapes,
    finite,
    open_tensors,
    require_shape,
)

COMPONENTS, LOADINGS = "components", "loadings"

_PART = re.compile(
    r"(?P<module>.+)\.(?:subspaceadapter|eigenlora|eigenflux)_(?P<side>[AB])(?:\.[^.]+)??"
    r"\.(?P<part>components|loadings)(?:\.weight)?"
)
_COMPONENTS_OF = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")

Key = tuple[str, str, str]
"""Module, side, part."""


class Tensors(Protocol):
    """An opened file of tensors, safetensors or pickle."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What is in it."""

    def read(self, name: str) -> Tensor:
        """Read one tensor."""


class _Adapter(NamedTuple):
    """One task's file: its parts, and the tensors that are none."""

    where: str
    path: Path
    file: Tensors
    parts: Mapping[Key, TensorInfo]
    others: tuple[TensorInfo, ...]

    def read(self, key: Key) -> Tensor:
        name = self.parts[key].name
        return finite(self.file.read(name), name, self.where)


class SubspaceAdapters(ForeignSubspace):
    """Adapters of one run: components of the inputs and of the outputs that all have, and loadings of each."""

    tool, axes, keeps_others = "components and loadings", ("outputs", "inputs"), True

    def __init__(
        self,
        folders: Sequence[Path],
        names: Sequence[str],
        *,
        components: Path | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.path, self.sources = folders[0].parent, tuple(folders)
        self.names = check_names(names, "adapter", str(self.path))
        self._adapters = [_open_adapter(folder, allow_pickle) for folder in folders]
        self._given = None if components is None else _open_components(components, allow_pickle)
        first = self._adapters[0]
        modules = list(dict.fromkeys(module for module, _, part in first.parts if part == LOADINGS))
        if not modules:
            raise FormatError(
                "the files have components, but no loadings",
                where=first.where,
                rule="an adapter consists of loadings; components alone are not a model",
                next_step="name the folders whose files hold loadings too",
            )
        self._owners = {(module, side): self._owner(module, side) for module in modules for side in "AB"}
        self.shapes = {module: self._shapes(module) for module in modules}
        for adapter in self._adapters:
            self._check(adapter)
        dtypes = [info.dtype for owner in self._owners.values() for info in owner.parts.values()]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.files = tuple(dict.fromkeys(adapter.path for adapter in (*self._adapters, *self._owners.values())))
        self.notes = ("it has no mean: the mean that was removed from its components is lost",)

    def factor(self, module: str, factor: str) -> ForeignFactor:
        """Read one factor: directions (K, S) along the inputs of A or the outputs of B, and all loadings (N, K, R)."""
        side = factor[-1]
        owner, key = self._owners[module, side], (module, side, COMPONENTS)
        components_SK = owner.read(key)
        for adapter in self._adapters:
            if adapter is not owner and key in adapter.parts and not torch.equal(adapter.read(key), components_SK):
                raise DataError(
                    f"the components of {module[:200]!r}, side {side}, differ from those of {owner.where}",
                    where=adapter.where,
                    rule="models of one subspace have the same components",
                    next_step="import adapters of one run at a time",
                )
        loadings = [adapter.read((module, side, LOADINGS)) for adapter in self._adapters]
        num_used = loadings[0].shape[0]  # a file of components may hold more than were used
        return ForeignFactor(None, components_SK[:, :num_used].T.contiguous(), torch.stack(loadings))

    def others(self, index: int) -> tuple[TensorInfo, ...]:
        """The tensors of one adapter that are no part of a factor."""
        return self._adapters[index].others

    def read_other(self, index: int, name: str) -> Tensor:
        """Read one of these."""
        return self._adapters[index].file.read(name)

    def _owner(self, module: str, side: str) -> _Adapter:
        """The first file that has a factor's components."""
        key = (module, side, COMPONENTS)
        owners = [adapter for adapter in (self._given, *self._adapters) if adapter is not None and key in adapter.parts]
        if not owners:
            raise FormatError(
                f"no file has components of {module[:200]!r}, side {side}",
                where=self._adapters[0].where,
                next_step="name the file of the components (components=, --components)",
            )
        return owners[0]

    def _shapes(self, module: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(rank, inputs) and (outputs, rank)."""
        sizes = []
        for side in "AB":
            owner, first = self._owners[module, side], self._adapters[0]
            info = owner.parts[module, side, COMPONENTS]
            num_values, num_components = require_shape(info, info.name, (None, None), owner.where).shape
            loadings = first.parts.get((module, side, LOADINGS))
            name = f"{module}, side {side}: loadings"
            num_used, rank = require_shape(loadings, name, (None, None), first.where).shape
            if num_used > num_components or (num_used < num_components and owner is not self._given):
                raise FormatError(
                    f"there are {num_used} loadings for {num_components} components of {module[:200]!r}, side {side}",
                    where=first.where,
                )
            sizes.append((num_values, rank))
        (inputs, rank_a), (outputs, rank_b) = sizes
        check_shapes((rank_a, inputs), (outputs, rank_b), f"{self._adapters[0].where}, module {module[:200]!r}")
        return (rank_a, inputs), (outputs, rank_b)

    def _check(self, adapter: _Adapter) -> None:
        """Refuse an adapter of other modules or shapes than the first."""
        extra = sorted({module for module, _, _ in adapter.parts} - set(self.shapes))
        if extra:
            raise FormatError(
                f"it has module {extra[0][:200]!r}, which the first adapter lacks",
                where=adapter.where,
                rule="adapters of one subspace have the same modules",
            )
        first = self._adapters[0].parts
        for module, side in self._owners:
            for part, pattern in ((COMPONENTS, self._owners[module, side].parts), (LOADINGS, first)):
                info = adapter.parts.get((module, side, part))
                if part == LOADINGS or (info is not None and self._given is None):
                    shape = pattern[module, side, part].shape
                    require_shape(info, f"{module}, side {side}: {part}", shape, adapter.where)


def is_subspace_adapter(folder: Path) -> bool:
    """Tell whether a folder is an adapter of components and loadings, by its header; a pickle has none."""
    if not (folder / WEIGHTS_FILE).is_file():
        return (folder / PICKLE_FILE).is_file()
    return any(_PART.fullmatch(name) for name in open_tensors(folder / WEIGHTS_FILE, folder).tensors)


def _open_adapter(folder: Path, allow_pickle: bool) -> _Adapter:
    where = str(folder)
    file: Tensors
    if (folder / WEIGHTS_FILE).exists():
        file, path = open_tensors(folder / WEIGHTS_FILE, folder), folder / WEIGHTS_FILE
    else:
        path = inside(folder, PICKLE_FILE)
        file = _pickled(path, allow_pickle)
    parts: dict[Key, TensorInfo] = {}
    others = []
    for name, info in file.tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            others.append(info)
            continue
        _add(parts, (match["module"].removeprefix(PREFIX), match["side"], match["part"]), info, where)
    check_names(sorted({module for module, _, _ in parts}), "module with components or loadings", where)
    return _Adapter(where, path, file, parts, tuple(others))


def _open_components(path: Path, allow_pickle: bool) -> _Adapter:
    """Open a file of components alone."""
    file = SafetensorsFile(path) if path.suffix == ".safetensors" else _pickled(path, allow_pickle)
    parts: dict[Key, TensorInfo] = {}
    for name, info in file.tensors.items():
        match = _COMPONENTS_OF.fullmatch(name) or _PART.fullmatch(name)
        if match is not None and match.groupdict().get("part", COMPONENTS) == COMPONENTS:
            _add(parts, (match["module"].removeprefix(PREFIX), match["side"], COMPONENTS), info, str(path))
    if not parts:
        raise FormatError(
            "the file has no components",
            where=str(path),
            rule="components are named like the factors: <module>.lora_A.weight",
        )
    return _Adapter(str(path), path, file, parts, ())


def _pickled(path: Path, allow_pickle: bool) -> PickleStateDict:
    if not path.is_file():
        raise FormatError("the file is missing", where=str(path))
    return PickleStateDict(path, allow_pickle=allow_pickle)


def _add(parts: dict[Key, TensorInfo], key: Key, info: TensorInfo, where: str) -> None:
    if key in parts:
        raise FormatError(
            f"two tensors are the {key[2]} of {key[0][:200]!r}, side {key[1]}: {parts[key].name!r} and {info.name!r}",
            where=where,
            next_step="save each adapter to its own file",
        )
    parts[key] = info
