"""Save a subspace's files into a folder that appears complete or not at all."""

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
"""Keys of a fit's report that describe the run and not the result."""


def save(
    space: StoredSubspace,
    target: Path,
    *,
    force: bool,
    moments: bool,
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Path:
    """Save a subspace as a bundle; see `Subspace.save`. Files that have a checksum keep it and are not read.

    A subspace that was loaded or grown from the bundle in `target` replaces it only if it is unchanged. Otherwise models that
    another process has added meanwhile would be lost. `change` is applied to the manifest before it is written.
    """
    manifest = space.manifest
    grown_there = space.snapshot is not None and os.path.realpath(space.snapshot.path) == os.path.realpath(target)
    check = space.snapshot.check if space.snapshot is not None and grown_there else no_check
    with new_folder(target, force=force, foreign=foreign_to_a_bundle, check=check) as staging:
        link_all(space.path, staging, (file for file in space.files() if moments or file != MOMENTS))
        space.check_current()
        relocation = Relocation(space.path, target.absolute())
        with ThreadPoolExecutor(num_cores()) as pool:
            sources = pool.map(lambda model: relocation.with_checksums(model.source), manifest.models)
            models = [
                model.model_copy(update={"source": source})
                for model, source in zip(manifest.models, sources, strict=True)
            ]
        base = manifest.base and relocation.with_checksums(manifest.base)
        # Time and memory of the fit are left out, so that the same zoo gives the same bytes.
        report = {key: value for key, value in manifest.report.items() if key not in MEASURED}
        update = {"models": models, "base": base, "report": report, "files": record_files(staging, space.checksums)}
        write_counted(staging, change(manifest.model_copy(update=update)))
        saved = Snapshot.of(staging)
    if space.snapshot is not None and grown_there:
        space.snapshot = replace(saved, path=space.snapshot.path)
    return target
