"""Fit a zoo: moments, ranks and bases layer by layer, and every model's coefficients."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.formats.bundle.basis_files import BasisFiles, BasisWriter
from eigenzoo.formats.bundle.manifest import SCHEMA_VERSION, Manifest, ModelRecord, make_manifest
from eigenzoo.formats.output.held_folder import TemporaryFolder
from eigenzoo.formats.output.whole import clear_errors
from eigenzoo.linalg.block_sums import FAST
from eigenzoo.linalg.kernels import BFLOAT16_ROUND_OFF
from eigenzoo.linalg.rank import AUTO
from eigenzoo.passes.machine import peak_memory
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, check_workers, opened_workers
from eigenzoo.records import FitReport, Progress, no_progress, plain
from eigenzoo.subspace.bases.basis import PARTS, STACKED, Projection, form_of
from eigenzoo.subspace.bundles.identity import ZooIdentity
from eigenzoo.subspace.bundles.provenance import KEY as PROVENANCE
from eigenzoo.subspace.bundles.provenance import provenance
from eigenzoo.subspace.bundles.source_records import source_record
from eigenzoo.subspace.bundles.storage import (
    identify,
    layer_record,
    link_or_copy,
    read_basis,
    write_model,
    write_moments,
)
from eigenzoo.subspace.fitting.allocation import allocate
from eigenzoo.subspace.fitting.bytes import count_bytes, saved_bytes
from eigenzoo.subspace.fitting.fit_layers import LayerPass
from eigenzoo.subspace.fitting.layer_tasks import StoredLayer, stored_task
from eigenzoo.subspace.fitting.models_fit import FittedLayer
from eigenzoo.subspace.fitting.options import FitOptions, Rank, check_against, resolve_options
from eigenzoo.subspace.fitting.work import Work, check_workspace, work_folder
from eigenzoo.subspace.moments.duplicates import find_duplicates
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.moments.moments_cache import MomentsCache, opened_cache
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zero_models import zero_models
from eigenzoo.zoo.zoo import Zoo, open_zoo


@own_settings()
def fit(
    zoo: Zoo | Source,
    rank: Rank | None = None,
    axes: Iterable[str] | None = None,
    *,
    center: str = "models",
    dtype: str = "float32",
    budget: int | None = None,
    max_error: float | None = None,
    seed: int = 0,
    view: str | None = None,
    base: str | os.PathLike[str] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    solver: str = "exact",
    precision: str = "default",
    device: str = "cpu",
    max_memory: int | None = None,
    workers: Workers | None = None,
    cache: bool = True,
    progress: Progress = no_progress,
    workspace: str | os.PathLike[str] | None = None,
) -> Subspace:
    """Fit a shared subspace to a zoo: the truncated zero-centred higher-order SVD of each layer.

    Args:
        zoo: an opened zoo, or anything that `open_zoo` accepts.
        rank: directions per truncated axis: a number, a share of the variance in (0, 1] (1.0 keeps all), "auto"
            (parallel analysis against the norm-matched null; the default), or a mapping of axes to these. A number
            larger than a layer's dimension keeps all of the layer.
        axes: any of `models`, `outputs`, `inputs`. Default: the axes in `rank`, else `models`.
        center: what to subtract first: the models' mean, its `columns` means, `none`, or one `global` scalar.
        dtype: dtype of the stored bases.
        budget: largest size of the whole bundle in bytes. The ranks of all layers are chosen for the smallest error.
        max_error: largest share of the analysed energy to lose, with the bases as stored. The ranks are chosen by the same rule
            for the fewest bytes.
        seed: seed of the null's draws and of the folds.
        view, base, include, exclude: as in `open_zoo`. Values given here replace those of an opened zoo.
        solver: solver for the bases of `outputs` and `inputs`: "exact", from their moments, or "sketch", a randomised range
            finder with a stated bound that does not form an outputs × outputs matrix.
        precision: precision of products: "high" (float64), "default" (float32 about the models' mean, summed in float64; small
            layers in float64) or "fast" (bfloat16 products with float32 sums).
        device: device of products: "cpu", "cuda" or "cuda:<number>".
        max_memory: bytes for blocks of weights in all tasks together. Default: a quarter of the machine's memory.
        workers: workers for the tasks instead of this process's threads, such as a cluster (`integrations.cluster`).
        cache: read and write moments in the user's cache folder.
        progress: called as progress(stage, done, total).
        workspace: a folder on the disk where the bundle will be saved. Bases are written there first, and an interrupted fit
            resumes from the finished layers there.

    Returns:
        A Subspace. Its basis is in a temporary folder that is deleted with it; `save` keeps it.

    Raises:
        RankError, BudgetError, MismatchError, DataError: with layer, model, rule and next step. BudgetError is raised before any
            weight is read if means and headers alone exceed the budget, and at the end if half precision alone exceeds the error
            bound.

    Cost: one read of the weights, N²·D products per layer for the moments and K·N·D for the basis. Layers larger than
    `resources.MOST_KEPT` are read a second time, and so are all layers with a budget or an error bound. Memory: a few blocks, the
    moments, and one layer's cores. The in-sample error is optimal for one axis (Eckart–Young) and within √(number of axes) of the
    optimum for several.
    """
    options = resolve_options(rank, axes, center, dtype, budget, max_error, seed, solver, precision)
    check_place(workers, max_memory, device, workspace)
    return fit_as(
        opened(zoo, view, base, include, exclude),
        options,
        device=device,
        max_memory=max_memory,
        workers=workers,
        cache=cache,
        progress=progress,
        workspace=workspace,
    )


def fit_as(
    zoo: Zoo,
    options: FitOptions,
    *,
    device: str = "cpu",
    max_memory: int | None = None,
    workers: Workers | None = None,
    cache: bool = True,
    progress: Progress = no_progress,
    workspace: str | os.PathLike[str] | None = None,
) -> Subspace:
    """Fit an opened zoo with resolved options, such as those that a bundle records (`options.recorded_options`); see `fit`.

    A budget, or an error bound, is one of what is written: where that exceeds it, the bases are made again with ranks for a
    tighter one, from the same moments.
    """
    started = time.perf_counter()
    check_against(options, zoo.view, len(zoo))
    check_place(workers, max_memory, device, workspace)
    place = None if workspace is None else Path(workspace)
    with clear_errors(place), ExitStack() as unfinished:
        with (
            opened_workers(workers, max_memory, device) as running,
            opened_cache(zoo, cache, running.resources.device) as kept,
        ):
            _ = kept.identity.files  # now, before any value is read: of what is read this is to be the key
            allocation = allocate(zoo, options, running, kept, progress)
            target, rounds = allocation.bound, 0
            while True:
                per_layer = allocation.per_layer(target)
                key = fit_key(kept.identity, options, per_layer, running)
                with work_folder(place, key) as (at_work, lasting):
                    work = Work(at_work if lasting else None, list(zoo.layers.values()))
                    fitting = Fitting(running, kept, work, at_work / "bundle" if lasting else at_work)
                    layers = fit_layers(zoo, options, per_layer, progress, fitting, allocation.moments)
                    # Made as late as this: a kill leaves nothing but the work, which the next fit takes up.
                    folder = TemporaryFolder(workspace)
                    unfinished.callback(folder.cleanup)
                    manifest = write_subspace(zoo, options, layers, Path(folder.name), started)
                    rounds += 1
                    measured = _measured(options, manifest, Path(folder.name))
                    target = allocation.tightened(per_layer, measured, rounds)
                if target is None:
                    break
                folder.cleanup()
        # Not before the pass has ended: there it shows whether a file was written to meanwhile.
        unfinished.pop_all()
    return Subspace(Path(folder.name), manifest, base=zoo.base, keep=folder, checksums=layers.basis.records)


def check_place(
    workers: Workers | None, max_memory: int | None, device: str, workspace: str | os.PathLike[str] | None = None
) -> None:
    """Raise for a device, a bound of memory, or a workspace that a pass could only fail on later."""
    check_workers(workers, max_memory, device)
    check_workspace(workspace)


def _measured(options: FitOptions, manifest: Manifest, folder: Path) -> float:
    """Return the quantity that is bounded, of the written bundle: its bytes, or the share of the energy that is lost."""
    return float(manifest.report["residual"]) if options.budget is None else saved_bytes(folder, manifest)


@dataclass(frozen=True)
class Fitting:
    """What a fit works with: workers, kept moments, what is finished already, and the folder that the basis is written into."""

    workers: Workers
    cache: MomentsCache
    work: Work
    folder: Path


def fit_key(zoo: ZooIdentity, options: FitOptions, per_layer: Mapping[str, FitOptions], workers: Workers) -> str:
    """Return the key of a fit: the same key stands for the same bundle, to the byte."""
    chosen = [plain(options), {name: plain(layer) for name, layer in per_layer.items()}]
    return zoo.whole(version("eigenzoo"), chosen, workers.resources)


def opened(
    zoo: Zoo | Source,
    view: str | None = None,
    base: str | os.PathLike[str] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Zoo:
    """Open a source, or choose anew from an opened zoo."""
    if not isinstance(zoo, Zoo):
        return open_zoo(zoo, view=view, base=base, include=include or (), exclude=exclude or ())
    if base is not None:
        raise UsageError("a base is given beside an opened zoo", next_step="give the base to open_zoo")
    if view is None and include is None and exclude is None:
        return zoo
    return zoo.select(view=view, include=include, exclude=exclude)


@dataclass(frozen=True)
class FittedLayers:
    """All layers' fits and moments, their basis, and the folder that holds it and nothing else."""

    fitted: dict[str, FittedLayer]
    moments: dict[str, LayerMoments]
    basis: BasisFiles
    folder: Path


