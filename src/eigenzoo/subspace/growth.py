"""Add models to a subspace without fitting all models again.

    the old models' files    the moments        without refresh             with refresh
    available                exact              old coefficients unchanged  as if fitted at once
    gone                     exact inside the   old coefficients unchanged  optimal for what the bundle still
                             kept subspace                                  knows; the loss is bounded and stated
    gone, form `stacked`     exact inside the   old coefficients unchanged  as if fitted at once: the basis holds
                             kept subspace                                  the fitted models' own factors

Legend: N old models, M new ones, R the reference (see `moments`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from eigenzoo.errors import UsageError
from eigenzoo.formats.bundle.folder import MOMENTS
from eigenzoo.formats.bundle.manifest import Manifest
from eigenzoo.formats.output.held_folder import TemporaryFolder
from eigenzoo.formats.output.whole import clear_errors
from eigenzoo.linalg.spectrum import NUMERICAL_RANK
from eigenzoo.passes.resources import Resources
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import opened_workers
from eigenzoo.records import Progress, no_progress, plain
from eigenzoo.subspace.bases.basis import Projection
from eigenzoo.subspace.bundles.originals import Missing, find_originals
from eigenzoo.subspace.bundles.provenance import KEY as PROVENANCE
from eigenzoo.subspace.bundles.provenance import joined, provenance
from eigenzoo.subspace.bundles.source_records import Relocation, source_record
from eigenzoo.subspace.bundles.storage import link_all, write_model, write_moments
from eigenzoo.subspace.coefficients import Coefficients, project_layers, share_of, with_templates
from eigenzoo.subspace.fitting.bytes import count_bytes
from eigenzoo.subspace.fitting.fit_layers import Fitting, fit_layers
from eigenzoo.subspace.fitting.options import FitOptions, recorded_options
from eigenzoo.subspace.fitting.work import Work, check_workspace
from eigenzoo.subspace.fitting.writing import write_subspace
from eigenzoo.subspace.moments.border import extend
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.duplicates import find_copies, find_duplicates
from eigenzoo.subspace.moments.layer_moments import LayerMoments, recentered
from eigenzoo.subspace.moments.moments_cache import opened_cache
from eigenzoo.subspace.recall import recall, restore_records
from eigenzoo.subspace.stored import StoredSubspace
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zoo import Zoo

Space = TypeVar("Space", bound=StoredSubspace)
"""The type of the subspace: growth of a `Subspace` returns a `Subspace`."""


@dataclass(frozen=True)
class Growth:
    """The added models, and how exact the result is; stored in the subspace's report.

    Attributes:
        added: names of the new models.
        exact: whether the old models' files were read, or their factors from the bundle.
        refreshed: whether the basis was fitted again.
        discarded: lost energy Σ‖X − X̂‖² of all models and layers; an upper bound if `exact` is False and the basis was refreshed.
        statement: a sentence about this, and why the old files were not read; without paths.
    """

    added: tuple[str, ...]
    exact: bool
    refreshed: bool
    discarded: float
    statement: str


@own_settings()
def add(
    space: Space,
    source: Source | Zoo,
    *,
    refresh: bool = False,
    old: Source | None = None,
    allow_pickle: bool = False,
    workspace: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> Space:
    """Return a new Subspace with more models.

    Args:
        space: the subspace to grow. It is not changed.
        source: the new models.
        refresh: fit the basis again to all models. Otherwise only coefficients are added.
        old: where the old models' files are now. Default: the paths from which they were read.
        allow_pickle: also read old models that are pickles. Otherwise they count as gone.
        workspace: a folder on the disk where the bundle will be saved. The bundle is built there.
        progress: called as progress(stage, done, total).

    The moments grow by a border. If the old files are available it is exact, and costs one read of all weights and M·(N + M)·D
    products. If they are gone it consists of inner products of coefficients, which are exact inside the kept subspace. A refresh
    without the old files uses the rebuilt old models, and their new loss adds to the old one: ‖X − X̂'‖ ≤ ‖X − X̂‖ + ‖X̂ − X̂'‖.
    """
    check_workspace(workspace)
    with clear_errors(None if workspace is None else Path(workspace)):
        return _grown(space, source, refresh, old, allow_pickle, workspace, progress)


def _grown(
    space: Space,
    source: Source | Zoo,
    refresh: bool,
    old: Source | None,
    allow_pickle: bool,
    workspace: str | os.PathLike[str] | None,
    progress: Progress,
) -> Space:
    started = time.perf_counter()
    new = space.open(source)
    duplicates = sorted(set(new.names) & set(space.names))
    if duplicates:
        raise UsageError(
            f"a model called {duplicates[0]!r} is in the subspace already",
            where=str(space.path),
            next_step="rename the new model's folder",
        )
    found = find_originals(space, old, allow_pickle)
    originals, why = (None, found.statement) if isinstance(found, Missing) else (found, "")
    projections = {} if refresh and originals is not None else project_layers(space.layers, new, progress)
    moments = _grown_moments(space, new, originals, progress)
    if refresh:
        return _refreshed(space, new, originals, why, moments, progress, started, workspace)
    return _extended(space, new, projections, moments, why, workspace)


def _was_exact(space: StoredSubspace) -> bool:
    """Tell whether the moments are exact, because the last growth could read the old models' files."""
    return bool(space.report.get("growth", {}).get("exact", True))


