"""One safetensors file, opened by its header and read piece by piece, without a memory map.

Reading by position into buffers that are reused is as fast warm and twice as fast cold as a map, and resident memory
stays bounded whatever the size of the zoo. Nothing is held open between two reads, but by a pass that says so (`open_files`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import FormatError, UsageError
from eigenzoo.formats import open_files
from eigenzoo.formats.model import Piece, TensorInfo
from eigenzoo.formats.paths import inside, relative_to
from eigenzoo.formats.remote.fetching import fetch
from eigenzoo.formats.remote.record import remote_file
from eigenzoo.formats.remote.values import fetch_values
from eigenzoo.formats.safetensors.header import HeaderContents, read_header
from eigenzoo.formats.safetensors.tensor_bytes import MOST_VIEWS, check_out, read_into, read_values, scatter


class SafetensorsFile:
    """The tensors of one file.

    Args:
        path: the file.
        root: the model's folder, out of which the file may not lead by links; None for a file that the user named.

    Attributes:
        file: the name relative to `root`, or the plain file name.
        tensors: what the header says, in the order of the bytes.
        metadata: the header's string metadata.
        contents: what the header says, one object for all files with the same header and size.
        stays_open: whether a pass keeps the file open between reads (`open_files`). This holds for models, but not for outputs.
        target: the file itself, its links followed.
        identity: its size and time when its header was read.
        remote: what the file is a stub of; its values are read from there, and never from the stub.
    """

    def __init__(self, path: str | Path, root: Path | None = None) -> None:
        self.path = Path(path)
        self.file = self.path.name if root is None else relative_to(self.path, root)
        self.target = self.path if root is None else inside(root, self.file)
        header = read_header(self.target, self.file)
        self.contents = header.contents
        self.tensors: Mapping[str, TensorInfo] = header.contents.tensors
        self.metadata: Mapping[str, str] = dict(header.contents.metadata)
        self.identity = (header.size, header.mtime_ns)
        self.remote = remote_file(self.target)
        self.stays_open = False

    def read(self, name: str) -> Tensor:
        """Read one tensor whole, in its own dtype and shape, into fresh memory."""
        info = self._info(name)
        out = torch.empty(info.shape, dtype=info.dtype)
        self.read_flat(name, 0, out.numel(), out.view(-1))
        return out

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read values start:stop of the flattened (row-major) tensor.

        Args:
            name: the tensor.
            start: the first value.
            stop: one past the last value.
            out: 1-D contiguous tensor of stop - start values that is filled and returned; another dtype converts.
        """
        position, dtype = self.locate(name, start, stop)
        if out is None:
            out = torch.empty(stop - start, dtype=dtype)
        check_out(out, stop - start)
        if self.remote is not None:
            fetch_values([(self.remote, position, dtype, out)])
            return out
        with self._opened() as file:
            read_values(file, position, dtype, out, self._where(name))
        return out

    def read_bytes(self, pieces: Sequence[Piece]) -> None:
        """Fill the views of some pieces, those that lie side by side in one call."""
        wanted = []
        for name, start, view in pieces:
            count = len(view) // self._info(name).dtype.itemsize
            wanted.append((self.locate(name, start, start + count)[0], name, view))
        if self.remote is not None:
            fetch([(self.remote, position, view) for position, _, view in wanted])
            return
        wanted.sort(key=lambda piece: piece[0])
        with self._opened() as file:
            for row in _side_by_side(wanted):
                if not scatter(file, row[0][0], [view for _, _, view in row]):
                    for position, name, view in row:
                        read_into(file, position, view, self._where(name))

    def seen_as(self, contents: HeaderContents) -> SafetensorsFile:
        """Return the same file under another view of its contents: other names, or parts of tensors."""
        seen = copy.copy(self)
        seen.contents, seen.tensors = contents, contents.tensors
        return seen

    def read_scalars(self, names: Sequence[str]) -> list[float]:
        """Read tensors of one value each as numbers: the file is opened once, and a remote one is asked once."""
        values = torch.empty(len(names), dtype=torch.float64)
        wanted = [(*self.locate(name, 0, 1), values[index : index + 1]) for index, name in enumerate(names)]
        if self.remote is not None:
            fetch_values([(self.remote, position, dtype, out) for position, dtype, out in wanted])
        elif wanted:
            with self._opened() as file:
                for name, (position, dtype, out) in zip(names, wanted, strict=True):
                    read_values(file, position, dtype, out, self._where(name))
        return values.tolist()

    def locate(self, name: str, start: int, stop: int) -> tuple[int, torch.dtype]:
        """Return the byte in the file at which values start:stop of a tensor begin, and their dtype."""
        info = self._info(name)
        position, num_values = self.contents.positions[name]
        if not 0 <= start <= stop <= num_values:
            raise UsageError(f"values {start}:{stop} of a tensor of {num_values}", where=self._where(name))
        return position + start * info.dtype.itemsize, info.dtype

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"there is no tensor {name[:200]!r}", where=str(self.path))
        return info

    def _where(self, name: str) -> str:
        return f"{self.file}, tensor {name!r}"

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        assert self.remote is None, "values of a stub are zeros"
        file_open = open_files.find(self.target, self.identity)
        if file_open is not None:
            yield file_open
            return
        try:
            file = FileIO(self.target, "rb")
        except OSError as error:
            raise FormatError(f"cannot be read any more ({error.strerror})", where=str(self.path)) from error
        taken = False
        try:
            open_files.check_identity(file, self.identity, self.path)
            taken = self.stays_open and open_files.keep(self.target, file, self.identity)
            yield file
        finally:
            if not taken:
                file.close()


def _side_by_side(wanted: Sequence[tuple[int, str, memoryview]]) -> Iterator[list[tuple[int, str, memoryview]]]:
    """Cut what is read, in the order of its bytes, where the next one does not follow on the last."""
    row: list[tuple[int, str, memoryview]] = []
    end = 0
    for piece in wanted:
        if row and (piece[0] != end or len(row) == MOST_VIEWS):
            yield row
            row = []
        row.append(piece)
        end = piece[0] + len(piece[2])
    if row:
        yield row
