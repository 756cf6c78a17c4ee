"""Fit a zoo: moments, ranks and bases layer by layer, and every model's coefficients."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.formats.basis_files import BasisFiles, BasisWriter
from eigenzoo.formats.bundle import open_basis
from eigenzoo.formats.manifest import SCHEMA_VERSION, Manifest, ModelRecord, make_manifest
from eigenzoo.linalg.gram import squared_distances
from eigenzoo.records import FitReport, Progress, no_progress, plain
from eigenzoo.subspace.allocation import allocate
from eigenzoo.subspace.basis import PARTS, STACKED, TUCKER, form_of
from eigenzoo.subspace.bytes import count_bytes
from eigenzoo.subspace.layer_fit import FittedLayer, fit_layer
from eigenzoo.subspace.moments import LayerMoments, collect, recentered
from eigenzoo.subspace.options import FitOptions, Rank, check_against, resolve_options
from eigenzoo.subspace.storage import identify, layer_record, read_basis, source_record, write_model, write_moments
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.stack import BLOCK_BYTES
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zoo import Zoo, open_zoo

DUPLICATE = 1e-10
"""Squared distance over mean energy below which two models are the same function: 1e-5 of the norm, float32 factors' round-off."""

LEAST_MEMORY = 16 * 2**20
"""The least `max_memory`: with less, a block would be a few rows."""


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
    max_memory: int | None = None,
    progress: Progress = no_progress,
    workspace: str | os.PathLike[str] | None = None,
) -> Subspace:
    """Fit the truncated zero-centred higher-order SVD of a zoo, layer by layer.

    Args:
        zoo: an opened zoo, or what `open_zoo` takes.
        rank: directions per truncated axis: a number, a share of the variance in (0, 1] (1.0 is everything), "auto"
            (parallel analysis against the norm-matched null; the default), or a mapping of axes to these. A number
            above what a layer has means all of it.
        axes: any of `models`, `outputs`, `inputs`; by default the axes that `rank` names, else `models`.
        center: what is removed first: the models' mean, its `columns` means, `none`, or one `global` scalar.
        dtype: what bases are stored in.
        budget: bytes that the whole bundle may have; spent over all layers where it lowers the error most.
        max_error: the share of the analysed energy that may be lost; met with as few bytes as the same rule finds.
        seed: of the null's draws and the folds.
        view, base, include, exclude: as in `open_zoo`; given here they choose anew.
        max_memory: bytes that blocks of weights may take in all.
        progress: called as progress(stage, done, total).
        workspace: a folder on the disk where the bundle will be saved; bases are written there first.

    Returns:
        A Subspace. Its basis lies in a temporary folder that goes with it; `save` keeps it.

    Raises:
        RankError, BudgetError, MismatchError, DataError: with layer, model, rule and next step.

    Cost: one read of the weights and N²·D products per layer for the moments, a second read and K·N·D for the basis;
    memory a few blocks, the moments, and one layer's cores. Error in-sample is optimal for one axis (Eckart–Young),
    within √(number of axes) of the best for more.
    """
    started = time.perf_counter()
    source = opened(zoo, view, base, include, exclude)
    options = resolve_options(rank, axes, center, dtype, budget, max_error, seed)
    check_against(options, source.view, len(source))
    block_bytes = block_bytes_of(max_memory)
    per_layer = allocate(source, options, block_bytes, progress)
    folder = tempfile.TemporaryDirectory(prefix=".eigenzoo-", dir=workspace)
    try:
        manifest = write_subspace(
            source, options, per_layer, Path(folder.name), progress, started, block_bytes=block_bytes
        )
    except BaseException:
        folder.cleanup()
        raise
    return Subspace(Path(folder.name), manifest, base=source.base, keep=folder)


