"""Bundles on the hub: the files that a manifest names, downloaded into the hub's cache and compared with its checksums."""

from __future__ import annotations

import os
from pathlib import Path

from eigenzoo.errors import BundleError
from eigenzoo.formats.bundle.folder import CARD, MANIFEST, MAX_MANIFEST_BYTES, MOMENTS, file_sha256, is_bundle
from eigenzoo.formats.bundle.manifest import parse_manifest
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.kinds import BUNDLE_FILES
from eigenzoo.formats.paths import inside
from eigenzoo.formats.remote.address import is_url, local_path, shown_url
from eigenzoo.formats.remote.hub import Commit, download, find_commit, stored_sha256
from eigenzoo.formats.remote.hub_files import tree_of
from eigenzoo.formats.remote.hub_id import HubId, find_id, parse_url
from eigenzoo.formats.tree import is_bundle as is_bundle_folder

_WHOLE = "push the whole bundle again, with --force"


def bundle_path(source: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle: a path as it is; an id of the hub, or its URL, once its files are in the cache.

    Raises BundleError for what is no bundle, and for files that are not those of its manifest.
    """
    hub_id = bundle_id(source)
    return (
        Path(source if not isinstance(source, str) else local_path(source)) if hub_id is None else fetch_bundle(hub_id)
    )


def names_a_bundle(source: str | os.PathLike[str]) -> bool:
    """Tell by names alone whether a path or an id of the hub is meant to be a bundle."""
    if not isinstance(source, str):
        return is_bundle(Path(source))
    hub_id = find_id(source)
    return is_bundle(Path(source)) if hub_id is None else _is_bundle(find_commit(hub_id))


def bundle_id(source: str | os.PathLike[str]) -> HubId | None:
    """Return the place on the hub that a bundle is named by, as an id or an `hf://` URL; None for a path. Asks no network.

    Raises BundleError for any other URL: no bundle is read from there.
    """
    if not isinstance(source, str):
        return None
    if not is_url(source):
        return find_id(source)
    hub_id = parse_url(source)
    if hub_id is None:
        raise BundleError(
            "the bundle is at a URL",
            where=shown_url(source),
            rule="bundles are read only from this machine and from model repositories of the hub",
            next_step="download it",
        )
    return hub_id


def _is_bundle(commit: Commit) -> bool:
    return is_bundle_folder(tree_of(commit.sizes).find(commit.hub_id.folder))


def _below(commit: Commit, name: str) -> str:
    return f"{commit.hub_id.folder}/{name}" if commit.hub_id.folder else name


def fetch_bundle(hub_id: HubId) -> Path:
    """Download a bundle of the hub; returns its folder in the hub's cache."""
    commit = find_commit(hub_id)
    if not _is_bundle(commit):
        raise BundleError(
            "is not a bundle",
            where=str(hub_id),
            rule=f"a bundle has {' and '.join(BUNDLE_FILES)}",
            next_step="name a model or a zoo only where one is expected",
        )
    folder, named = commit.folder / commit.hub_id.folder, _below(commit, MANIFEST)
    if commit.sizes[named] > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST} has {commit.sizes[named]} bytes", where=str(hub_id))
    download(commit, [named])
    document = read_json(inside(folder, MANIFEST), where=f"{hub_id}, {MANIFEST}", max_bytes=MAX_MANIFEST_BYTES)
    files = parse_manifest(document, str(hub_id)).files
    wanted = []
    for name, record in files.items():
        size = commit.sizes.get(_below(commit, name))
        if size is None and name == MOMENTS:
            continue
        if size != record.bytes:
            fault = "is missing" if size is None else f"has {size} bytes, but the manifest says {record.bytes}"
            raise BundleError(f"the file {name!r} {fault}", where=str(hub_id), next_step=_WHOLE)
        wanted.append(name)
    card = [_below(commit, CARD)] if _below(commit, CARD) in commit.sizes else []
    download(commit, [*(_below(commit, name) for name in wanted), *card])
    for name in wanted:
        file = folder / name
        if (stored_sha256(file) or file_sha256(inside(folder, name))) != files[name].sha256:
            raise BundleError(
                f"{name}: the checksum differs from the manifest's",
                where=str(hub_id),
                next_step=_WHOLE,
            )
    return folder
