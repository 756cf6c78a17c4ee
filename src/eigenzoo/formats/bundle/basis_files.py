"""The tensors of a subspace's bases: one safetensors file, or several where they are large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import BundleError
from eigenzoo.formats.bundle.manifest import FileRecord
from eigenzoo.formats.model import TensorInfo
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.writer import SafetensorsWriter

SHARD_BYTES = 4 * 2**30
"""A shard is closed when it has passed this size; a layer's tensors may make it longer."""

PART_BYTES = 160
"""What a tensor takes in a header besides its name, at most."""


def shard_name(number: int) -> str:
    """Name the shards: basis.safetensors, basis-00002.safetensors, …"""
    return "basis.safetensors" if number == 0 else f"basis-{number + 1:05d}.safetensors"


def header_room(layers: Sequence[str], parts: int) -> int:
    """Bytes that are reserved for the header of a shard of layers with at most `parts` tensors each."""
    return 256 + sum(parts * (PART_BYTES + len(name.encode())) for name in layers)


class BasisWriter:
    """Write the tensors of many layers into shards in a folder, one layer after the other."""

    def __init__(self, folder: Path, layers: Sequence[str], parts: int = 6, *, resume: bool = False) -> None:
        self.folder, self._resume = folder, resume
        self._capacity = header_room(layers, parts)
        self._shards: list[SafetensorsWriter] = []
        self._bytes = 0
        self._shard_of: dict[str, SafetensorsWriter] = {}
        self._begun: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def tensors_of(self, layer: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return the tensors of one layer in the order in which they were begun."""
        return [(name, *entry) for name, entry in self._begun.items() if name.rpartition("/")[0] == layer]

    def sizes(self) -> list[tuple[str, int]]:
        """Return the shards begun so far, and how many bytes of each are taken."""
        return [(shard.path.name, shard.end) for shard in self._shards]

    def adopt(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Count a tensor in whose values an interrupted writer has left in its place."""
        self._shard(name, dtype, shape).adopt(name, dtype, shape)

    def append(self, name: str, tensor: Tensor) -> None:
        """Write a tensor whole."""
        self.begin(name, tensor.dtype, tuple(tensor.shape))
        self.write_flat(name, 0, tensor.reshape(-1))

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Make room for a tensor that is written block by block."""
        self._shard(name, dtype, shape).begin(name, dtype, shape)

    def _shard(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> SafetensorsWriter:
        """Return the shard that takes the next tensor; a new one where the last has passed its size."""
        if not self._shards or self._bytes > SHARD_BYTES:
            path = self.folder / shard_name(len(self._shards))
            self._shards.append(SafetensorsWriter(path, self._capacity, resume=self._resume))
            self._bytes = 0
        self._shard_of[name], self._begun[name] = self._shards[-1], (dtype, shape)
        self._bytes += dtype.itemsize * torch.Size(shape).numel()
        return self._shards[-1]

    def write_flat(self, name: str, start: int, tensor: Tensor) -> None:
        """Write a run of a tensor that was begun."""
        self._shard_of[name].write_flat(name, start, tensor)

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read back a run of what was written."""
        return self._shard_of[name].read_flat(name, start, stop, out)

    def finish(self) -> BasisFiles:
        """Write the headers and open what was written."""
        if not self._shards:
            self._shards.append(SafetensorsWriter(self.folder / shard_name(0), 64))
        records = {
            shard.path.name: FileRecord(sha256=shard.finish(), bytes=shard.path.stat().st_size)
            for shard in self._shards
        }
        return BasisFiles([shard.path for shard in self._shards], records=records)

    def close(self) -> None:
        """Close the files of an unfinished fit."""
        for shard in self._shards:
            shard.close()


class BasisFiles:
    """Read the tensors of bases from their shards, on demand.

    Attributes:
        paths: the shards.
        records: bytes and checksums of the shards by their names; only of those that were just written.
    """

    def __init__(
        self, paths: Sequence[Path], root: Path | None = None, *, records: Mapping[str, FileRecord] | None = None
    ) -> None:
        self.paths, self.records = tuple(paths), dict(records or {})
        self._shard_of: dict[str, SafetensorsFile] = {}
        self._parts: dict[str, dict[str, TensorInfo]] = {}
        for path in self.paths:
            shard = SafetensorsFile(path, root)
            for name, info in shard.tensors.items():
                if name in self._shard_of:
                    raise BundleError(f"tensor {name!r} occurs in two shards", where=str(path))
                self._shard_of[name] = shard
                layer, _, part = name.rpartition("/")
                self._parts.setdefault(layer, {})[part] = info

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its header."""
        return self._shard(name).tensors[name].shape

    def dtypes(self, layer: str) -> dict[str, torch.dtype]:
        """The dtypes of the tensors of one layer, from their headers, by the last part of their names."""
        return {part: info.dtype for part, info in self._parts.get(layer, {}).items()}

    def num_bytes(self, layer: str) -> int:
        """Bytes of the tensors of one layer."""
        return sum(info.nbytes for info in self._parts.get(layer, {}).values())

    def read(self, name: str) -> Tensor:
        """Read a tensor whole."""
        return self._shard(name).read(name)

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read a run of a flattened tensor."""
        return self._shard(name).read_flat(name, start, stop, out)

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self._shard_of:
            raise BundleError(
                f"the basis has no tensor {name!r}", where=str(self.paths[0].parent), rule="see docs/bundle-format.md"
            )
        return self._shard_of[name]
