"""What every format gives: one model on disk, opened by its headers, read piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from eigenzoo.errors import FormatError
from eigenzoo.formats.paths import MAX_SIDE_BYTES, inside, read_bounded
from eigenzoo.formats.remote.fetching import fetch_whole
from eigenzoo.formats.remote.record import remote_file
from eigenzoo.formats.side_files import Beside

MAX_NAME = 1024
"""Characters of a layer's or a model's name in the manifest of a bundle."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: its name, dtype, shape, and the file of the model that holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


Parts = tuple[tuple[str, int], ...]
"""The parts that a tensor is cut into along its outputs, in order: their names and numbers of rows."""


Piece = tuple[str, int, memoryview]
"""A tensor's name, the first value that is read of it, and what its bytes are read into, in the tensor's own dtype."""


def part_name(tensor: str, part: str) -> str:
    """Return what a part of a tensor is called."""
    return f"{tensor}.{part}"


@dataclass(frozen=True)
class LoraUpdate:
    """Where the two factors of one LoRA update lie: ΔW = scale · B · A, with A (rank, inputs), B (outputs, rank).

    `shape` is (outputs, inputs) of ΔW with a convolution's kernel folded into its inputs; `factor_shapes` are A's and
    B's own shapes on disk. `scale` is what PEFT multiplies by when it merges. `key_alpha` is the tensor that says it, where
    the file has one: α = scale · rank.
    """

    module: str
    key_a: str
    key_b: str
    shape: tuple[int, int]
    rank: int
    scale: float
    factor_shapes: tuple[tuple[int, ...], tuple[int, ...]]
    key_alpha: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        """The tensors that this update is made of."""
        return frozenset({self.key_a, self.key_b, *([] if self.key_alpha is None else [self.key_alpha])})


class Model(ABC):
    """One model on disk. Opening reads headers and configs only; values are read when they are asked for.

    Attributes:
        format: the kind of files that it lies in.
        name: what the zoo calls it (its folder's or file's name until the zoo decides).
        path: the folder, or the single file.
        tensors: every tensor in the files, by its name there.
        metadata: per file, the header's string metadata.
        beside: what lies beside the weights; nothing for a single file, whose neighbours may be other models.
        warnings: what opening it decided and a reader of any result must know.
        config: an adapter's config; None for full weights.
        splits: the tensors of the files that are cut into parts (`formats.splitting`), whose names are among `tensors`.
        names: of tensors that are seen under other names (`formats.renaming`), those in the files.
    """

    format: str
    name: str
    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Mapping[str, str]]
    beside: Beside = Beside()
    warnings: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    splits: Mapping[str, Parts] = MappingProxyType({})
    names: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read one tensor whole, in its own dtype and shape."""

    @abstractmethod
    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read values start:stop of the flattened (row-major) tensor, converted into `out` where one is given."""

    def read_bytes(self, pieces: Sequence[Piece]) -> None:
        """Fill the views of some pieces. Pieces that lie side by side in a file of safetensors are read in one call."""
        for name, start, view in pieces:
            if view:
                out = torch.frombuffer(view, dtype=self.tensors[name].dtype)
                self.read_flat(name, start, start + out.numel(), out)

    @abstractmethod
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights, in a fixed order."""

    @property
    def folder(self) -> Path:
        """The folder that side files lie in."""
        return self.path if self.path.is_dir() else self.path.parent

    def take_beside(self, beside: Beside) -> None:
        """Take what lies beside the weights, and say what a user must do to have a file carried."""
        self.beside = beside
        self.warnings += beside.notes

    @property
    def side_files(self) -> tuple[str, ...]:
        """The files beside the weights that a rebuilt model carries along (configs, tokenizers)."""
        return self.beside.carried

    @property
    def ignored_files(self) -> tuple[str, ...]:
        """The files that are seen and not carried."""
        return self.beside.ignored

    def read_side_file(self, file: str) -> bytes:
        """Read one of `side_files` whole."""
        if file not in self.side_files:
            raise FormatError(f"there is no side file {file[:100]!r}", where=str(self.path))
        path = inside(self.folder, file)
        remote = remote_file(path)
        return fetch_whole(remote) if remote else read_bounded(path, MAX_SIDE_BYTES, where=f"{self.path}, {file}")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(path.stat().st_size for path in self.weight_files())

    @property
    def updates(self) -> Mapping[str, LoraUpdate]:
        """The LoRA updates by module; empty for a model of full weights."""
        return MappingProxyType({})

    def read_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Read B (outputs, rank) and A (rank, inputs) of one update in their own dtype, the scale not applied."""
        update = self.updates[module]
        outputs, inputs = update.shape
        return self.read(update.key_b).reshape(outputs, update.rank), self.read(update.key_a).reshape(
            update.rank, inputs
        )

    @property
    def other_tensors(self) -> tuple[str, ...]:
        """The tensors that are no part of an update."""
        parts = {key for update in self.updates.values() for key in update.keys}
        return tuple(name for name in self.tensors if name not in parts)
