"""Open a bundle of this machine or of the hub. Another process may replace it at the same time."""

from __future__ import annotations

import os
from pathlib import Path

from eigenzoo.errors import BundleError, EigenzooError
from eigenzoo.formats.bundle.folder import read_manifest
from eigenzoo.formats.bundle.snapshot import ATTEMPTS, Snapshot
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote.hub_bundle import bundle_path
from eigenzoo.formats.remote.hub_id import find_id
from eigenzoo.passes.process import seldom_collecting
from eigenzoo.passes.settings import own_settings
from eigenzoo.subspace.subspace import Subspace


@own_settings()
def load(folder: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None) -> Subspace:
    """Load a bundle. Reads its manifest and headers now, and values on demand.

    `folder` is a path or a hub id (`org/name@revision`). Files on the hub are downloaded into its cache and compared with
    the manifest's checksums. `base` is the current path of the base (view `delta`). Raises BundleError if the bundle does not
    follow docs/bundle-format.md.
    """
    # Errors of a local base are raised before a bundle is downloaded. A remote base is downloaded after the bundle.
    opened = open_model(base) if base is not None and find_id(base) is None else base
    path = bundle_path(folder)
    for _ in range(ATTEMPTS):
        snapshot = Snapshot.of(path)
        try:
            space = _opened(path, opened, snapshot)
            snapshot.check()
        except (EigenzooError, FileNotFoundError):
            if snapshot.is_current:
                raise
            continue
        return space
    raise BundleError("is replaced again and again while it is opened", where=str(path), next_step="open it later")


def _opened(path: Path, base: str | os.PathLike[str] | Model | None, snapshot: Snapshot) -> Subspace:
    with seldom_collecting():
        manifest = read_manifest(path)
    opened_base = base if base is None or isinstance(base, Model) else open_model(base)
    space = Subspace(path, manifest, base=opened_base, snapshot=snapshot)
    if opened_base is not None:
        space.check_base(space.base or opened_base)
    _ = space.layers
    return space