def block_bytes_of(max_memory: int | None) -> int:
    """Return the bytes of one block of weights where all may take `max_memory`; an eighth, since centering and products copy."""
    if max_memory is None:
        return BLOCK_BYTES
    if max_memory < LEAST_MEMORY:
        raise UsageError(f"{max_memory:,} bytes of memory", rule=f"blocks take at least {LEAST_MEMORY:,} bytes")
    return max(2**20, min(BLOCK_BYTES, max_memory // 8))


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


def write_subspace(
    zoo: Zoo,
    options: FitOptions,
    per_layer: Mapping[str, FitOptions],
    folder: Path,
    progress: Progress,
    started: float,
    *,
    block_bytes: int = BLOCK_BYTES,
    moments: Mapping[str, LayerMoments] | None = None,
) -> Manifest:
    """Fit layer after layer into `folder`; where the moments of the models axis are known already, the pass for them is saved."""
    fitted, collected = _fit_layers(zoo, options, per_layer, folder, progress, block_bytes, moments or {})
    basis_id = identify(open_basis(folder).paths)
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
        options=plain(options),
        base=source_record(zoo.base, folder) if zoo.view == "delta" and zoo.base is not None else None,
        layers=[
            layer_record(zoo.layers[name], layer.form, layer.ranks, layer.has_mean) for name, layer in fitted.items()
        ],
        models=models,
        discarded={name: float(layer.outside_N.sum()) for name, layer in fitted.items()},
        report=_report(zoo, options, fitted, collected, folder, models, started).to_dict(),
        files={},
    )


def _fit_layers(
    zoo: Zoo,
    options: FitOptions,
    per_layer: Mapping[str, FitOptions],
    folder: Path,
    progress: Progress,
    block_bytes: int,
    known: Mapping[str, LayerMoments],
) -> tuple[dict[str, FittedLayer], dict[str, LayerMoments]]:
    """Only the Gram of a layer's moments outlives it."""
    form = form_of({layer.kind for layer in zoo.layers.values()}, options.axes)
    writer = BasisWriter(folder, list(zoo.layers), PARTS[form])
    fitted: dict[str, FittedLayer] = {}
    moments: dict[str, LayerMoments] = {}
    try:
        for number, name in enumerate(zoo.layers):
            # "Everything" is meant to the last bit, where float32 products would lose the smallest directions.
            stack = zoo.stack(name, exact=per_layer.get(name, options).wants_everything)
            if name in known and options.axes == ("models",) and options.center == "models":
                whole = recentered(known[name])
            else:
                whole = collect(stack, options.axes, options.center, block_bytes)
            layer = fit_layer(stack, whole, per_layer.get(name, options), writer)
            fitted[name] = replace(layer, coefficients=layer.coefficients.float())
            moments[name] = replace(whole, outputs=None, inputs=None)
            progress("fitting layers", number + 1, len(zoo.layers))
        basis = writer.finish()
    finally:
        writer.close()
    if options.torch_dtype.itemsize < 4:
        fitted = {name: _as_stored(zoo, layer, moments[name], options, basis) for name, layer in fitted.items()}
    return fitted, moments


def _captured(fitted: FittedLayer, moments: LayerMoments, outside_N: Tensor) -> float:
    """Share of the variance that a rounded basis holds; below zero where it is worse than the mean."""
    if fitted.form == TUCKER and fitted.record.captured is not None:
        # The mean of updates lies in the basis too: what is lost of it is no loss of variance.
        return min(fitted.record.captured, 1 - float(outside_N.sum()) / moments.variance)
    return 1 - float(outside_N.sum()) / moments.variance


def _as_stored(
    zoo: Zoo, fitted: FittedLayer, moments: LayerMoments, options: FitOptions, basis: BasisFiles
) -> FittedLayer:
    """Project all models anew onto a basis that half precision has moved: what is stated is what is stored."""
    name = fitted.name
    record = layer_record(zoo.layers[name], fitted.form, fitted.ranks, fitted.has_mean)
    stored, stack = read_basis(record, options.center, basis), zoo.stack(name)
    projections = [stored.project(stack, place) for place in range(len(zoo))]
    outside_N = torch.tensor([projection.outside for projection in projections], dtype=torch.float64)
    energy = float(moments.energies_N.sum())
    return replace(
        fitted,
        coefficients=torch.stack([projection.coefficients for projection in projections]),
        outside_N=outside_N,
        record=replace(
            fitted.record,
            residual=float(outside_N.sum()) / energy if energy > 0 else 0.0,
            captured=None if fitted.record.captured is None else _captured(fitted, moments, outside_N),
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
        duplicates=find_duplicates(zoo.names, moments.values()),
        bytes=count_bytes(folder, models, len(zoo.layers), zoo.layer_bytes, zoo.num_bytes),
        left_out=zoo.left_out,
        skipped=zoo.skipped,
        warnings=(*zoo.warnings, *_dtype_warnings(options, fitted.values())),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
    )


def _dtype_warnings(options: FitOptions, fitted: Iterable[FittedLayer]) -> list[str]:
    if options.dtype == "float32" or not any(layer.form == STACKED for layer in fitted):
        return []
    return [f"dtype {options.dtype} has no effect on axis models of updates: the factors keep the dtype of their files"]


def find_duplicates(names: Sequence[str], moments: Iterable[LayerMoments]) -> tuple[tuple[str, str], ...]:
    """Return pairs of models whose analysed layers agree to 1e-5 of their norm, whatever the factors they are stored as."""
    distances = energies = None
    for layer in moments:
        distances = squared_distances(layer.gram_NN) + (0 if distances is None else distances)
        energies = layer.energies_N + (0 if energies is None else energies)
    if distances is None or energies is None:
        return ()
    close = distances <= DUPLICATE * (energies[:, None] + energies[None, :]) / 2
    pairs = close.triu(1).nonzero().tolist()
    return tuple((names[first], names[second]) for first, second in pairs)


def peak_memory() -> int:
    """Return the process's peak resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