def _joined(space: StoredSubspace, first: Zoo, second: Zoo) -> Zoo:
    names = [*first.names, *second.names]
    return Zoo([*first.models, *second.models], names, space.selection, first.base or second.base)


def _grown_moments(
    space: StoredSubspace,
    new: Zoo,
    originals: Zoo | None,
    progress: Progress,
) -> dict[str, LayerMoments] | None:
    """Return all layers' moments with the new models' border, or None if the bundle has none or the old files are gone."""
    if not space.has_moments or originals is None:
        return None
    exact = _was_exact(space)
    if not exact and space.manifest.center != "models":
        return None
    zoo = _joined(space, originals, new)
    with opened_workers(None) as workers:
        precision = _options(space).precision_of_products
        task = partial(_grow_layer, space, zoo, exact, precision, workers.resources)
        return dict(workers.each("extending moments", task, space.layers, progress, what="layer"))


def _grow_layer(
    space: StoredSubspace, zoo: Zoo, exact: bool, precision: str, resources: Resources, name: str
) -> LayerMoments:
    """Extend a layer's moments in the precision of the fit, even if the layer is no longer small with more models."""
    moments = space.moments(name)
    stack = zoo.stack(name, precision="high" if moments.round_off <= NUMERICAL_RANK else precision)
    return extend(moments, stack) if exact else collect(stack, resources=resources)


def _extended(
    space: Space,
    new: Zoo,
    projections: Mapping[str, list[Projection]],
    moments: Mapping[str, LayerMoments] | None,
    why: str,
    workspace: str | os.PathLike[str] | None,
) -> Space:
    """Keep the basis and add coefficients.

    Without the old files (`why` is the reason) the stored moments are not changed. Those of the new models follow from their
    coefficients and energies and are computed on demand (`inside`).
    """
    projected = with_templates(new, projections)
    inside = moments is None and space.has_moments and space.manifest.center == "models"
    folder = TemporaryFolder(workspace)
    root = Path(folder.name)
    relocation = Relocation(space.path, root)
    try:
        _link_files(space, root, moments=inside)
        records = [
            _write_projected(root, space, new, coefficients, projections, energies=moments is None)
            for coefficients in projected.values()
        ]
        if moments is not None:
            write_moments(root, moments)
        old = [model.model_copy(update={"source": relocation.moved(model.source)}) for model in space.manifest.models]
        discarded, energy = dict(space.manifest.discarded), space.report["energy"]
        for coefficients in projected.values():
            energy += sum(coefficients.energies.values())
            for name, outside in coefficients.outside.items():
                discarded[name] += outside
        base = space.manifest.base and relocation.moved(space.manifest.base)
        manifest = space.manifest.model_copy(
            update={
                "models": [*old, *records],
                "discarded": discarded,
                "base": base,
                "files": {},
            }
        )
        growth = Growth(
            new.names, not why, False, sum(discarded.values()), _extension(space, why, moments is not None, inside)
        )
        manifest = _with_growth(manifest, space, new, root, energy, growth)
        linked = {file: record for file, record in space.checksums.items() if inside or file != MOMENTS}
        grown = type(space)(root, manifest, base=space._base, keep=folder, checksums=linked, snapshot=space.snapshot)
        grown.report["duplicates"] = plain(_duplicates(space, grown, list(projected.values()), moments))
    except BaseException:
        folder.cleanup()
        raise
    return grown


