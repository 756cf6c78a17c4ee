"""Write a fitted zoo as the files of a bundle: basis, coefficients, contents and moments, and the manifest with its report."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from eigenzoo.formats.bundle.manifest import Manifest, ModelRecord, make_manifest
from eigenzoo.linalg.block_sums import FAST
from eigenzoo.linalg.kernels import BFLOAT16_ROUND_OFF
from eigenzoo.linalg.rank import AUTO
from eigenzoo.passes.machine import peak_memory
from eigenzoo.records import FitReport
from eigenzoo.subspace.bases.basis import STACKED
from eigenzoo.subspace.bundles.provenance import KEY as PROVENANCE
from eigenzoo.subspace.bundles.provenance import provenance
from eigenzoo.subspace.bundles.source_records import source_record
from eigenzoo.subspace.bundles.storage import identify, layer_record, link_or_copy, write_model, write_moments
from eigenzoo.subspace.fitting.alone import Losses, alone_rows, update_losses
from eigenzoo.subspace.fitting.bytes import count_bytes
from eigenzoo.subspace.fitting.fit_layers import FittedLayers
from eigenzoo.subspace.fitting.models_fit import FittedLayer
from eigenzoo.subspace.fitting.options import FitOptions, plain_options
from eigenzoo.subspace.moments.duplicates import find_duplicates
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zero_models import zero_models
from eigenzoo.zoo.zoo import Zoo


def write_subspace(zoo: Zoo, options: FitOptions, layers: FittedLayers, folder: Path, started: float) -> Manifest:
    """Write the basis, all models' coefficients and contents, and the moments into `folder`. Return the manifest."""
    fitted, collected = layers.fitted, layers.moments
    if layers.folder != folder:
        for path in sorted(layers.folder.iterdir()):
            link_or_copy(path, folder / path.name)
    basis_id = identify(layers.basis)
    models = write_models(zoo, fitted, collected, basis_id, folder, options.coefficients_dtype)
    write_moments(folder, collected)
    return make_manifest(
        eigenzoo_version=version("eigenzoo"),
        basis_id=basis_id,
        view=zoo.view,
        axes=list(options.axes),
        center=options.center,
        dtype=options.dtype,
        options={**plain_options(options), **zoo_options(zoo)},
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
    """Return the options of opening models for a manifest, without those that have their default."""
    chosen = zoo.selection
    split = {"split": [str(rule) for rule in chosen.split]} if chosen.split else {}
    return {**split, **({"missing": chosen.missing} if chosen.missing != "error" else {})}


def write_models(
    zoo: Zoo,
    fitted: Mapping[str, FittedLayer],
    moments: Mapping[str, LayerMoments],
    basis_id: str,
    folder: Path,
    dtype: str = "float32",
) -> list[ModelRecord]:
    """Write every model's coefficients, in `dtype`, and contents."""
    shares = {
        name: layer.outside_N / moments[name].energies_N.clamp_min(torch.finfo(torch.float64).tiny)
        for name, layer in fitted.items()
    }
    return [
        write_model(
            folder,
            name,
            basis_id,
            [layer.coefficients[index] for layer in fitted.values()],
            [float(share_N[index]) for share_N in shares.values()],
            ZooTemplate(zoo, index),
            source_record(zoo.models[index], folder),
            dtype=dtype,
        )
        for index, name in enumerate(zoo.names)
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
        alone=alone_rows(zoo, {name: _losses(layer, moments[name]) for name, layer in fitted.items()}, energy),
    )


def _losses(layer: FittedLayer, moments: LayerMoments) -> Losses | None:
    return layer.alone if moments.singular_NR is None else update_losses(moments.singular_NR)


def _dtype_warnings(options: FitOptions, fitted: Iterable[FittedLayer]) -> list[str]:
    if options.dtype == "float32" or options.coding or not any(layer.form == STACKED for layer in fitted):
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
    """Warn about tensors that are not in the bundle and are read from the models' source."""
    left = max((len(zoo.left_at_source(index)) for index in range(len(zoo))), default=0)
    if not left:
        return []
    return [
        f"{left} excluded tensors of each model in a store stay there, and are not counted in the bundle's bytes: to rebuild a "
        "whole model they are read from there (rebuild with fetch=True, --fetch)"
    ]


def _precision_warnings(options: FitOptions, fitted: Mapping[str, FittedLayer]) -> list[str]:
    """Name the layers with fewer directions than requested, because bfloat16 products cannot separate the others from round-off."""
    wanted_rank = options.rules.get("models")
    if options.precision != FAST or not isinstance(wanted_rank, int):
        return []
    short = [name for name, layer in fitted.items() if 0 < layer.ranks.get("models", wanted_rank) < wanted_rank]
    if not short:
        return []
    return [
        f"precision 'fast' finds fewer than {wanted_rank} directions in {len(short)} layers ({', '.join(short[:3])}"
        f"{', …' if len(short) > 3 else ''}): the others lie below {BFLOAT16_ROUND_OFF:.0e} of the largest variance; "
        "use precision 'default' for them"
    ]


def _chance_warnings(options: FitOptions, fitted: Collection[FittedLayer]) -> list[str]:
    """Warn about layers of rank 0 because no direction is above chance, and name the options."""
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
