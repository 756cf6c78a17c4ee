"""Which local files are stubs, and of what: a record beside them that every reader asks first.

A record is believed in the cache folder only. Anywhere else (a mirror that was copied, a cache that was moved, a folder that
a stranger made) a stub is refused and never read as the zeros that it holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenzoo.errors import FormatError
from eigenzoo.formats.cache_folder import VARIABLE, cache_folder
from eigenzoo.formats.json_file import MAX_CONFIG_BYTES, read_json
from eigenzoo.formats.paths import RECORD_FILE
from eigenzoo.formats.remote.address import shown_url
from eigenzoo.formats.remote.hub_id import hub_url
from eigenzoo.formats.remote.source import RemoteFile

VERSION = 1

_BY_URL = "open the model by its URL"


@dataclass(frozen=True)
class Entry:
    """A file of a mirror: what it mirrors, how many of its first bytes are held, and their hash."""

    file: RemoteFile
    stored: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return what is kept of it; the URL to connect by without its secrets."""
        file = self.file
        return {
            "source": shown_url(file.source),
            "path": shown_url(file.path) if "://" in file.path else file.path,
            "url": file.url,
            "bytes": file.size,
            "tag": file.tag,
            "secret": shown_url(file.source) != file.source,
            "held": self.stored,
            "sha256": self.sha256,
        }


# What this process has mirrored itself, with the secrets of its URLs.
_own: dict[str, RemoteFile] = {}


def mirror_folder() -> Path:
    """Return the folder that holds all mirrors."""
    return cache_folder() / "remote"


def remember(path: Path, file: RemoteFile) -> None:
    """Note that a stub stands for a file, for as long as this process lives."""
    _own[os.path.realpath(path)] = file


def write_record(folder: Path, url: str, entries: Mapping[str, Entry]) -> None:
    """Write the record of a folder of a mirror."""
    files = {name: entry.to_json() for name, entry in entries.items()}
    text = json.dumps({"version": VERSION, "url": url, "files": files}, indent=1)
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")


def read_record(folder: Path) -> tuple[str, dict[str, Entry]] | None:
    """Read the record of a folder of a mirror; None where there is none, or not one of this version."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    document = read_json(path, where=str(path), max_bytes=MAX_CONFIG_BYTES)
    if document.get("version") != VERSION:
        return None
    try:
        return document["url"], {name: _entry(item) for name, item in document["files"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise FormatError(
            "the record of a mirror is damaged", where=str(path), next_step=f"remove its folder, and {_BY_URL}"
        ) from error


def _entry(item: Mapping[str, Any]) -> Entry:
    # A source that must be opened with secrets, which no record keeps, opens nothing.
    source = "" if item["secret"] else item["source"]
    file = RemoteFile(source, item["path"], item["url"], item["bytes"], item["tag"])
    return Entry(file, item["held"], item["sha256"])


def remote_file(path: Path) -> RemoteFile | None:
    """Return what a local file is a stub of; None for a file that holds its own bytes.

    Raises FormatError for a stub that no record in the cache folder explains.
    """
    real = os.path.realpath(path)
    if real in _own:
        return _own[real]
    folder = Path(real).parent
    if not os.path.isfile(folder / RECORD_FILE):
        return None
    if not folder.is_relative_to(os.path.realpath(mirror_folder())):
        raise FormatError(
            "this is a mirror of a remote model, without its values",
            where=str(path),
            rule=f"a mirror is read only in the cache folder, here {str(cache_folder())!r}",
            next_step=f"{_BY_URL}, or set {VARIABLE} to the cache folder that contains it",
        )
    record = read_record(folder)
    entry = record[1].get(Path(real).name) if record else None
    if entry is None:
        raise FormatError("is not a file of this mirror", where=str(path), next_step=_BY_URL)
    if entry.stored == entry.file.size:
        return None
    if not entry.file.source:
        raise FormatError(
            "the URL of this mirror held credentials, which are not stored",
            where=entry.file.url,
            next_step=_BY_URL,
        )
    return entry.file


def remote_url(path: Path) -> str | None:
    """Return the URL of a mirrored model, a folder or a file, without secrets; None for a model of this machine."""
    # As text: this is asked several times of each of hundreds of models, and making paths would take most of it.
    name, mirrors = os.path.realpath(path), os.path.realpath(mirror_folder())
    if name != mirrors and not name.startswith(mirrors + os.sep):
        return None
    real = Path(name)
    if real.is_dir():
        record = read_record(real)
        return record[0] if record else None
    record = read_record(real.parent)
    return record[1][real.name].file.url if record and real.name in record[1] else None


def source_url(path: Path) -> str | None:
    """Return the URL that a model came from, mirrored or in the hub's cache; None for a model of this machine."""
    return hub_url(path) or remote_url(path)


def by_url(error: FormatError, path: Path) -> FormatError:
    """Return a model's error with its URL where its mirror's path stands; any other error as it is."""
    url = source_url(path)
    if url is None or str(path) not in error.where:
        return error
    where = error.where.replace(str(path), url)
    return type(error)(error.what, where=where, rule=error.rule, next_step=error.next_step)
