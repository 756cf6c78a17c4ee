"""The files that a subspace was fitted to: whether they are still at hand, and opened again."""

from __future__ import annotations

from pathlib import Path

from eigenzoo.errors import UsageError
from eigenzoo.formats.model import Model
from eigenzoo.formats.pickles.file import SUFFIXES as PICKLES
from eigenzoo.subspace.bundles.source_records import is_at_hand, source_path
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zoo import Zoo


def find_originals(space: Subspace, old: Source | None, allow_pickle: bool) -> Zoo | None:
    """The old models' own files as a zoo in the subspace's order, or None where they are gone or have changed."""
    if old is not None:
        zoo = space.open(old, allow_pickle=allow_pickle)
        missing = [name for name in space.names if name not in zoo.names]
        if missing:
            raise UsageError(
                f"{missing[0]!r} is not among the old models' files", rule="old names all models of the subspace"
            )
        zoo = zoo.select(names=space.names)
        for record, model in zip(space.manifest.models, zoo.models, strict=True):
            there = record.source.model_copy(update={"path": str(model.path.absolute())})
            known = all(file.sha256 for file in there.files.values())
            if (known and not is_at_hand(there, space.path)) or _other_scales(space, record.name, model):
                raise UsageError(
                    f"the files of {record.name!r} are not those that were fitted",
                    where=str(model.path),
                    next_step="leave old= out: the bundle alone then stands for the old models",
                )
        return zoo
    records = {model.name: model.source for model in space.manifest.models}
    # What a bundle says of its sources is no permission to unpickle them.
    if _from_pickles(space) and not allow_pickle:
        return None
    if not all(is_at_hand(record, space.path) for record in records.values()):
        return None
    paths = [source_path(record, space.path) or space.path / record.path for record in records.values()]
    zoo = space.open(paths, allow_pickle=allow_pickle).renamed(list(records))
    if any(_other_scales(space, name, model) for name, model in zip(zoo.names, zoo.models, strict=True)):
        return None
    return zoo


def _other_scales(space: Subspace, name: str, model: Model) -> bool:
    """Tell whether an adapter's config gives its updates another scale than when it was fitted: that is in no checksum."""
    if not model.updates:
        return False
    fitted = space.template(name).layout.updates
    return any(fitted[module].scale != update.scale for module, update in model.updates.items() if module in fitted)


def _from_pickles(space: Subspace) -> bool:
    """Tell whether a source is anything but safetensors, by the names of its files and its own."""
    return any(
        not name.endswith(".safetensors")
        for model in space.manifest.models
        for name in (*model.source.files, *([model.source.path] if Path(model.source.path).suffix in PICKLES else []))
    )
