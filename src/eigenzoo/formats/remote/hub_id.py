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
    found = _ID.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return None
    repo, folder, revision = found[1], found[2].strip("/"), found[3]
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
    place = None if isinstance(text, str) and os.path.lexists(folder / text) else parse_id(text)
    if place is None or place.revision is not None or (near := nearest_path(str(text), folder)) is None:
        return place
    raise FormatError(
        "there is no such file or folder",
        where=str(text),
        rule=f"{Path(near).parts[0]!r} is a folder here, so the hub is not asked for it",
        next_step=f"{did_you_mean(str(text), folder) or 'check the name.'} "
        f"To name a repository of the hub, write {place}@main or {place.url}",
    )


def parse_url(url: str) -> HubId | None:
    """Read an `hf://` URL of a model repository; None for any other.

    >>> parse_url("hf://org/name@refs/pr/1/runs/m0")
    HubId(repo='org/name', folder='runs/m0', revision='refs/pr/1')
    """
    found = _URL.fullmatch(url)
    return HubId(found[1], found[3].strip("/"), found[2]) if found and found[1].split("/")[0] not in _KINDS else None


def use_of_bundle(url: str) -> str:
    """Say how a bundle at a URL is used: the hub's by its id."""
    place = parse_url(url)
    return f"name it by its id, {place}, where a bundle is expected" if place else "download it to use it"


_KINDS = ("datasets", "spaces", "models", "buckets", "kernels")


def hub_url(path: Path) -> str | None:
    """Return the URL, with its commit, of what lies in the hub's cache; None for any other path.

    >>> hub_url(Path("/cache/models--org--name/snapshots/" + "a" * 40 + "/runs"))
    'hf://org/name@aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/runs'
    """
    parts = path.parts
    for place in range(len(parts) - 1, 1, -1):
        if parts[place - 1] == "snapshots" and _COMMIT.fullmatch(parts[place]):
            kind, _, repo = parts[place - 2].partition("--")
            found = parse_id(repo.replace("--", "/")) if kind == "models" else None
            return HubId(found.repo, "/".join(parts[place + 1 :]), parts[place]).url if found else None
    return None


def hub_name(path: Path) -> str | None:
    """Return what a model in the hub's cache is called: the repository or folder, not the commit."""
    url = hub_url(path)
    found = parse_url(url) if url else None
    return found.name if found else None


def cached_path(url: str) -> Path | None:
    """Return where the hub's cache has what a URL with a commit names; None where it does not, or for any other URL."""
    found = parse_url(url) if url.startswith("hf://") else None
    if found is None or not found.is_commit or any(part in (".", "..") for part in found.folder.split("/")):
        return None
    from huggingface_hub import constants

    repository = "--".join(("models", *found.repo.split("/")))
    path = Path(constants.HF_HUB_CACHE, repository, "snapshots", str(found.revision), found.folder)
    return path if path.exists() else None
