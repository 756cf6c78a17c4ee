"""One file of a remote store, and how a range of it is read so that a change of the file is noticed.

* s3 and http answer each range with the file's tag, which is compared with the one of the listing: no request more.
* Files of the hub are named by their commit and cannot change.
* Of any other store the file's own record is asked for again after a range was read.

A range is written into the caller's memory as it arrives; what has arrived is kept when the connection breaks.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from weakref import WeakKeyDictionary

from fsspec import AbstractFileSystem
from fsspec.asyn import sync

from eigenzoo.errors import FormatError
from eigenzoo.formats.open_files import OPEN_AGAIN
from eigenzoo.formats.remote.address import connect

CHUNK_BYTES = 2**20
UNKNOWN = -1

TAGS = (
    *("ETag", "etag", "e_tag", "generation", "md5Hash", "crc32c", "blob_id", "xet_hash", "sha", "sha256", "checksum"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "created"),
)
"""What drivers call that which changes with a file's contents; the best first."""

# Drivers without an event loop whose files may be read by several threads at once; of others one at a time is read.
_THREADED = frozenset({"hf", "memory", "file", "local"})
_turns: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_turns_lock = threading.Lock()


@dataclass(frozen=True)
class RemoteFile:
    """A file at a remote place.

    Attributes:
        source: the URL to connect by, which may hold secrets.
        path: the file, as the driver calls it.
        url: what is shown.
        size: in bytes, or UNKNOWN.
        tag: `name=value` of what changes with the contents, empty where the store says nothing.
    """

    source: str
    path: str
    url: str
    size: int
    tag: str


def tag_of(info: Mapping[str, Any]) -> str:
    """Return what a driver says of a file's version: the first of TAGS that it gives."""
    for name in TAGS:
        if info.get(name):
            # One driver gives a time now as seconds and now as a date.
            value = info[name].timestamp() if isinstance(info[name], datetime) else info[name]
            return f"{name}={value}"
    return ""


def changed(file: RemoteFile) -> FormatError:
    """Return the error of a file that is no longer the one whose header was read."""
    return FormatError(
        "the file changed since its header was read",
        where=file.url,
        rule="a model must not change while it is read",
        next_step=OPEN_AGAIN,
    )


class Answer:
    """Memory that a range is read into, and how much of it has arrived."""

    def __init__(self, file: RemoteFile, start: int, view: memoryview) -> None:
        self.file, self.start, self._view = file, start, view
        self.done = 0

    @property
    def left(self) -> int:
        """Bytes that are still missing."""
        return len(self._view) - self.done

    def take(self, data: bytes) -> None:
        """Take the next bytes."""
        if len(data) > self.left:
            raise wrong_answer(self.file, "with more bytes than were requested")
        self._view[self.done : self.done + len(data)] = data
        self.done += len(data)


def wrong_answer(file: RemoteFile, how: str) -> FormatError:
    """Return the error of a store that does not answer a range by that range."""
    return FormatError(
        f"the store answered {how}",
        where=file.url,
        rule="weights are read in byte ranges",
        next_step="if its store does not support ranges, download the file first",
    )


def read_range(answer: Answer) -> None:
    """Read what is left of a range; a store may answer less than that, and raise whatever its driver raises."""
    file = answer.file
    system = connect(file.source)
    protocols = _protocols(system)
    start, stop = answer.start + answer.done, answer.start + answer.done + answer.left
    if "s3" in protocols and hasattr(system, "call_s3"):
        _read_s3(system, answer, start, stop)
    elif "http" in protocols and hasattr(system, "set_session"):
        sync(system.loop, _read_http, system, answer, start, stop)
    else:
        with _turn(system):
            answer.take(_read_plainly(system, file.path, start, stop))
        if "hf" not in protocols:
            check_unchanged(file)


def _read_plainly(system: Any, path: str, start: int, stop: int) -> bytes:
    if type(system).cat_file is not AbstractFileSystem.cat_file:
        return bytes(system.cat_file(path, start=start, end=stop))
    # What every driver has besides reads megabytes ahead.
    with system.open(path, "rb", cache_type="none") as stream:
        stream.seek(start)
        return bytes(stream.read(stop - start))


def check_unchanged(file: RemoteFile) -> None:
    """Ask the store for the file's record, and raise if it is of another file by now."""
    info = fresh_info(file)
    name = file.tag.partition("=")[0]
    now = tag_of({name: info[name]}) if name in info else file.tag
    if info.get("size", file.size) != file.size or now != file.tag:
        raise changed(file)


def fresh_info(file: RemoteFile) -> dict[str, Any]:
    """Return what the store says of a file now."""
    system = connect(file.source)
    with _turn(system):
        system.invalidate_cache(file.path)
        return dict(system.info(file.path))


def _protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def _turn(system: Any) -> AbstractContextManager[Any]:
    if getattr(system, "async_impl", False) or _protocols(system) & _THREADED:
        return nullcontext()
    with _turns_lock:
        return _turns.setdefault(system, threading.Lock())


def _read_s3(system: Any, answer: Answer, start: int, stop: int) -> None:
    file = answer.file
    bucket, key, version = system.split_path(file.path)
    options = {"VersionId": version} if version else {}
    response = system.call_s3(
        "get_object",
        system.s3_additional_kwargs,
        system.req_kw,
        Bucket=bucket,
        Key=key,
        Range=f"bytes={start}-{stop - 1}",
        **options,
    )
    body = response["Body"]
    try:
        _check_tag(file, "ETag", response.get("ETag"))
        _check_range(file, response.get("ContentRange") or "", start, stop)
        sync(system.loop, _pour, body.read, answer)
    finally:
        body.close()


async def _read_http(system: Any, answer: Answer, start: int, stop: int) -> None:
    file = answer.file
    session = await system.set_session()
    options = dict(system.kwargs)
    # Ranges are of the file's own bytes, not of a compressed form of it.
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(file.path), headers=headers, **options) as response:
        if response.status == 404:
            raise FileNotFoundError(file.url)
        response.raise_for_status()
        for name in ("ETag", "Last-Modified"):
            _check_tag(file, name, response.headers.get(name))
        if response.status == 206:
            _check_range(file, response.headers.get("Content-Range") or "", start, stop)
        elif (start, stop) != (0, file.size):
            raise wrong_answer(file, "with the whole file instead of a range")
        await _pour(response.content.read, answer)


async def _pour(read: Callable[[int], Awaitable[bytes]], answer: Answer) -> None:
    while data := await read(CHUNK_BYTES):
        answer.take(data)


def _check_tag(file: RemoteFile, name: str, given: str | None) -> None:
    """Check the tag that came with an answer, where it is of the kind that the listing gave; stores quote it or not."""
    kind, _, value = file.tag.partition("=")
    if given and kind == name and given.removeprefix("W/").strip('"') != value.removeprefix("W/").strip('"'):
        raise changed(file)


def _check_range(file: RemoteFile, given: str, start: int, stop: int) -> None:
    """Check `bytes start-last/size` of an answer: the start is what was asked, and the size that of the listing."""
    unit, _, rest = given.partition(" ")
    span, _, total = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or first != str(start) or not last.isdecimal() or int(last) >= stop:
        raise wrong_answer(file, f"with the range {given[:60]!r} and not with bytes {start}-{stop - 1}")
    if total not in ("*", str(file.size)):
        raise changed(file)
