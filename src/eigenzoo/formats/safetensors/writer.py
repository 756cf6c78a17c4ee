"""A safetensors file written as its tensors come, block by block where they are large.

Space for the header is reserved first and padded with blanks, which the format allows. The format forbids holes, so a
tensor begins where the last one ended: the first is aligned to 8 bytes, and the others keep the alignment of their
dtype as long as wider dtypes are written before narrower ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from eigenzoo.errors import OutputError, UsageError
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.header import MAX_HEADER_BYTES, METADATA_KEY
from eigenzoo.formats.safetensors.tensor_bytes import check_out, read_values, value_bytes, write_bytes, write_values

GATHERED_BYTES = 4 * 2**20
"""Tensors of a file are gathered into writes of about this size: a call for each small tensor costs more than its bytes."""

Entry = tuple[str, torch.dtype, Sequence[int]]
"""A tensor's name, dtype and shape."""


def header_bytes(tensors: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Give the header of a file that holds these tensors in this order."""
    entries: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    try:
        return json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("a name or metadata is not valid text", rule="lone surrogates cannot be written") from error


def _padded_header(tensors: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    header = header_bytes(tensors, metadata)
    return header + b" " * (
        -len(header) % 8
    )  # the format allows blanks, and values then begin at a multiple of 8 bytes


def file_bytes(tensors: Sequence[Entry], metadata: Mapping[str, str]) -> int:
    """Return how long a file of these tensors is."""
    return 8 + len(_padded_header(tensors, metadata)) + sum(prod(shape) * dtype.itemsize for _, dtype, shape in tensors)


def write_file(
    path: Path, tensors: Sequence[Entry], values: Iterable[Tensor], metadata: Mapping[str, str], *, sync: bool
) -> None:
    """Write a file of known tensors from its first byte to its last, and flush it to the disk (with `sync`).

    Args:
        path: the file, which must not exist.
        tensors: in the order of their bytes.
        values: the tensors, in that order, in the dtypes and shapes that `tensors` says.
        metadata: the header's string metadata.

    Raises OutputError where the file cannot be made or written. Memory: `GATHERED_BYTES` and one tensor.
    """
    names = [name for name, _, _ in tensors]
    if len({*names, METADATA_KEY}) <= len(names):
        raise UsageError("two tensors have the same name", where=str(path))
    header = _padded_header(tensors, metadata)
    if len(header) > MAX_HEADER_BYTES:
        raise UsageError(f"the header has {len(header)} bytes", rule=f"headers have 1 to {MAX_HEADER_BYTES} bytes")
    with _created(path, "xb") as file:
        gathered, position = bytearray(len(header).to_bytes(8, "little") + header), 0
        for tensor in values:
            data = value_bytes(tensor)
            if len(gathered) + len(data) <= GATHERED_BYTES:
                gathered += data
                continue
            with _writing(path):
                position = write_bytes(file, write_bytes(file, position, gathered), data)
            gathered.clear()
        with _writing(path):
            write_bytes(file, position, gathered)
            if sync:
                os.fsync(file.fileno())


def _created(path: Path, mode: str) -> FileIO:
    try:
        return FileIO(path, mode)
    except OSError as error:
        raise OutputError(f"cannot be created ({error.strerror})", where=str(path)) from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=str(path)) from error


class _Written:
    """Which values of one tensor have been written: disjoint intervals, sorted."""

    def __init__(self) -> None:
        self.intervals: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def add(self, start: int, stop: int) -> None:
        if start == stop:
            return
        with self._lock:
            first = bisect_left(self.intervals, start, key=lambda interval: interval[1])
            last = first
            while last < len(self.intervals) and self.intervals[last][0] <= stop:
                start, stop = min(start, self.intervals[last][0]), max(stop, self.intervals[last][1])
                last += 1
            self.intervals[first:last] = [(start, stop)]

    def covers(self, count: int) -> bool:
        return count == 0 or self.intervals == [(0, count)]


class SafetensorsWriter:
    """Write one file; `finish` makes it valid. Used as a context, it closes the file whatever happens.

    Args:
        path: the file, which must not exist.
        capacity: bytes reserved for the header; `header_bytes` computes what a known set of tensors needs, and
            128 + the name's length per tensor is ample.
        metadata: the header's string metadata as far as it is known, so that its bytes are counted from the start.
        resume: go on with an unfinished file of the same capacity where there is one; `adopt` says what is in it.
    """

    def __init__(
        self, path: str | Path, capacity: int, metadata: Mapping[str, str] | None = None, *, resume: bool = False
    ) -> None:
        self.path = Path(path)
        self.capacity = capacity + (-capacity) % 8
        if not 0 < self.capacity <= MAX_HEADER_BYTES:
            raise UsageError(f"the header has {capacity} bytes", rule=f"headers have 1 to {MAX_HEADER_BYTES} bytes")
        self._tensors: dict[str, tuple[str, torch.dtype, tuple[int, ...]]] = {}
        self._offsets: dict[str, int] = {}
        self._written: dict[str, _Written] = {}
        self._end = 8 + self.capacity
        self._metadata = dict(metadata or {})
        self._header_size = len(header_bytes([], self._metadata))
        self._file = _created(self.path, "r+b" if resume and self.path.is_file() else "x+b")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; without `finish` before it, it stays invalid."""
        self._file.close()

    @property
    def end(self) -> int:
        """The byte at which the next tensor begins."""
        return self._end

    def append(self, name: str, tensor: Tensor) -> None:
        """Write one tensor whole."""
        self.begin(name, tensor.dtype, tuple(tensor.shape))
        self.write_flat(name, 0, tensor.reshape(-1))

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Reserve the place of a tensor that `write_flat` fills."""
        if name in self._tensors or name == METADATA_KEY:
            raise UsageError(f"the tensor name {name!r} is taken", where=str(self.path))
        entry = (name, dtype, tuple(shape))
        nbytes = prod(shape) * dtype.itemsize
        size = self._header_size + self._entry_size(entry)
        if size > self.capacity:
            raise UsageError(
                f"tensor {name!r} does not fit into the {self.capacity} bytes reserved for the header",
                where=str(self.path),
                next_step="reserve more bytes for the header",
            )
        self._header_size = size
        self._tensors[name] = entry
        self._offsets[name] = self._end
        self._written[name] = _Written()
        self._end += nbytes

    def adopt(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Reserve the place of a tensor whose values are there already, from before the file was opened again."""
        self.begin(name, dtype, shape)
        self._written[name].add(0, prod(shape))

    def write_flat(self, name: str, start: int, values: Tensor) -> None:
        """Write values at position `start` of the flattened (row-major) tensor, in the tensor's own dtype."""
        dtype, stop = self._range(name, start, start + values.numel())
        if values.dtype != dtype:
            raise UsageError(f"{values.dtype} values for a tensor of {dtype}", where=f"{self.path.name}, {name!r}")
        with _writing(self.path):
            write_values(self._file, self._offsets[name] + start * dtype.itemsize, values)
        self._written[name].add(start, stop)

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read back values start:stop of a tensor that has been written."""
        dtype, stop = self._range(name, start, stop)
        if out is None:
            out = torch.empty(stop - start, dtype=dtype)
        check_out(out, stop - start)
        read_values(self._file, self._offsets[name] + start * dtype.itemsize, dtype, out, f"{self.path.name}, {name!r}")
        return out

    def finish(self, metadata: Mapping[str, str] | None = None) -> str:
        """Write the header, with `metadata` instead of what was given at first; flush to the disk, and close.

        Returns the SHA-256 of the file, taken while the disk is busy. The header comes first and is known last, so it cannot be
        taken earlier.
        """
        for name, (_, _, shape) in self._tensors.items():
            if not self._written[name].covers(prod(shape)):
                raise UsageError(f"tensor {name!r} has values that were never written", where=str(self.path))
        header = header_bytes(list(self._tensors.values()), self._metadata if metadata is None else metadata)
        if len(header) > self.capacity:
            raise UsageError(
                f"header and metadata take {len(header)} bytes, but {self.capacity} are reserved",
                where=str(self.path),
                next_step="reserve more bytes for the header",
            )
        with _writing(self.path):
            self._file.seek(0)
            self._file.write(self.capacity.to_bytes(8, "little") + header.ljust(self.capacity))
            self._file.truncate(self._end)
            with ThreadPoolExecutor(1, "eigenzoo-flush") as pool:
                # Not earlier: while a file is flushed, writing more of it takes several times as long (ext4, measured).
                flushed = pool.submit(os.fsync, self._file.fileno())
                self._file.seek(0)
                digest = hashlib.file_digest(self._file, "sha256").hexdigest()
            flushed.result()
        self.close()
        return digest

    def _entry_size(self, entry: tuple[str, torch.dtype, tuple[int, ...]]) -> int:
        """Bytes that one more tensor adds to the header, its offsets as they will be and a comma included."""
        start = self._end - 8 - self.capacity
        stop = start + prod(entry[2]) * entry[1].itemsize
        comma = self._header_size > 2
        return len(header_bytes([entry], {})) - 2 + comma + len(f"{start}{stop}") - len(f"0{stop - start}")

    def _range(self, name: str, start: int, stop: int) -> tuple[torch.dtype, int]:
        if name not in self._tensors:
            raise UsageError(f"no tensor {name!r} was begun", where=str(self.path))
        _, dtype, shape = self._tensors[name]
        if not 0 <= start <= stop <= prod(shape):
            raise UsageError(f"values {start}:{stop} of a tensor of {prod(shape)}", where=f"{self.path.name}, {name!r}")
        return dtype, stop
