"""Fit a zoo: moments, ranks and bases layer by layer, and every model's coefficients."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from eigenzoo.errors import UsageError
from eigenzoo.formats.bundle.manifest import Manifest
from eigenzoo.formats.output.held_folder import TemporaryFolder
from eigenzoo.formats.output.whole import clear_errors
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, check_workers, opened_workers
from eigenzoo.records import Progress, no_progress, plain
from eigenzoo.subspace.fitting.allocation import allocate
from eigenzoo.subspace.fitting.bytes import saved_bytes
from eigenzoo.subspace.fitting.fit_layers import Fitting, fit_layers
from eigenzoo.subspace.fitting.options import FitOptions, Rank, check_against, resolve_options
from eigenzoo.subspace.fitting.work import Work, check_workspace, work_folder
from eigenzoo.subspace.fitting.writing import write_subspace
from eigenzoo.subspace.moments.moments_cache import ZooIdentity, opened_cache
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zoo import Zoo, open_zoo


@own_settings()
def fit(
    zoo: Zoo | Source,
    rank: Rank | None = None,
    axes: Iterable[str] | None = None,
    *,
    center: str = "models",
    dtype: str = "float32",
    coefficients_dtype: str = "float32",
    budget: int | None = None,
    max_error: float | None = None,
    seed: int = 0,
    view: str | None = None,
    base: str | os.PathLike[str] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    solver: str = "exact",
    precision: str = "default",
    core_rank: int | str | None = None,
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
        dtype: dtype of the stored bases: "float32", "float64", "bfloat16" or "float16", or in blocks of 64 with a scale each
            "int8" (8.25 bits a value) or "nf4" (4.25). A mean is at least float32.
        coefficients_dtype: dtype of the stored coefficients: "float32", "bfloat16" or "float16".
        budget: largest size of the whole bundle in bytes. The ranks of all layers are chosen for the smallest error.
        max_error: largest share of the analysed energy to lose, with bases and coefficients as stored. The ranks are chosen by
            the same rule for the fewest bytes.
        seed: seed of the null's draws and of the folds.
        view, base, include, exclude: as in `open_zoo`. Values given here replace those of an opened zoo.
        solver: solver for the bases of `outputs` and `inputs`: "exact", from their moments, or "sketch", a randomised range
            finder with a stated bound that does not form an outputs × outputs matrix.
        precision: precision of products: "high" (float64), "default" (float32 about the models' mean, summed in float64; small
            layers in float64) or "fast" (bfloat16 products with float32 sums).
        core_rank: with axes `outputs` and `inputs`, the rank that each model's core is cut to, or "auto": the least at which all
            models of a layer lose no more by the cut than by the sides. A core of P × Q is then stored as two factors of
            R·(P + Q) numbers, where these are fewer. Rebuilt updates have at most this rank. With a budget or an error bound (of
            LoRA updates) "auto" chooses it for each layer together with the ranks of the sides.
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
            weight is read if means and headers alone exceed the budget, and at the end if rounding what is stored alone exceeds
            the error bound.

    Cost: one read of the weights, N²·D products per layer for the moments and K·N·D for the basis. Layers larger than
    `resources.MAX_LAYER_BYTES` are read a second time, and so are all layers with a budget or an error bound. Memory: a few blocks,
    the moments, and one layer's cores. The in-sample error is optimal for one axis (Eckart–Young) and within √(number of axes)
    of the optimum for several.
    """
    options = resolve_options(
        rank, axes, center, dtype, budget, max_error, seed, solver, precision, coefficients_dtype, core_rank
    )
    check_resources(workers, max_memory, device, workspace)
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

    A budget or an error bound applies to the written bundle. If that exceeds it, the bases are computed again from the same
    moments, with ranks for a tighter bound.
    """
    started = time.perf_counter()
    check_against(options, zoo.view, len(zoo))
    check_resources(workers, max_memory, device, workspace)
    workspace_path = None if workspace is None else Path(workspace)
    with clear_errors(workspace_path), ExitStack() as unfinished:
        with (
            opened_workers(workers, max_memory, device) as running,
            opened_cache(zoo, cache, running.resources.device) as moments_cache,
        ):
            _ = moments_cache.identity.files  # read before any value, so that the key belongs to the values
            allocation = allocate(zoo, options, running, moments_cache, progress)
            target, rounds = allocation.bound, 0
            while True:
                per_layer = allocation.per_layer(target)
                key = fit_key(moments_cache.identity, options, per_layer, running)
                with work_folder(workspace_path, key) as (at_work, lasting):
                    work = Work(at_work if lasting else None, list(zoo.layers.values()))
                    fitting = Fitting(running, moments_cache, work, at_work / "bundle" if lasting else at_work)
                    layers = fit_layers(
                        zoo, options, per_layer, progress, fitting, allocation.moments, allocation.leading
                    )
                    # The folder is made this late so that a kill leaves only the work, which the next fit resumes.
                    folder = TemporaryFolder(workspace)
                    unfinished.callback(folder.cleanup)
                    manifest = write_subspace(zoo, options, layers, Path(folder.name), started)
                    rounds += 1
                    measured = _measured(options, manifest, Path(folder.name))
                    target = allocation.tightened(per_layer, measured, rounds)
                if target is None:
                    break
                folder.cleanup()
        # The sizes are read after the pass, whose end reveals whether a file was written to meanwhile.
        unfinished.pop_all()
    return Subspace(Path(folder.name), manifest, base=zoo.base, keep=folder, checksums=layers.basis.records)


def check_resources(
    workers: Workers | None, max_memory: int | None, device: str, workspace: str | os.PathLike[str] | None = None
) -> None:
    """Raise for a device, a memory bound or a workspace that cannot be used, before a pass begins."""
    check_workers(workers, max_memory, device)
    check_workspace(workspace)


def _measured(options: FitOptions, manifest: Manifest, folder: Path) -> float:
    """Return the bounded quantity of the written bundle: its bytes, or the lost share of the energy."""
    return float(manifest.report["residual"]) if options.budget is None else saved_bytes(folder, manifest)


def fit_key(zoo: ZooIdentity, options: FitOptions, per_layer: Mapping[str, FitOptions], workers: Workers) -> str:
    """Return the key of a fit. Fits with the same key give the same bundle, byte for byte."""
    chosen = [plain(options), {name: plain(layer) for name, layer in per_layer.items()}]
    return zoo.zoo_key(version("eigenzoo"), chosen, workers.resources)


def opened(
    zoo: Zoo | Source,
    view: str | None = None,
    base: str | os.PathLike[str] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Zoo:
    """Open a source, or select layers of an opened zoo again."""
    if not isinstance(zoo, Zoo):
        return open_zoo(zoo, view=view, base=base, include=include or (), exclude=exclude or ())
    if base is not None:
        raise UsageError("a base is given beside an opened zoo", next_step="give the base to open_zoo")
    if view is None and include is None and exclude is None:
        return zoo
    return zoo.select(view=view, include=include, exclude=exclude)