def fit_layers(
    zoo: Zoo,
    options: FitOptions,
    per_layer: Mapping[str, FitOptions],
    progress: Progress,
    fitting: Fitting,
    known: Mapping[str, LayerMoments] | None = None,
) -> FittedLayers:
    """Fit layer after layer. Moments that are `known` are not collected: with those of the sides where an axis needs them."""
    form = form_of({layer.kind for layer in zoo.layers.values()}, options.axes)
    writer = BasisWriter(fitting.folder, list(zoo.layers), PARTS[form], resume=fitting.work.lasts)
    try:
        layers = LayerPass(zoo, options, per_layer, fitting.workers, writer, known or {}, fitting.cache, fitting.work)
        fitted, moments = layers.run(progress)
        basis = writer.finish()
    finally:
        writer.close()
    if options.torch_dtype.itemsize < 4:
        fitted |= _as_stored(zoo, fitted, moments, options, basis, fitting.workers, progress)
    return FittedLayers(fitted, moments, basis, fitting.folder)


def write_subspace(zoo: Zoo, options: FitOptions, layers: FittedLayers, folder: Path, started: float) -> Manifest:
    """Put the basis, all models' coefficients and contents, and the moments into `folder`, and describe it."""
    fitted, collected = layers.fitted, layers.moments
    if layers.folder != folder:
        for path in sorted(layers.folder.iterdir()):
            link_or_copy(path, folder / path.name)
    basis_id = identify(layers.basis)
    models = write_models(zoo, fitted, collected, basis_id, folder)
    write_moments(folder, collected)
    return make_manifest(
        schema_version=SCHEMA_VERSION,
        eigenzoo_version=version("eigenzoo"),
        basis_id=basis_id,
        view=zoo.view,
        axes=list(options.axes),
        center=options.center,
        dtype=options.dtype,
        options={**plain(options), **zoo_options(zoo)},
        base=source_record(zoo.base, folder) if zoo.view == "delta" and zoo.base is not None else None,
        layers=[
            layer_record(zoo.layers[name], layer.form, layer.ranks, layer.has_mean) for name, layer in fitted.items()
        ],
        models=models,
        discarded={name: float(layer.outside_N.sum()) for name, layer in fitted.items()},
        report={
            **_report(zoo, options, fitted, collected, folder, models, started).to_dict(),
            PROVENANCE: provenance(zoo),
        },
        files={},
    )


