"""Convert other tools' subspaces to bundles with the same means, directions and loadings, without reading a model.

    tool                      axes              form of a factor
    vLoRA                     models            form `flat`: mean + Σ c_k V_k, each V_k a whole factor
    components and loadings   outputs, inputs   form `tucker` without a mean: C · Vᵀ for A, U · C for B

View `factors`: A and s·B of a module are two layers, so the scale s of an adapter's config goes into the mean and the coefficients
of B. The models of such a bundle are the adapters that the tool rebuilds. Its files do not contain its loss of the originals, so
residuals are zero, relative to those adapters. There are no moments.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

from torch import Tensor

from eigenzoo.errors import FormatError, UsageError
from eigenzoo.formats.bundle.basis_files import BasisWriter
from eigenzoo.formats.bundle.folder import file_record
from eigenzoo.formats.bundle.manifest import Manifest, ModelRecord, SourceRecord, make_manifest
from eigenzoo.formats.paths import list_folder
from eigenzoo.formats.subspaces.adapter_like import AdapterLike, made_like, read_like, templates
from eigenzoo.formats.subspaces.factors import FACTORS, ForeignSubspace
from eigenzoo.formats.subspaces.subspace_adapters import SubspaceAdapters, is_subspace_adapter
from eigenzoo.formats.subspaces.vlora_folder import VloraFolder, is_vlora
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import local_workers
from eigenzoo.records import FitReport, Progress, no_progress, plain
from eigenzoo.subspace.bases.basis import FLAT, MAX_TENSORS, TUCKER, BasisTensors
from eigenzoo.subspace.bases.flat import ORTHONORMAL
from eigenzoo.subspace.bundles.storage import identify, write_model
from eigenzoo.subspace.fitting.bytes import count_bytes
from eigenzoo.subspace.fitting.options import FitOptions, plain_options
from eigenzoo.subspace.imports.imported_layers import ImportedLayer, factor_layer, import_flat, import_side, scaled
from eigenzoo.subspace.moments.duplicates import find_copies
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.sources import name_models

Folders = str | os.PathLike[str] | Iterable["str | os.PathLike[str]"]


@own_settings()
def import_subspace(
    source: Folders,
    *,
    like: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    components: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    workspace: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> Subspace:
    """Convert another tool's subspace of LoRA adapters. `rebuild` then gives the same adapters as that tool.

    Args:
        source: a folder saved by vLoRA; or adapters with components and loadings: one, several, or a folder of them.
        like: one of the original adapters, or its adapter_config.json. It provides the scale, the keys, and all tensors that are
            not factors.
        alpha: the adapters' alpha, instead of `like`. alpha = rank gives a scale of 1. The tools store neither.
        components: file with the components, for adapters that have only loadings.
        allow_pickle: also read adapter_model.bin and pickled components (only tensors are unpickled).
        workspace: a folder on the disk where the bundle will be saved; the bundle is built there.
        progress: called as progress(stage, done, total).

    Returns:
        A Subspace of view `factors` without moments. Its files are in a temporary folder that is deleted with it; `save` keeps it.

    Raises:
        FormatError, MismatchError, DataError: with the file, the tensor, the rule and the next step.

    Cost: one read of the tool's files, and K²·D products a factor; memory one factor's directions in float64, twice.
    """
    foreign = open_foreign(source, components=components, allow_pickle=allow_pickle)
    chosen = _like(foreign, like, alpha)
    folder = tempfile.TemporaryDirectory(prefix=".eigenzoo-", dir=workspace)
    try:
        manifest = _write(foreign, chosen, Path(folder.name), progress)
        space = Subspace(Path(folder.name), manifest, keep=folder)
        models = [space.coefficients(name) for name in space.names]
        space.report["duplicates"] = plain(find_copies(models, space.names, space.all_coefficients))
    except BaseException:
        folder.cleanup()
        raise
    return space


def open_foreign(
    source: Folders, *, components: str | os.PathLike[str] | None = None, allow_pickle: bool = False
) -> ForeignSubspace:
    """Recognise by names and headers the tool that wrote a folder, and open it."""
    paths = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(path) for path in source]
    missing = [path for path in paths if not path.is_dir()]
    if missing or not paths:
        raise FormatError("there is no such folder", where=str(missing[0]) if missing else "import", rule=_KINDS)
    if any(is_vlora(path) for path in paths):
        if len(paths) > 1 or components is not None:
            raise UsageError("a folder of vLoRA is imported alone, and has its components", where=str(paths[0]))
        return VloraFolder(paths[0])
    folders = [folder for path in paths for folder in _adapters_at(path)]
    return SubspaceAdapters(
        folders, name_models(folders), components=Path(components) if components else None, allow_pickle=allow_pickle
    )


_KINDS = (
    "imported are a folder that vLoRA saved (subspace_meta.json) and adapters of components and loadings "
    "(adapter_model.safetensors), or a folder of these"
)


def _adapters_at(path: Path) -> list[Path]:
    """Return the folders of adapters of components and loadings: the folder itself, or folders in it."""
    if is_subspace_adapter(path):
        return [path]
    children = [path / name for name in list_folder(path) if not name.startswith((".", "_"))]
    adapters = [child for child in children if child.is_dir() and is_subspace_adapter(child)]
    if not adapters:
        raise FormatError("no subspace of another tool is here", where=str(path), rule=_KINDS)
    return adapters


def _like(foreign: ForeignSubspace, like: str | os.PathLike[str] | None, alpha: float | None) -> AdapterLike:
    if (like is None) == (alpha is None):
        ranks = sorted({shape_a[0] for shape_a, _ in foreign.shapes.values()})
        raise UsageError(
            "both like and alpha are given" if like is not None else "the scale of the adapters is not known",
            where=str(foreign.path),
            rule="its files hold no alpha, and an adapter counts alpha / rank times",
            next_step="name one of the adapters or its adapter_config.json (like=, --like), or give alpha (alpha=, --alpha); "
            f"alpha = {' or '.join(map(str, ranks[:3]))}, the rank, is a scale of 1",
        )
    return read_like(Path(like)) if like is not None else made_like(foreign, float(alpha or 0.0))


def _write(foreign: ForeignSubspace, like: AdapterLike, folder: Path, progress: Progress) -> Manifest:
    """Write bases, coefficients and contents into `folder`, and return the manifest."""
    made, scales, notes = templates(foreign, like)
    form = FLAT if foreign.axes == ("models",) else TUCKER
    names = [f"{module}.{factor}" for module in foreign.shapes for factor in FACTORS]
    writer = BasisWriter(folder, names, MAX_TENSORS[form])
    layers: dict[str, ImportedLayer] = {}
    try:
        task = partial(_import_factor, foreign, scales)
        with local_workers() as workers:
            for name, (layer, tensors) in workers.each("importing layers", task, names, progress):
                layers[name] = layer
                for part, tensor in tensors.items():
                    writer.append(part, tensor)
        basis_id = identify(writer.finish())
    finally:
        writer.close()
    models = [
        write_model(
            folder,
            name,
            basis_id,
            [layer.coefficients[index] for layer in layers.values()],
            [0.0] * len(layers),
            made[index],
            SourceRecord(path=os.path.relpath(foreign.sources[index].resolve(), folder.resolve()), files={}),
            [float(layer.energies_N[index]) for layer in layers.values()],
        )
        for index, name in enumerate(foreign.names)
    ]
    most = {axis: max(layer.fit.rank[axis] for layer in layers.values()) for axis in foreign.axes}
    if form == FLAT:  # the ranks of a refresh, which has at least one more model
        most["models"] = min(most["models"], len(models))
    center = "models" if form == FLAT else "none"
    options = FitOptions(foreign.axes, dict(most), center, "float32", None, None, 0)
    return make_manifest(
        eigenzoo_version=version("eigenzoo"),
        basis_id=basis_id,
        view="factors",
        axes=list(foreign.axes),
        center=center,
        dtype="float32",
        options=plain_options(options),
        base=None,
        layers=[layer.record for layer in layers.values()],
        models=models,
        discarded=dict.fromkeys(layers, 0.0),
        report=_report(foreign, layers, models, folder, center, notes),
        files={},
    )


def _import_factor(
    foreign: ForeignSubspace, scales: Mapping[str, float], name: str
) -> tuple[ImportedLayer, dict[str, Tensor]]:
    """Read one factor. Return it as a layer of a bundle, with the tensors of its basis."""
    module, _, factor = name.rpartition(".")
    scaled_factor = scaled(foreign.factor(module, factor), scales[module] if factor == "lora_B" else 1.0)
    layer = factor_layer(name, foreign.shapes[module][FACTORS.index(factor)], foreign.dtype)
    tensors = BasisTensors()
    import_one = import_flat if foreign.axes == ("models",) else import_side
    return import_one(layer, scaled_factor, tensors), tensors.tensors


def _report(
    foreign: ForeignSubspace,
    layers: Mapping[str, ImportedLayer],
    models: Sequence[ModelRecord],
    folder: Path,
    center: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    num_bytes = len(models) * sum(layer.record.num_bytes for layer in layers.values())
    report = FitReport(
        num_models=len(models),
        num_layers=len(layers),
        view="factors",
        center=center,
        axes=foreign.axes,
        layers={name: layer.fit for name, layer in layers.items()},
        energy=sum(layer.fit.energy for layer in layers.values()),
        residual=0.0,
        duplicates=(),
        bytes=count_bytes(folder, models, len(layers), num_bytes, num_bytes),
        left_out=(),
        skipped=(),
        warnings=(*_warnings(foreign, layers), *foreign.notes, *notes),
        seconds=0.0,
        peak_memory=0,
    )
    files = {os.path.relpath(file, foreign.path): plain(file_record(file).model_dump()) for file in foreign.files}
    return {**report.to_dict(), "imported": {"tool": foreign.tool, "files": files}}


def _warnings(foreign: ForeignSubspace, layers: Mapping[str, ImportedLayer]) -> list[str]:
    warnings = [
        f"imported from {foreign.tool}: the models are the adapters that it rebuilds, and residuals are zero against those. What "
        "it had lost of the originals its files do not say; there are no moments; the models' bytes are those of their factors"
    ]
    deviations = [layer.deviation for layer in layers.values() if layer.deviation > ORTHONORMAL]
    if deviations:
        warnings.append(
            f"the directions of {len(deviations)} of {len(layers)} layers were not orthonormal ({_leaning(max(deviations))}); "
            "they were made so and the coefficients turned with them, which changes nothing of what is rebuilt"
        )
    return warnings


def _leaning(deviation: float) -> str:
    return f"|VVᵀ − 1| up to {deviation:.1e}" if deviation < inf else "of some there are more than dimensions"
