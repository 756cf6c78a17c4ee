"""Full weights in safetensors: a checkpoint folder, sharded or not, and a bare file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from eigenzoo.errors import FormatError, UnsafePathError
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.kinds import INDEXES, WEIGHTS
from eigenzoo.formats.model import Model, Piece, TensorInfo
from eigenzoo.formats.partitioned import refuse_partitioned
from eigenzoo.formats.paths import final_name, inside, is_regular, relative_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.side_files import list_side_files, refuse_quantised

MAX_SHARDS = 10_000


class SafetensorsModel(Model):
    """What models in one or more safetensors files have in common: reading by a tensor's name.

    Attributes:
        files: the opened files by their names.
        likeness: one object for all models that are the same but for their values; None of a model of several files.
    """

    likeness: object | None
    files: Mapping[str, SafetensorsFile]

    def take_files(self, files: Mapping[str, SafetensorsFile]) -> None:
        """Take opened files by their names; what they hold is what the model holds."""
        for file in files.values():
            refuse_partitioned(file.tensors, str(self.path))
        self.files = files
        for file in files.values():
            file.stays_open = True
        if len(files) == 1:
            (only,) = files.values()
            self.tensors, self.likeness = only.tensors, only.contents
        else:
            merged = {name: info for file in files.values() for name, info in file.tensors.items()}
            self.tensors, self.likeness = MappingProxyType(merged), None
        self.metadata = MappingProxyType({name: file.metadata for name, file in files.items()})

    def read(self, name: str) -> Tensor:
        """Read one tensor whole, in its own dtype and shape."""
        return self.file_of(name).read(name)

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read values start:stop of the flattened (row-major) tensor, converted into `out` where one is given."""
        return self.file_of(name).read_flat(name, start, stop, out)

    def read_bytes(self, pieces: Sequence[Piece]) -> None:
        """Fill the views of some pieces, those that lie side by side in a file in one call."""
        grouped: dict[SafetensorsFile, list[Piece]] = {}
        for piece in pieces:
            grouped.setdefault(self.file_of(piece[0]), []).append(piece)
        for file, own in grouped.items():
            file.read_bytes(own)

    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights, in the order of the index."""
        return tuple(file.path for file in self.files.values())

    def file_of(self, name: str) -> SafetensorsFile:
        """Return the file that holds a tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"there is no tensor {name[:200]!r}", where=str(self.path))
        return self.files[info.file]


class Checkpoint(SafetensorsModel):
    """A folder as transformers and diffusers write it: one file, or an index and its shards.

    Tied weights are simply not in the files. Quantised checkpoints are refused.

    Attributes:
        index: the name of the index, None for a single file.
    """

    format = "checkpoint"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = final_name(self.path)
        try:
            single, self.index = _weights_of(self.path)
            entries = {} if self.index is None else read_index(self.path, self.index)
            shards = (single,) if single else tuple(dict.fromkeys(entries.values()))
            carried = frozenset() if self.index is None else frozenset({self.index})
            self.take_beside(list_side_files(self.path, frozenset(shards), carried))
            refuse_quantised(self.path, self.side_files)
            files = {shard: SafetensorsFile(self.path / shard, self.path) for shard in shards}
            if self.index is not None:
                check_index(entries, {shard: file.tensors for shard, file in files.items()}, self.index)
        except FormatError as error:
            raise error.at(str(self.path)) from error.__cause__
        self.take_files(files)


class StateDict(SafetensorsModel):
    """One bare `.safetensors` file, or a folder that holds exactly one.

    A folder's known side files are carried; a file is taken alone, for its neighbours may be other models.
    """

    format = "state-dict"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            self.name = final_name(self.path)
            names = sorted(entry.name for entry in self.path.glob("*.safetensors"))
            if len(names) != 1:
                raise FormatError(
                    f"the folder has {len(names)} .safetensors files",
                    where=str(self.path),
                    rule="exactly one is expected",
                )
            file, root = names[0], self.path
        else:
            self.name = self.path.stem
            file, root = self.path.name, self.path.parent
        try:
            if self.path.is_dir():
                self.take_beside(list_side_files(self.path, frozenset({file})))
                refuse_quantised(self.path, self.side_files)
            # A single file may be a link to anywhere: its user named it.
            opened = SafetensorsFile(root / file, root if self.path.is_dir() else None)
        except FormatError as error:
            raise error.at(str(self.path)) from error.__cause__
        self.take_files({file: opened})


def _weights_of(folder: Path) -> tuple[str, str | None]:
    """Find the single weight file, or else the index."""
    singles = [name for name in WEIGHTS if (folder / name).exists()]
    indexes = [name for name in INDEXES if (folder / name).exists()]
    if len(singles) + len(indexes) != 1:
        listed = ", ".join(singles + indexes) or "none of them"
        raise FormatError(f"found {listed}", rule=f"a checkpoint has exactly one of {', '.join(WEIGHTS + INDEXES)}")
    return (singles[0], None) if singles else ("", indexes[0])


def read_index(folder: Path, index: str) -> dict[str, str]:
    """Read which shard holds which tensor; every shard is a file of this folder."""
    entries: Any = read_json(inside(folder, index), where=index).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(shard, str) for shard in entries.values()):
        raise FormatError("weight_map is not a mapping from tensors to file names", where=index)
    if not entries:
        raise FormatError("weight_map is empty", where=index)
    shards = sorted(set(entries.values()))
    if len(shards) > MAX_SHARDS:
        raise FormatError(f"the index names {len(shards)} shards", where=index, rule=f"at most {MAX_SHARDS} are read")
    for shard in shards:
        try:
            relative_name(shard)
            target = inside(folder, shard)
        except UnsafePathError as error:
            raise error.at(index) from error.__cause__
        if not is_regular(target):
            raise FormatError(f"the shard {shard!r} is missing", where=index, next_step="download it")
    return entries


def check_index(entries: Mapping[str, str], tensors: Mapping[str, Collection[str]], index: str) -> None:
    """Check that index and shards name the same tensors, each in one shard."""
    holders: dict[str, str] = {}
    for shard, names in tensors.items():
        for name in names:
            if name in holders:
                raise FormatError(f"tensor {name!r} is in two shards, {holders[name]!r} and {shard!r}", where=index)
            holders[name] = shard
    for name, shard in entries.items():
        if holders.get(name) != shard:
            raise FormatError(f"tensor {name[:200]!r} is not in its shard {shard!r}", where=index)
    unlisted = [name for name in holders if name not in entries]
    if unlisted:
        raise FormatError(f"{len(unlisted)} tensors of the shards are not listed: {_listed(unlisted)}", where=index)


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", …" if len(names) > 5 else "")


def tensors_by_file(model: Model) -> dict[str, tuple[TensorInfo, ...]]:
    """Group a model's tensors by the file that holds them, in the files' order."""
    grouped: dict[str, list[TensorInfo]] = {}
    for info in model.tensors.values():
        grouped.setdefault(info.file, []).append(info)
    return {file: tuple(infos) for file, infos in grouped.items()}