def _duplicates(
    space: StoredSubspace,
    grown: StoredSubspace,
    new: Sequence[Coefficients],
    moments: Mapping[str, LayerMoments] | None,
) -> Sequence[tuple[str, str]]:
    """Return pairs of equal models, from the moments if they are given, else from the report and the new models' coefficients."""
    if moments is not None:
        return find_duplicates(grown.names, moments.values())
    old_pairs = [(first, second) for first, second in space.report.get("duplicates", [])]
    return [*old_pairs, *find_copies(new, grown.names, grown.all_coefficients)]


def _write_projected(
    root: Path,
    space: StoredSubspace,
    new: Zoo,
    coefficients: Coefficients,
    projections: Mapping[str, list[Projection]],
    *,
    energies: bool,
) -> Any:
    index = new.place(coefficients.name)
    values = [projections[name][index].stored for name in space.layers]
    residuals = [coefficients.residuals[name] for name in space.layers]
    return write_model(
        root,
        coefficients.name,
        space.manifest.basis_id,
        values,
        residuals,
        coefficients.template,
        source_record(new.models[index], root),
        [coefficients.energies[name] for name in space.layers] if energies else None,
        space.manifest.coefficients_dtype,
    )


def _link_files(space: StoredSubspace, root: Path, *, moments: bool) -> None:
    """Link the old files, with or without the moments, into a new folder."""
    link_all(space.path, root, (file for file in space.files() if moments or file != MOMENTS))
    space.check_current()


def _with_growth(
    manifest: Manifest,
    space: StoredSubspace,
    new: Zoo,
    root: Path,
    energy: float,
    growth: Growth,
) -> Manifest:
    """Update the report's number of models, bytes and lost energy. Its layers are not changed."""
    sizes = space.report["bytes"]
    num_models = len(manifest.models)
    counted = count_bytes(
        root, manifest.models, len(space.layers), sizes["zoo"] + new.layer_bytes, sizes["whole_zoo"] + new.num_bytes
    )
    report = {
        **space.report,
        "num_models": num_models,
        "bytes": vars(counted),
        "growth": plain(growth),
        "energy": energy,
        "alone": [],
        PROVENANCE: joined(space.report, provenance(new)),
    }
    report["residual"] = sum(manifest.discarded.values()) / energy if energy > 0 else 0.0
    return manifest.model_copy(update={"report": report})


def _refresh(why: str, exact: bool) -> str:
    if not why:
        return "fitted anew on all models' files"
    if exact:
        return f"fitted anew on all models: {why}, but the bundle holds the old models' own factors"
    return (
        f"fitted anew on what the bundle knows of the old models, since {why}; discarded is an upper bound of all that they have "
        "lost"
    )


def _extension(space: StoredSubspace, why: str, exact_moments: bool, inside: bool) -> str:
    if exact_moments:
        return "the basis is unchanged and the moments are exact"
    if inside:
        return f"the basis is unchanged; {why}, so the moments are exact inside the kept subspace only"
    missing = "" if not why or "imported" in space.report else f"{why}, and "
    return f"the basis is unchanged; {missing}the bundle has no moments"


