"""The header of a safetensors file, read and checked before any memory is taken for its tensors.

The format: 8 bytes little-endian header length, a JSON object `{name: {dtype, shape, data_offsets}}` with an optional
`__metadata__` of strings, then the values. The library checks offsets, overlaps and truncation; checked here, before
and besides: the size of the header, the number of tensors, duplicate keys, and dtypes that torch lacks.

All of that follows from the header's bytes and the size of the file. Adapters of one training agree in both, and what was found of
the first of them holds for the others: each file's header is read, and parsed and checked once for as long as a model refers to it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

from safetensors import SafetensorError, safe_open

from eigenzoo.errors import FormatError
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.model import TensorInfo
from eigenzoo.formats.safetensors.dtypes import dtype_of
from eigenzoo.formats.stand_ins import START_BYTES, refuse_stand_in

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 200_000
METADATA_KEY = "__metadata__"
_MAX_NUMEL = 2**62
_FIRST_READ = 2**14
"""Bytes that are read at first: most adapters' headers are shorter."""


@dataclass(frozen=True, eq=False)
class HeaderContents:
    """What a header says: one object for all files that agree in its bytes, in size and in name.

    Attributes:
        tensors: in the order of their bytes.
        positions: the first byte in the file and the number of values of each tensor.
        metadata: the strings besides.
        made_of: what these contents are another view of: a view is known for as long as what it shows.
    """

    tensors: Mapping[str, TensorInfo]
    positions: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]
    made_of: HeaderContents | None = None


@dataclass(frozen=True)
class SafetensorsHeader:
    """A file's header, with the file's size and time when it was read."""

    contents: HeaderContents
    size: int
    mtime_ns: int


_cached: WeakValueDictionary[tuple[str, int, bytes], HeaderContents] = WeakValueDictionary()


def read_header(path: Path, file: str) -> SafetensorsHeader:
    """Read and check the header of `path`, which the model calls `file`.

    Raises FormatError for whatever the format forbids. Time and memory go with the header, never with the values.
    """
    status = _regular_status(path, file)
    data = _header_bytes(path, file, status)
    key = file, status.st_size, hashlib.sha256(data).digest()
    contents = _cached.get(key)
    if contents is None:
        contents = _checked_contents(path, file, data, status)
        _cached[key] = contents
    return SafetensorsHeader(contents, status.st_size, status.st_mtime_ns)


def _checked_contents(path: Path, file: str, data: bytes, status: os.stat_result) -> HeaderContents:
    document = parse_json(data, where=file)
    metadata = _metadata(document.pop(METADATA_KEY, {}), file)
    start = 8 + len(data)
    entries = [_tensor(name, entry, file) for name, entry in document.items()]
    entries.sort(key=lambda entry: entry[1:])
    _validate_by_library(path, file)
    _refuse_changed(_regular_status(path, file), status, file)
    _require_contiguous(entries, status.st_size - start, file)
    return HeaderContents(
        tensors=MappingProxyType({info.name: info for info, _, _ in entries}),
        positions=MappingProxyType({info.name: (start + begin, prod(info.shape)) for info, begin, _ in entries}),
        metadata=metadata,
    )


def _regular_status(path: Path, file: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=file) from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("not a regular file", where=file)
    return status


def _refuse_changed(now: os.stat_result, then: os.stat_result, file: str) -> None:
    if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
        raise FormatError("the file changed while its header was read", where=file)


def _header_bytes(path: Path, file: str, status: os.stat_result) -> bytes:
    """Read the header of a plain file, which is still the one that was looked at."""
    if status.st_size < 8:
        raise FormatError(f"the file has {status.st_size} bytes", where=file, rule="a safetensors file has at least 8")
    try:
        with open(path, "rb", buffering=0) as stream:
            beginning = stream.read(_FIRST_READ)
            length = int.from_bytes(beginning[:8], "little")
            if beginning[8:9] != b"{":
                refuse_stand_in(beginning[:START_BYTES], file)
            if length > MAX_HEADER_BYTES:
                raise FormatError(
                    f"the header has {length} bytes",
                    where=file,
                    rule=f"headers up to {MAX_HEADER_BYTES} bytes are read",
                )
            if 8 + length > status.st_size:
                raise FormatError(f"the header has {length} bytes, but the file has {status.st_size}", where=file)
            data = beginning[8 : 8 + length]
            while len(data) < length and (more := stream.read(length - len(data))):
                data += more
            _refuse_changed(os.fstat(stream.fileno()), status, file)
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=file) from error
    if len(data) != length:
        raise FormatError("the file changed while its header was read", where=file)
    if data[:1] != b"{":
        raise FormatError("the header is not a JSON object", where=file, rule="this is not a safetensors file")
    # Counted in the bytes: a million empty tensors cost a gigabyte once they are objects.
    if data.count(b'"dtype"') > MAX_TENSORS:
        raise FormatError(
            f"the header lists more than {MAX_TENSORS} tensors", where=file, rule="no model has that many"
        )
    return data


def _metadata(value: Any, file: str) -> dict[str, str]:
    if value is None:  # as mlx writes it where there are no strings, and as the library reads it
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{METADATA_KEY} is not a mapping of strings", where=file)
    return value


def _tensor(name: str, entry: Any, file: str) -> tuple[TensorInfo, int, int]:
    """Check one header entry; gives the tensor and its first and last byte among the values."""
    where = f"{file}, tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("the header entry does not have exactly dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise FormatError("its dtype is not a string", where=where)
    if not is_shape(shape):
        raise FormatError("its shape is not a list of sizes", where=where)
    if not _are_counts(offsets) or len(offsets) != 2:
        raise FormatError("its data_offsets are not a pair of byte positions", where=where)
    try:
        info = TensorInfo(name, dtype_of(dtype), tuple(shape), file)
    except FormatError as error:
        raise error.at(where) from None
    if offsets[1] - offsets[0] != info.nbytes:
        raise FormatError(
            f"its data_offsets cover {offsets[1] - offsets[0]} bytes, but {dtype} {tuple(shape)} takes {info.nbytes}",
            where=where,
        )
    return info, offsets[0], offsets[1]


def is_shape(value: Any) -> bool:
    """Tell whether a JSON value is a shape that a tensor can have."""
    # Sizes of zero hide the others from the product, and torch computes strides of all of them.
    return _are_counts(value) and prod([size or 1 for size in value]) <= _MAX_NUMEL


def _are_counts(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 64:
        return False
    # bool is an int to Python and no number to the library: type() and not isinstance. A plain loop, since a zoo
    # has hundreds of thousands of entries and a generator for each of them doubles the time to open it.
    for item in value:  # noqa: SIM110
        if type(item) is not int or item < 0:
            return False
    return True


def _validate_by_library(path: Path, file: str) -> None:
    """Let safetensors itself check offsets, overlaps, holes and truncation."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        MemoryError,
    ) as error:  # a file larger than can be mapped
        raise FormatError(
            f"the safetensors library refuses it ({str(error)[:300]})",
            where=file,
            next_step="download or save the file again",
        ) from error


def _require_contiguous(entries: list[tuple[TensorInfo, int, int]], num_bytes: int, file: str) -> None:
    """Require of these very entries, since the library reads the file for itself, that one follows on another to the file's end."""
    end = 0
    for info, begin, stop in entries:
        if begin != end:
            raise FormatError(f"{info.name[:200]!r} begins at byte {begin} of the values instead of {end}", where=file)
        end = stop
    if end != num_bytes:
        raise FormatError(f"the file has {num_bytes} bytes of values, but the header states {end}", where=file)
