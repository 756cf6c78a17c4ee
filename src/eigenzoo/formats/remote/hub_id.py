"""Ids of the Hugging Face hub: `org/name`, `org/name@revision`, `org/name/folder@revision`; and where its cache has them.

An id stands wherever a path of a model, zoo or bundle does, as text. A path that exists on this machine always wins, and text
that is nearly one is an error before anything is asked: names of this machine's files are nobody else's business.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from eigenzoo.errors import FormatError
from eigenzoo.formats.kinds import PICKLE_SUFFIXES
from eigenzoo.formats.paths import did_you_mean, nearest_path

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"({_PART}/{_PART})((?:/[^/@\s\\*?\[\]]+)*)(?:@([^@\s\\*?\[\]]+))?")
_URL = re.compile(rf"hf://({_PART}/{_PART})(?:@(refs/(?:pr|convert)/[^/@\s]+|[^/@\s]+))?((?:/[^/@\s]+)*)/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, ".txt", ".json", ".md")
"""What ends so was meant to be a file of this machine."""


@dataclass(frozen=True)
class HubId:
    """A place in a model repository of the hub.

    Attributes:
        repo: `org/name`.
        folder: the folder in it, empty for its root.
        revision: a branch, tag or commit; None is the default branch.
    """

    repo: str
    folder: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return (f"{self.repo}/{self.folder}" if self.folder else self.repo) + (
            f"@{self.revision}" if self.revision else ""
        )

    @property
    def name(self) -> str:
        """Its last part, which a model is called by."""
        return (self.folder or self.repo).rpartition("/")[2]

    @property
    def url(self) -> str:
        """The same as a URL, which says its revision behind the repository."""
        return (
            f"hf://{self.repo}"
            + (f"@{self.revision}" if self.revision else "")
            + (f"/{self.folder}" if self.folder else "")
        )

    @property
    def is_commit(self) -> bool:
        """Whether the revision can never mean anything else."""
        return bool(self.revision and _COMMIT.fullmatch(self.revision))


def parse_id(text: object) -> HubId | None:
    """Read an id; None for what has not its form.

    >>> parse_id("org/name@v1"), parse_id("org/name/runs/m0")
    (HubId(repo='org/name', folder='', revision='v1'), HubId(repo='org/name', folder='runs/m0', revision=None))
    >>> parse_id("models/m0.safetensors"), parse_id("/models/m0"), parse_id("../zoo/m0")
    (None, None, None)
    """
    match = _ID.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    repo, folder, revision = match[1], match[2].strip("/"), match[3]
    if (folder or repo).endswith(_FILE_SUFFIXES) or any(part in (".", "..") for part in folder.split("/")):
        return None
    if "--" in repo or ".." in repo or repo.endswith(".git"):
        return None
    return HubId(repo, folder, revision)


def find_id(text: object, folder: Path = Path()) -> HubId | None:
    """Return the id that a source is: text of its form that names nothing on this machine, seen from `folder`.

    Raises FormatError for text that is nearly a path here, unless it says its revision: its first part is a folder, or is
    like the name of one. Asks no network.
    """
    hub_id = None if isinstance(text, str) and os.path.lexists(folder / text) else parse_id(text)
    if hub_id is None or hub_id.revision is not None or (near := nearest_path(str(text), folder)) is None:
        return hub_id
    raise FormatError(
        "there is no such file or folder",
        where=str(text),
        rule=f"{Path(near).parts[0]!r} is a folder here, so the hub is not asked for it",
        next_step=f"{did_you_mean(str(text), folder) or 'check the name.'} "
        f"To name a repository of the hub, write {hub_id}@main or {hub_id.url}",
    )


def parse_url(url: str) -> HubId | None:
    """Read an `hf://` URL of a model repository; None for any other.

    >>> parse_url("hf://org/name@refs/pr/1/runs/m0")
    HubId(repo='org/name', folder='runs/m0', revision='refs/pr/1')
    """
    match = _URL.fullmatch(url)
    return HubId(match[1], match[3].strip("/"), match[2]) if match and match[1].split("/")[0] not in _KINDS else None


def use_of_bundle(url: str) -> str:
    """Say how a bundle at a URL is used: the hub's by its id."""
    hub_id = parse_url(url)
    return f"name it by its id, {hub_id}, where a bundle is expected" if hub_id else "download it to use it"


_KINDS = ("datasets", "spaces", "models", "buckets", "kernels")


def hub_url(path: Path) -> str | None:
    """Return the URL, with its commit, of what lies in the hub's cache; None for any other path.

    >>> hub_url(Path("/cache/models--org--name/snapshots/" + "a" * 40 + "/runs"))
    'hf://org/name@aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/runs'
    """
    parts = path.parts
    for number in range(len(parts) - 1, 1, -1):
        if parts[number - 1] == "snapshots" and _COMMIT.fullmatch(parts[number]):
            kind, _, repo = parts[number - 2].partition("--")
            hub_id = parse_id(repo.replace("--", "/")) if kind == "models" else None
            return HubId(hub_id.repo, "/".join(parts[number + 1 :]), parts[number]).url if hub_id else None
    return None


def hub_name(path: Path) -> str | None:
    """Return what a model in the hub's cache is called: the repository or folder, not the commit."""
    url = hub_url(path)
    hub_id = parse_url(url) if url else None
    return hub_id.name if hub_id else None


def cached_path(url: str) -> Path | None:
    """Return where the hub's cache has what a URL with a commit names; None where it does not, or for any other URL."""
    hub_id = parse_url(url) if url.startswith("hf://") else None
    if hub_id is None or not hub_id.is_commit or any(part in (".", "..") for part in hub_id.folder.split("/")):
        return None
    from huggingface_hub import constants

    repository = "--".join(("models", *hub_id.repo.split("/")))
    path = Path(constants.HF_HUB_CACHE, repository, "snapshots", str(hub_id.revision), hub_id.folder)
    return path if path.exists() else None
