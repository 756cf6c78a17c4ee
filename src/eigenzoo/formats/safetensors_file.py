"""One safetensors file, opened by its header and read piece by piece, without a memory map.

Reading by position into buffers that are reused is as fast warm and twice as fast cold as a map, and resident memory
stays bounded whatever the size of the zoo. Nothing is held open between two reads: a zoo has hundreds of files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import FormatError, UsageError
from eigenzoo.formats.model import TensorInfo
from eigenzoo.formats.paths import inside
from eigenzoo.formats.safetensors_header import read_header
from eigenzoo.formats.tensor_bytes import check_out, read_values


class SafetensorsFile:
    """The tensors of one file.

    Args:
        path: the file.
        root: the model's folder, out of which the file may not lead by links; None for a file that the user named.

    Attributes:
        file: the name relative to `root`, or the plain file name.
        tensors: what the header says, in the order of the bytes.
        metadata: the header's string metadata.
    """

    def __init__(self, path: str | Path, root: Path | None = None) -> None:
        self.path = Path(path)
        self.file = self.path.name if root is None else self.path.relative_to(root).as_posix()
        self._target = self.path if root is None else inside(root, self.file)
        header = read_header(self._target, self.file)
        self.tensors: Mapping[str, TensorInfo] = header.tensors
        self.metadata: Mapping[str, str] = header.metadata
        self._offsets = header.offsets
        self._identity = (header.size, header.mtime_ns)

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
        info = self._info(name)
        if not 0 <= start <= stop <= prod(info.shape):
            raise UsageError(f"values {start}:{stop} of a tensor of {prod(info.shape)}", where=self._where(name))
        if out is None:
            out = torch.empty(stop - start, dtype=info.dtype)
        check_out(out, stop - start)
        with self._opened() as file:
            position = self._offsets[name] + start * info.dtype.itemsize
            read_values(file, position, info.dtype, out, self._where(name))
        return out

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"no tensor {name[:200]!r}", where=str(self.path))
        return info

    def _where(self, name: str) -> str:
        return f"{self.file}, tensor {name!r}"

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        try:
            file = FileIO(self._target, "rb")
        except OSError as error:
            raise FormatError(f"cannot be read any more ({error.strerror})", where=str(self.path)) from error
        with file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != self._identity:
                raise FormatError(
                    "the file changed since its header was read",
                    where=str(self.path),
                    rule="models are not written to while they are read",
                    next_step="open the zoo again",
                )
            yield file