def zoo_options(zoo: Zoo) -> dict[str, object]:
    """What a manifest's options say of how models are opened; nothing of what is as by default."""
    chosen = zoo.selection
    split = {"split": [str(rule) for rule in chosen.split]} if chosen.split else {}
    return {**split, **({"missing": chosen.missing} if chosen.missing != "error" else {})}


def _captured(exact: float, moments: LayerMoments, outside_N: Tensor) -> float:
    """Share of the variance that a rounded basis holds: never more than the exact one, and none where the mean is no worse.

    The mean of updates lies in a basis of sides too: what is lost of it is no loss of variance.
    """
    return min(exact, max(1 - float(outside_N.sum()) / moments.variance, 0.0))


def _as_stored(
    zoo: Zoo,
    fitted: Mapping[str, FittedLayer],
    moments: Mapping[str, LayerMoments],
    options: FitOptions,
    files: BasisFiles,
    workers: Workers,
    progress: Progress,
) -> dict[str, FittedLayer]:
    """Project all models anew onto bases that half precision has moved: what is stated is what is stored."""
    bases = {}
    for name, layer in fitted.items():
        # Stacked factors keep the dtype of their files, which moves nothing.
        if layer.form != STACKED:
            record = layer_record(zoo.layers[name], layer.form, layer.ranks, layer.has_mean)
            bases[name] = replace(read_basis(record, options.center, files), tensors=StoredLayer(files, name))
    found: dict[str, FittedLayer] = {}
    precision = options.precision_of_products
    tasks = ((name, [partial(stored_task, zoo, name, basis, precision)]) for name, basis in bases.items())
    for name, (projections,) in workers.in_order(tasks, files.num_bytes):
        found[name] = _stated_anew(fitted[name], moments[name], zoo.layers[name].kind, projections)
        progress("projecting on stored bases", len(found), len(bases))
    return found


