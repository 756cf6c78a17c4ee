"""URLs: which driver opens them, and what of them may be shown.

A URL may hold secrets (`user:password@`, a signature in the query). Those are used to connect and for nothing else: what
is printed, recorded or raised is `shown_url`, and texts of drivers go through `scrubbed`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from eigenzoo.errors import FormatError, UnsupportedError

LOCAL = ("file", "local")
DRIVERS = {
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "oss": "ossfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "sftp": "paramiko",
    "smb": "smbprotocol",
    "ssh": "paramiko",
}
"""What to install for a protocol; fsspec's own hint serves for all others."""

_MAGIC = re.compile(r"[*?\[]")
_WEB_MAGIC = re.compile(r"[*\[]")  # a question mark begins a query there
# A colon that no port follows, before the first slash, and an @ behind it; or a name and an @ before the first slash.
_SECRET = re.compile(r"^(?:[^/@:]*:(?!\d*(?:/|$))[^@]*|[^/@]*)@")
_connected: dict[tuple[int, str], tuple[Any, str]] = {}


def is_url(source: object) -> bool:
    """Tell whether a source is a URL of another place than this machine's files."""
    return isinstance(source, str) and "://" in source and protocol_of(source) not in LOCAL


def local_path(source: str) -> str:
    """Return the path of a `file://` URL; any other source as it is. Raises FormatError for a name that no file can have."""
    if "://" not in source or protocol_of(source) not in LOCAL:
        return source
    try:
        return str(fsspec.get_filesystem_class("file")._strip_protocol(source))
    except ValueError as error:  # a NUL, or half a character, where a home folder is looked up
        raise FormatError("is not a valid file path", where=repr(source[:200])) from error


def protocol_of(url: str) -> str:
    """Return the protocol of a URL, the outermost of a chain.

    >>> protocol_of("zip://m0::s3://bucket/zoo.zip")
    'zip'
    """
    return re.split("://|::", url, maxsplit=1)[0]


def shown_url(url: str) -> str:
    """Return a URL without the secrets that it may hold: user, password, query.

    >>> shown_url("https://me:secret@host:8080/zoo/m0.safetensors?X-Amz-Signature=abc")
    'https://host:8080/zoo/m0.safetensors'
    """
    return "::".join(_shown(part) for part in url.split("::"))


def _shown(part: str) -> str:
    protocol, mark, rest = part.partition("://")
    if not mark:
        return part
    web = protocol in ("http", "https")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0] if web else re.sub(r"\?[\w.-]+=.*$", "", rest)
    # On the hub an @ stands before a revision.
    return protocol + mark + (rest if protocol == "hf" else _SECRET.sub("", rest))


def scrubbed(text: str) -> str:
    """Return a driver's text without URLs and anything else that may hold a secret, shortened.

    >>> scrubbed("403 for https://me:pw@host/x?sig=1")
    '403 for <url>'
    """
    text = re.sub(r"\w+://[^\s'\")]+", "<url>", text)
    text = re.sub(r"[^\s'\"]*@[^\s'\"]*|[?&][\w.-]+=[^\s'\"]+", "<…>", text)
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + "…"


def split_glob(url: str) -> tuple[str, tuple[str, ...]]:
    """Split a URL into the folder that holds no wildcard and the parts of the pattern below it.

    >>> split_glob("s3://bucket/zoo/run-*/adapter")
    ('s3://bucket/zoo', ('run-*', 'adapter'))
    """
    protocol, mark, rest = url.partition("://")
    head, chain, tail = rest.partition("::")
    magic = _WEB_MAGIC if protocol in ("http", "https") else _MAGIC
    parts = head.rstrip("/").split("/")
    first = next((number for number, part in enumerate(parts) if magic.search(part)), None)
    if first is None:
        return url, ()
    if first == 0 and not chain:
        raise UnsupportedError("the bucket or host is a wildcard", where=shown_url(url), next_step="name the bucket")
    return protocol + mark + "/".join(parts[:first]) + chain + tail, tuple(parts[first:])


def below(url: str, name: str) -> str:
    """Return the URL of `name` in the folder at `url`; of a chain, in its outermost part.

    >>> below("zip://zoo::s3://bucket/all.zip", "m0")
    'zip://zoo/m0::s3://bucket/all.zip'
    """
    if not name:
        return url
    head, chain, tail = url.partition("::")
    return head + ("" if head.endswith(("/", "://")) else "/") + name + chain + tail


@dataclass(frozen=True)
class Address:
    """A place in a file system: the URL to connect by (it may hold secrets), the driver's path, and what is shown."""

    source: str
    path: str
    shown: str
    name: str


def connect(source: str) -> Any:
    """Return the file system of a URL, one per process and URL, by fsspec's own settings and those of its drivers."""
    return _open(source)[0]


def find_address(url: str) -> Address:
    """Connect and return the address of a URL; on the hub the revision becomes the commit that it names now."""
    system, path = _open(url)
    shown = re.sub(r"(?<=[^:/])/+(?=$|::)", "", shown_url(url))
    if protocol_of(url) == "hf" and (pinned := _pinned(system, path)):
        return Address(url, pinned[0], f"hf://{pinned[0]}", pinned[1])
    return Address(url, path, shown, shown.partition("::")[0].partition("://")[2].rstrip("/").rpartition("/")[2])


def _open(url: str) -> tuple[Any, str]:
    # Not fsspec's own cache alone: that gives each thread another instance of some drivers, without its listings.
    key = (os.getpid(), url)
    if key not in _connected:
        _check_drivers(url)
        system, path = url_to_fs(url)
        _connected[key] = system, str(path)
    return _connected[key]


_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/tree/([^/?#]+))?/?")
"""A model's page on the hub, which is no file."""


def _check_drivers(url: str) -> None:
    page = _PAGE.fullmatch(url)
    if page is not None:
        revision = f"@{page[2]}" if page[2] else ""
        raise UnsupportedError(
            "is a page of the hub, not a file", where=shown_url(url), next_step=f"use the id {page[1]}{revision}"
        )
    for part in url.split("::"):
        protocol = protocol_of(part)
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError:
            raise _without_driver(protocol, url) from None
        except ValueError:
            raise UnsupportedError(
                f"fsspec has no driver called {protocol[:50]!r}",
                where=shown_url(url),
                rule="a URL begins with the protocol of an fsspec driver, such as s3, gs, az, hf or https",
            ) from None


def _without_driver(protocol: str, url: str) -> FormatError:
    package = DRIVERS.get(protocol)
    hint = str(known_implementations.get(protocol, {}).get("err", ""))
    return UnsupportedError(
        f"the driver of {protocol}:// is not installed",
        where=shown_url(url),
        next_step=f"pip install {package}" if package else scrubbed(hint),
    )


def _pinned(system: Any, path: str) -> tuple[str, str] | None:
    """Name the commit in a path of the hub: files of a commit never change, those of a branch may between two reads.

    Gives the path and its last name; nothing for a bucket of the hub, which has no commits.
    """
    resolved = system.resolve_path(path)
    if not hasattr(resolved, "repo_id"):
        return None
    from huggingface_hub import HfApi

    info = HfApi(endpoint=system.endpoint, token=system.token).repo_info(
        resolved.repo_id, repo_type=resolved.repo_type, revision=resolved.revision
    )
    root, inner = resolved.root.partition("@")[0], resolved.path_in_repo
    if not inner:
        return f"{root}@{info.sha}", root.rpartition("/")[2]
    return f"{root}@{info.sha}/{inner}", inner.rpartition("/")[2]
