"""Open the files that a subspace was fitted to again, or say why they are not available."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from eigenzoo.errors import UsageError
from eigenzoo.formats.model import Model
from eigenzoo.formats.pickles.file import SUFFIXES as PICKLES
from eigenzoo.subspace.bundles.source_records import Fault, followed, source_fault, source_path
from eigenzoo.subspace.stored import StoredSubspace
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zoo import Zoo

_STATEMENTS = {
    "missing": "old files are not found where the bundle names them",
    "changed": "old files have changed",
    "unreadable": "old files cannot be read",
    "remote": "old files are at URLs",
    "pickled": "old files are pickles, which are read again with permission only",
    "unnamed": "the bundle names no old files",
}


class Missing(NamedTuple):
    """Why the old models' files cannot be used.

    `statement` is for a report and contains no paths. `detail` names model and file, and `next_step` says what to do.
    """

    statement: str
    detail: str
    next_step: str = "--old FOLDER says where they are now"


def find_originals(space: StoredSubspace, old: Source | None, allow_pickle: bool) -> Zoo | Missing:
    """Return the old models' files as a zoo in the subspace's order, or why they are not available.

    Raises UsageError if `old` does not name the files that were fitted.
    """
    if old is None:
        return _at_hand(space, allow_pickle)
    zoo = space.open(old, allow_pickle=allow_pickle)
    missing = [name for name in space.names if name not in zoo.names]
    if missing:
        raise UsageError(
            f"{missing[0]!r} is not among the old models' files",
            rule="--old (old=) names every model of the bundle, also those added later",
            next_step="give --old once for each folder (old= takes a list)",
        )
    zoo = zoo.select(names=space.names)
    for record, model in zip(space.manifest.models, zoo.models, strict=True):
        record_now = record.source.model_copy(update={"path": str(model.path.absolute())})
        has_checksums = all(file.sha256 for file in record_now.files.values())
        fault = (source_fault(record_now, space.path) if has_checksums else None) or _scale_fault(
            space, record.name, model
        )
        if fault is not None:
            raise UsageError(
                f"the files of {record.name!r} are not those that were fitted ({fault.detail})",
                where=str(model.path),
                next_step="leave old= out: the bundle alone then stands for the old models",
            )
    return zoo


def missing_originals(space: StoredSubspace, *, allow_pickle: bool = False) -> Missing | None:
    """Return why the old models' files are not available, or None if they are."""
    originals = _at_hand(space, allow_pickle)
    return originals if isinstance(originals, Missing) else None


def _at_hand(space: StoredSubspace, allow_pickle: bool) -> Zoo | Missing:
    records = {model.name: model.source for model in space.manifest.models}
    # A bundle that names its sources does not give permission to unpickle them.
    if not allow_pickle and (pickled := _from_pickles(space)):
        return Missing(
            _STATEMENTS["pickled"], f"{pickled!r} is a pickle", "--allow-pickle (allow_pickle=True) reads it"
        )
    for name, record in records.items():
        if (fault := source_fault(record, space.path)) is not None:
            return _missing(space, name, fault)
    # The path must not lead through the bundle's folder, which may be temporary and deleted before the files are read.
    paths = [followed(source_path(record, space.path) or space.path / record.path) for record in records.values()]
    zoo = space.open(paths, allow_pickle=allow_pickle).renamed(list(records))
    for name, model in zip(zoo.names, zoo.models, strict=True):
        if (fault := _scale_fault(space, name, model)) is not None:
            return _missing(space, name, fault)
    return zoo


def _missing(space: StoredSubspace, name: str, fault: Fault) -> Missing:
    detail = f"{name!r}: {fault.detail}"
    if fault.kind == "missing":
        paths = [source_path(model.source, space.path) for model in space.manifest.models]
        detail += (
            ", though other old models are"
            if any(path is not None and path.exists() for path in paths)
            else ". No old model is: the bundle names them from its own folder, so it was moved or copied without them, "
            "or they were removed"
        )
    return Missing(_STATEMENTS[fault.kind], detail)


def _scale_fault(space: StoredSubspace, name: str, model: Model) -> Fault | None:
    """Return a fault if an adapter's config gives its updates another scale than in the fit. No checksum covers the config."""
    if not model.updates:
        return None
    fitted = space.template(name).layout.updates
    if all(fitted[module].scale == update.scale for module, update in model.updates.items() if module in fitted):
        return None
    path = os.path.realpath(model.path)
    return Fault("changed", f"{path} gives its updates another scale than when it was read")


def _from_pickles(space: StoredSubspace) -> str:
    """Return the first model whose source is not only safetensors, by the names of its files and its own path."""
    for model in space.manifest.models:
        path_names = [model.source.path] if Path(model.source.path).suffix in PICKLES else []
        if not all(name.endswith(".safetensors") for name in (*model.source.files, *path_names)):
            return model.name
    return ""