def _stated_anew(
    fitted: FittedLayer, moments: LayerMoments, kind: str, projections: Sequence[Projection]
) -> FittedLayer:
    """A fitted layer with the coefficients and the losses of these projections."""
    outside_N = torch.tensor([projection.outside for projection in projections], dtype=torch.float64)
    energy = float(moments.energies_N.sum())
    bound = fitted.record.bound
    if bound is not None:
        # What rounding has lost is what a better basis could hold too.
        total = energy if kind == "update" else moments.variance
        bound = max(bound + float(outside_N.sum() - fitted.outside_N.sum()) / total, 0.0)
    return replace(
        fitted,
        coefficients=torch.stack([projection.coefficients for projection in projections]),
        outside_N=outside_N,
        record=replace(
            fitted.record,
            residual=float(outside_N.sum()) / energy if energy > 0 else 0.0,
            captured=None if fitted.record.captured is None else _captured(fitted.record.captured, moments, outside_N),
            bound=bound,
        ),
    )


def write_models(
    zoo: Zoo, fitted: Mapping[str, FittedLayer], moments: Mapping[str, LayerMoments], basis_id: str, folder: Path
) -> list[ModelRecord]:
    """Write every model's coefficients and contents."""
    shares = {
        name: layer.outside_N / moments[name].energies_N.clamp_min(torch.finfo(torch.float64).tiny)
        for name, layer in fitted.items()
    }
    return [
        write_model(
            folder,
            name,
            basis_id,
            [layer.coefficients[place] for layer in fitted.values()],
            [float(share_N[place]) for share_N in shares.values()],
            ZooTemplate(zoo, place),
            source_record(zoo.models[place], folder),
        )
        for place, name in enumerate(zoo.names)
    ]


