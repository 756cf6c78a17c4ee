"""Saving: a subspace's files under a name of their own, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from eigenzoo.formats.bundle.folder import MOMENTS, record_files
from eigenzoo.formats.bundle.manifest import Manifest
from eigenzoo.formats.bundle.snapshot import Snapshot
from eigenzoo.formats.output.whole import new_folder, no_check
from eigenzoo.passes.machine import num_cores
from eigenzoo.subspace.bundles.card import foreign_to_a_bundle, write_counted
from eigenzoo.subspace.bundles.source_records import Relocation
from eigenzoo.subspace.bundles.storage import link_all
from eigenzoo.subspace.stored import StoredSubspace

MEASURED = ("seconds", "peak_memory")
"""What the report of a fit says of the run and not of the result."""


def save(
    space: StoredSubspace,
    target: Path,
    *,
    force: bool,
    moments: bool,
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Path:
    """Save a subspace as a bundle; see `Subspace.save`. Files that have a checksum keep it, unread.

    One that was loaded or grown from the bundle in `target` takes its place only if that still is there: what another process has
    added to it meanwhile would be lost. `change` is what is done to the manifest before it is written.
    """
    manifest = space.manifest
    grown_there = space.snapshot is not None and os.path.realpath(space.snapshot.path) == os.path.realpath(target)
    check = space.snapshot.check if space.snapshot is not None and grown_there else no_check
    with new_folder(target, force=force, foreign=foreign_to_a_bundle, check=check) as staging:
        link_all(space.path, staging, (file for file in space.files() if moments or file != MOMENTS))
        space.check_current()
        relocation = Relocation(space.path, target.absolute())
        with ThreadPoolExecutor(num_cores()) as pool:
            found = pool.map(lambda model: relocation.with_checksums(model.source), manifest.models)
            sources = [
                model.model_copy(update={"source": source})
                for model, source in zip(manifest.models, found, strict=True)
            ]
        base = manifest.base and relocation.with_checksums(manifest.base)
        # How long a fit took and what memory is nothing of the bundle: the same zoo gives the same bytes.
        report = {key: value for key, value in manifest.report.items() if key not in MEASURED}
        update = {"models": sources, "base": base, "report": report, "files": record_files(staging, space.checksums)}
        write_counted(staging, change(manifest.model_copy(update=update)))
        saved = Snapshot.of(staging)
    if space.snapshot is not None and grown_there:
        space.snapshot = replace(saved, path=space.snapshot.path)
    return target