def _refreshed(
    space: Space,
    new: Zoo,
    originals: Zoo | None,
    why: str,
    moments: Mapping[str, LayerMoments] | None,
    progress: Progress,
    started: float,
    workspace: str | os.PathLike[str] | None,
) -> Space:
    """Fit the basis again, to the old files and their moments or to the old models as the bundle has them."""
    old_models, whole = originals, None
    if old_models is None:
        recalled = recall(space)
        old_models, whole = Zoo(recalled.models, space.names, space.selection, new.base), recalled.whole
        moments = None
    zoo = _joined(space, old_models, new)
    folder = TemporaryFolder(workspace)
    try:
        root = Path(folder.name)
        with opened_workers(None) as workers, opened_cache(zoo, enabled=False) as moments_cache:
            fitting = Fitting(workers, moments_cache, Work(), root)
            layers = fit_layers(zoo, _options(space), _layer_options(space), progress, fitting, _usable(space, moments))
            manifest = write_subspace(zoo, _options(space), layers, root, started)
        manifest = _after_refresh(space, new, manifest, why, whole, Path(folder.name))
    except BaseException:
        folder.cleanup()
        raise
    space.check_current()
    written = layers.basis.records
    return type(space)(root, manifest, base=space._base, keep=folder, checksums=written, snapshot=space.snapshot)


def _usable(space: StoredSubspace, moments: Mapping[str, LayerMoments] | None) -> dict[str, LayerMoments]:
    """Return the moments that a refresh need not collect. A bundle stores them for axis `models` only."""
    if space.axes != ("models",) or space.manifest.center != "models":
        return {}
    return {name: recentered(layer) for name, layer in (moments or {}).items()}


def _after_refresh(
    space: StoredSubspace, new: Zoo, manifest: Manifest, why: str, whole: frozenset[str] | None, root: Path
) -> Manifest:
    """Restore the records of recalled models, and add the earlier loss of those that were not `whole`.

    The loss is a share of the originals' energy, so never more than all of it: of axis `models` a loss of this order
    adds up exactly, and for sides a bound above the energy tells no more than that all may be lost.
    """
    discarded = dict(manifest.discarded)
    report = dict(manifest.report)
    if "imported" in space.report:
        # The loss of the other tool stays unknown.
        report |= {key: space.report[key] for key in ("imported", "warnings")}
    if whole is not None:
        restored = restore_records(space, manifest, root, whole)
        energies = restored.energies
        discarded = {name: min(discarded[name] + restored.lost[name], energies[name]) for name in discarded}
        sizes = space.report["bytes"]
        counted = count_bytes(
            root, restored.models, len(space.layers), sizes["zoo"] + new.layer_bytes, sizes["whole_zoo"] + new.num_bytes
        )
        report |= {"bytes": vars(counted), "energy": sum(energies.values())}
        report["residual"] = share_of(sum(discarded.values()), report["energy"])
        report["layers"] = {
            name: {**layer, "energy": energies[name], "residual": share_of(discarded[name], energies[name])}
            for name, layer in report["layers"].items()
        }
        manifest = manifest.model_copy(update={"models": restored.models, "discarded": discarded})
    exact = not why or whole == frozenset(space.names)
    report[PROVENANCE] = joined(space.report, provenance(new))
    growth = Growth(new.names, exact, True, sum(discarded.values()), _refresh(why, exact))
    return manifest.model_copy(update={"report": {**report, "growth": plain(growth)}})


def _options(space: StoredSubspace) -> FitOptions:
    """Return the options of the fit."""
    return recorded_options(space.manifest.options)


def _layer_options(space: StoredSubspace) -> dict[str, FitOptions]:
    """Return every layer's ranks as its options if a budget or an error bound chose them."""
    if not _options(space).bounded:
        return {}
    sizes = {"outputs": 0, "inputs": 1}
    return {
        name: replace(
            _options(space),
            rules={
                axis: basis.ranks.get(axis, basis.layer.shape[sizes.get(axis, 0)]) for axis in _options(space).rules
            },
        )
        for name, basis in space.layers.items()
    }