def _report(
    zoo: Zoo,
    options: FitOptions,
    fitted: Mapping[str, FittedLayer],
    moments: Mapping[str, LayerMoments],
    folder: Path,
    models: Sequence[ModelRecord],
    started: float,
) -> FitReport:
    energy = sum(float(layer.energies_N.sum()) for layer in moments.values())
    lost = sum(float(layer.outside_N.sum()) for layer in fitted.values())
    return FitReport(
        num_models=len(zoo),
        num_layers=len(zoo.layers),
        view=zoo.view,
        center=options.center,
        axes=options.axes,
        layers={name: layer.record for name, layer in fitted.items()},
        energy=energy,
        residual=lost / energy if energy > 0 else 0.0,
        duplicates=find_duplicates(zoo.names, moments.values(), zoo),
        bytes=count_bytes(folder, models, len(zoo.layers), zoo.layer_bytes, zoo.num_bytes),
        left_out=zoo.left_out,
        skipped=zoo.skipped,
        warnings=(
            *_warnings(zoo, options, fitted),
            *zero_models(zoo, {name: layer.energies_N for name, layer in moments.items()}),
        ),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
    )


def _dtype_warnings(options: FitOptions, fitted: Iterable[FittedLayer]) -> list[str]:
    if options.dtype == "float32" or not any(layer.form == STACKED for layer in fitted):
        return []
    return [f"dtype {options.dtype} has no effect on axis models of updates: the factors keep the dtype of their files"]


def _warnings(zoo: Zoo, options: FitOptions, fitted: Mapping[str, FittedLayer]) -> list[str]:
    chosen = [
        *_dtype_warnings(options, fitted.values()),
        *_precision_warnings(options, fitted),
        *_chance_warnings(options, fitted.values()),
    ]
    return [*zoo.warnings, *_left_warnings(zoo), *chosen]


def _left_warnings(zoo: Zoo) -> list[str]:
    """Say what is not in the bundle and will be looked for where the models came from."""
    left = max((len(zoo.left_at_source(place)) for place in range(len(zoo))), default=0)
    if not left:
        return []
    return [
        f"{left} excluded tensors of each model in a store stay there, and are not counted in the bundle's bytes: to rebuild a "
        "whole model they are read from there (rebuild with fetch=True, --fetch)"
    ]


def _precision_warnings(options: FitOptions, fitted: Mapping[str, FittedLayer]) -> list[str]:
    """Name the layers that have fewer directions than asked for because bfloat16 products cannot tell the others from round-off."""
    asked = options.rules.get("models")
    if options.precision != FAST or not isinstance(asked, int):
        return []
    short = [name for name, layer in fitted.items() if 0 < layer.ranks.get("models", asked) < asked]
    if not short:
        return []
    return [
        f"precision 'fast' finds fewer than {asked} directions in {len(short)} layers ({', '.join(short[:3])}"
        f"{', …' if len(short) > 3 else ''}): the others lie below {BFLOAT16_ROUND_OFF:.0e} of the largest variance; "
        "use precision 'default' for them"
    ]


def _chance_warnings(options: FitOptions, fitted: Collection[FittedLayer]) -> list[str]:
    """Say where nothing is kept because nothing is above chance, and what may be asked for instead."""
    axes = [axis for axis, rule in options.rules.items() if rule == AUTO]
    empty = [
        layer for layer in fitted if layer.record.variance > 0 and any(layer.ranks.get(axis) == 0 for axis in axes)
    ]
    if not empty:
        return []
    rebuilt = "the mean" if all(layer.has_mean for layer in empty) else "the mean or zero"
    sides = "" if options.axes != ("models",) else ", or axes outputs,inputs (--axes), for what they share by side"
    return [
        f"no direction is beyond chance in {len(empty)} of {len(fitted)} layers: rebuilt models are {rebuilt} there; "
        f"ask for a number of directions (--rank){sides}"
    ]
