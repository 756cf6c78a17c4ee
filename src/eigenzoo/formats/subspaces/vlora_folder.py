"""A folder that vLoRA's `SharedSubspace.save` or `save_quantized` wrote (vlora-dev 1.0).

    subspace_meta.json              layer_names, task_ids, task_filenames, rank, num_components, shapes_a, shapes_b, …
    subspace.safetensors            per layer <layer>.components_a (K, D), .mean_a (D,), .sv_a (K,), and the same with b
    task_<file>.safetensors         per layer <layer>.loadings_a (K,) and .loadings_b (K,)

A layer is a module of the base model and has two factors; each is flattened whole, and has a mean, directions and loadings of its
own: A = (mean_a + loadings_a · components_a) as `shapes_a` says, unscaled. With `"format": "nf4_packed"` the components lie in
`subspace_nf4.safetensors` as 4-bit indices with a scale per block, everything else in `subspace_float.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.json_file import MAX_CONFIG_BYTES, read_json
from eigenzoo.formats.paths import inside
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

META = "subspace_meta.json"
PLAIN, PACKED, FLOATS = "subspace.safetensors", "subspace_nf4.safetensors", "subspace_float.safetensors"
NF4 = "nf4_packed"

# What vLoRA's sixteen indices stand for; QLoRA's quantiles (Dettmers et al. 2023) to four digits.
_BELOW, _ABOVE = (
    (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)
_MOST_BLOCK = 2**16


class _Packed(NamedTuple):
    """The packed components of a quantised folder."""

    file: SafetensorsFile
    block: int


class VloraFolder(ForeignSubspace):
    """vLoRA's shared subspace: PCA over models of each flattened factor."""

    tool, axes = "vLoRA", ("models",)

    def __init__(self, path: Path) -> None:
        self.path = path
        meta = read_json(inside(path, META), where=f"{path}/{META}", max_bytes=4 * MAX_CONFIG_BYTES)
        where = f"{path}/{META}"
        modules = check_names(_a_list(meta, "layer_names", where), "layer", where)
        self.names = check_names(_a_list(meta, "task_ids", where), "task", where)
        self.sources = (path,) * len(self.names)
        self._packed = _opened_packed(path, meta, where)
        self._values = open_tensors(path / (FLOATS if self._packed else PLAIN), path)
        self.shapes = {module: self._shapes(module, meta, where) for module in modules}
        self._directions = {
            (module, side): self._num_directions(module, side, meta) for module in modules for side in (0, 1)
        }
        self._tasks = tuple(self._task(file) for file in _task_files(self.names, meta, where))
        means = [self._values.tensors[f"{module}.mean_{side}"].dtype for module in modules for side in "ab"]
        self.dtype = torch.float64 if torch.float64 in means else torch.float32
        packed = [self._packed.file] if self._packed else []
        self.files = tuple(file.path for file in (self._values, *packed, *self._tasks))
        self.notes = ("its directions were quantised to NF4, and have only that accuracy",) if packed else ()

    def factor(self, module: str, factor: str) -> ForeignFactor:
        """Read one factor: its mean (D,), directions (K, D) and all tasks' loadings (N, K)."""
        side = 0 if factor == "lora_A" else 1
        letter, where = "ab"[side], str(self.path)
        mean_D = finite(self._values.read(f"{module}.mean_{letter}"), f"{module}.mean_{letter}", where)
        directions_KD = finite(self._components(module, side), f"{module}.components_{letter}", where)
        name = f"{module}.loadings_{letter}"
        loadings_NK = torch.stack([finite(task.read(name), name, f"{where}/{task.file}") for task in self._tasks])
        return ForeignFactor(mean_D, directions_KD, loadings_NK)

    def _components(self, module: str, side: int) -> Tensor:
        if self._packed is None:
            return self._values.read(f"{module}.components_{'ab'[side]}")
        shape = (self._directions[module, side], prod(self.shapes[module][side]))
        return _unpacked(self._packed, module, "ab"[side], shape)

    def _shapes(self, module: str, meta: Mapping[str, Any], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B: as they are written down, or, by early versions, from the rank and the length of the mean."""
        shapes = []
        for letter in "ab":
            listed = meta.get(f"shapes_{letter}")
            if listed is None:
                name, rank = f"{module}.mean_{letter}", meta.get("rank")
                (size,) = require_shape(self._values.tensors.get(name), name, (None,), self._values.file).shape
                if type(rank) is not int or rank < 1 or size % rank:
                    raise FormatError(f"the rank is {str(rank)[:40]} for {size} values of {name[:200]!r}", where=where)
                shapes.append((rank, size // rank) if letter == "a" else (size // rank, rank))
            elif not isinstance(listed, dict) or not isinstance(listed.get(module), list):
                raise FormatError(f"shapes_{letter} has no shape of layer {module[:200]!r}", where=where)
            else:
                shapes.append(tuple(listed[module]))
        check_shapes(shapes[0], shapes[1], f"{where}, layer {module[:200]!r}")
        return shapes[0], shapes[1]

    def _num_directions(self, module: str, side: int, meta: Mapping[str, Any]) -> int:
        """Check a factor's tensors against its shape; returns K."""
        letter, size = "ab"[side], prod(self.shapes[module][side])
        tensors, where = self._values.tensors, f"{self.path}/{self._values.file}"
        require_shape(tensors.get(f"{module}.mean_{letter}"), f"{module}.mean_{letter}", (size,), where)
        if self._packed is None:
            name = f"{module}.components_{letter}"
            return require_shape(tensors.get(name), name, (None, size), where).shape[0]
        name, most = f"{module}.sv_{letter}", meta.get("num_components")
        (num_values,) = require_shape(tensors.get(name), name, (None,), where).shape
        if type(most) is not int or most < 0:
            raise FormatError(f"num_components is {str(most)[:40]}", where=f"{self.path}/{META}")
        return min(most, num_values)

    def _task(self, file: str) -> SafetensorsFile:
        task = open_tensors(self.path / file, self.path)
        for (module, side), num_directions in self._directions.items():
            name = f"{module}.loadings_{'ab'[side]}"
            require_shape(task.tensors.get(name), name, (num_directions,), f"{self.path}/{file}")
        return task


def is_vlora(folder: Path) -> bool:
    """Tell by names alone whether a folder is meant to be vLoRA's."""
    return (folder / META).is_file()


def _a_list(meta: Mapping[str, Any], key: str, where: str) -> list[object]:
    entries = meta.get(key)
    if not isinstance(entries, list):
        raise FormatError(f"{key} is not a list", where=where, rule="a folder of vLoRA lists its layers and tasks")
    return entries


def _task_files(names: tuple[str, ...], meta: Mapping[str, Any], where: str) -> list[str]:
    """The file of each task. vLoRA replaces what a file name cannot hold, so that two tasks may have been one file."""
    listed = meta.get("task_filenames", {})
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise FormatError("task_filenames does not map tasks to names", where=where)
    files: dict[str, str] = {}
    for name in names:
        file = f"task_{listed.get(name, name)}.safetensors"
        if file in files:
            raise FormatError(
                f"tasks {files[file][:100]!r} and {name[:100]!r} have one file, {file[:200]!r}",
                where=where,
                rule="the second overwrote the first, whose loadings are lost",
                next_step="save them again under names of letters, digits, '-', '_' and '.'",
            )
        files[file] = name
    return list(files)


def _opened_packed(path: Path, meta: Mapping[str, Any], where: str) -> _Packed | None:
    form = meta.get("format", "float32")
    if form == "float32":
        return None
    if form != NF4:
        raise UnsupportedError(
            f"the format is {str(form)[:60]!r}", where=where, rule=f"the readable formats are float32 and {NF4}"
        )
    block = meta.get("nf4_block_size", 64)
    if type(block) is not int or not 1 <= block <= _MOST_BLOCK:
        raise FormatError(f"nf4_block_size is {str(block)[:40]}", where=where, rule=f"it is 1 to {_MOST_BLOCK}")
    return _Packed(open_tensors(path / PACKED, path), block)


def _unpacked(packed: _Packed, module: str, letter: str, shape: tuple[int, int]) -> Tensor:
    """Read directions (K, D): two indices a byte, the high one first, each times the scale of its block."""
    names, size = (f"{module}.packed_{letter}", f"{module}.scales_{letter}"), prod(shape)
    indices, scales = (packed.file.tensors.get(name) for name in names)
    where = f"{packed.file.path}, layer {module[:200]!r}"
    if indices is None or scales is None or indices.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise FormatError(f"factor {letter} has no packed indices with their scales", where=where)
    room = 2 * prod(indices.shape)
    if len(indices.shape) != 1 or scales.shape != (room // packed.block,) or room % packed.block or size > room:
        raise FormatError(
            f"{list(indices.shape)} bytes and {list(scales.shape)} scales for directions {list(shape)}",
            where=where,
            rule=f"one byte holds two values, and {packed.block} values share one scale",
        )
    bytes_ = packed.file.read(names[0])
    levels = torch.tensor([*_BELOW, *_ABOVE])[torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten().int()]
    values = levels.view(-1, packed.block) * packed.file.read(names[1])[:, None]
    return values.flatten()[:size].view(shape)
