"""Bundles to the hub: one commit that holds all of it, on top of what was looked at, or nothing.

One commit, and not huggingface_hub's `upload_folder`, which may make several of a large folder: whoever reads in between
would find half a bundle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from eigenzoo.errors import BundleError, OutputError, UsageError
from eigenzoo.formats.bundle.folder import CARD, HUB_FILE, MANIFEST, MOMENTS, file_sha256
from eigenzoo.formats.remote import hub_calls
from eigenzoo.formats.remote.hub_id import HubId

persist = partial(hub_calls.persist, writing=True)


def check_may_push(hub_id: HubId) -> None:
    """Refuse what needs no request to be known: a push without a network by choice, or without a token."""
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise UsageError(
            "HF_HUB_OFFLINE is set, and a push needs the hub",
            where=str(hub_id),
            next_step="run it without HF_HUB_OFFLINE",
        )
    if get_token() is None:
        raise UsageError(
            "no token is set, and pushing requires a login",
            where=str(hub_id),
            next_step="run `hf auth login` with a token that may write, or set HF_TOKEN",
        )


def push_bundle(
    folder: Path,
    hub_id: HubId,
    files: Mapping[str, str],
    *,
    message: str,
    private: bool = False,
    force: bool = False,
) -> HubId:
    """Make a repository, or a branch of it, hold a bundle; returns it with the commit.

    Args:
        folder: the bundle.
        hub_id: the repository. Its revision is a branch, which is created if there is none.
        files: SHA-256 of every file that is pushed, by name.
        message: the first line of the commit.
        private: make the repository private where it is new.
        force: replace another bundle.

    Raises:
        OutputError: for a repository that holds anything else, or another bundle where `force` is not given.
        FormatError: for what the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    head = _find_or_make(api, hub_id, private)
    there = _list(api, replace(hub_id, revision=head))
    if _same(there, folder, files):
        return replace(hub_id, revision=head)
    _check_replaceable(hub_id, there, force)
    if hub_id.revision is not None:
        persist(
            lambda: api.create_branch(hub_id.repo, branch=str(hub_id.revision), revision=head, exist_ok=True), hub_id
        )
    commit = persist(_committing(api, hub_id, head, there, folder, files, message), hub_id)
    pushed = replace(hub_id, revision=commit)
    if not _same(_list(api, pushed), folder, files):
        raise BundleError(
            "the hub's files differ from those that were pushed",
            where=str(pushed),
            next_step="push it again, with --force",
        )
    return pushed


def _find_or_make(api: Any, hub_id: HubId, private: bool) -> str:
    """Return the commit that the push goes on top of; a repository that is not there is made."""
    info = persist(partial(_look, api, hub_id), hub_id)
    if info is None:
        persist(lambda: api.create_repo(hub_id.repo, private=private or None, exist_ok=True), hub_id)
        info = persist(partial(_look, api, replace(hub_id, revision=None)), hub_id)
    elif private and not info.private:
        raise OutputError(
            "the repository is public",
            where=hub_id.repo,
            rule="--private applies only to a repository that the push creates",
            next_step="make it private in its settings first",
        )
    if info is None or not info.sha:
        raise BundleError("the hub does not show the repository that it created", where=hub_id.repo)
    return str(info.sha)


def _look(api: Any, hub_id: HubId) -> Any:
    """What the hub knows of a branch, of the default branch where there is no such; None without the repository."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.repo_info(hub_id.repo, revision=hub_id.revision)
    except RevisionNotFoundError:
        return api.repo_info(hub_id.repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _list(api: Any, hub_id: HubId) -> dict[str, str]:
    """Hashes of the files of a commit: SHA-256 of large ones, git's own of the others."""

    def call() -> dict[str, str]:
        entries = api.list_repo_tree(hub_id.repo, recursive=True, revision=hub_id.revision)
        return {
            entry.path: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            for entry in entries
            if hasattr(entry, "blob_id")
        }

    return persist(call, hub_id)


def _same(there: Mapping[str, str], folder: Path, files: Mapping[str, str]) -> bool:
    """Tell whether a listing holds these files and no other of a bundle."""
    if {name for name in there if _is_ours(name)} != set(files):
        return False
    return all(there[name] in (sha256, _git_hash(folder / name, there[name])) for name, sha256 in files.items())


def _git_hash(path: Path, like: str) -> str:
    """The hash that git has of a file; of one that is large on the hub it is not wanted."""
    if len(like) != 40:
        return ""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_ours(name: str) -> bool:
    """Tell whether a name is one of a bundle's."""
    top, _, below = name.partition("/")
    if below:
        return top in ("coefficients", "rest")
    return top in (MANIFEST, CARD, MOMENTS) or (top.startswith("basis") and top.endswith((".safetensors", ".json")))


def _check_replaceable(hub_id: HubId, there: Mapping[str, str], force: bool) -> None:
    beside = [name for name in there if name != HUB_FILE and not name.startswith("LICENSE")]
    others = [name for name in beside if not _is_ours(name)]
    if others:
        raise OutputError(
            f"the repository holds other files ({', '.join(sorted(others)[:3])}{', …' if len(others) > 3 else ''})",
            where=str(hub_id),
            rule="a bundle needs its own repository, and --force replaces only bundles",
            next_step="choose another name",
        )
    if beside and not force:
        raise OutputError(
            "the repository already holds other content",
            where=str(hub_id),
            next_step="choose another name or --revision, or --force to replace it",
        )


def _committing(
    api: Any, hub_id: HubId, head: str, there: Mapping[str, str], folder: Path, files: Mapping[str, str], message: str
) -> Callable[[], str]:
    """Return the call that commits; when its answer is lost and it is called again, it looks first whether it has done it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [
        CommitOperationDelete(path_in_repo=name) for name in there if _is_ours(name) and name not in files
    ]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
    tried = False

    def call() -> str:
        nonlocal tried
        if tried:
            now = str(_look(api, hub_id).sha)
            if now != head and _same(_list(api, replace(hub_id, revision=now)), folder, files):
                return now
        tried = True
        done = api.create_commit(
            hub_id.repo, operations, commit_message=message, revision=hub_id.revision, parent_commit=head
        )
        return str(done.oid)

    return call


def hashes(folder: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of a bundle's files: those that its manifest knows, and of manifest and card."""
    return {**recorded, **{name: file_sha256(folder / name) for name in (MANIFEST, CARD)}}
