"""Verify a subspace: one named check for each rule of docs/bundle-format.md that a reader can check."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch

from eigenzoo.errors import EigenzooError
from eigenzoo.formats.bundle.folder import content_faults, file_fault, model_faults, open_basis, unknown_files
from eigenzoo.formats.bundle.manifest import ModelRecord
from eigenzoo.formats.model import Model
from eigenzoo.passes.workers import Workers, local_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.subspace.bases.basis import ORTHONORMAL, STACKED, LayerBasis, is_finite
from eigenzoo.subspace.bundles.storage import identify, split_coefficients
from eigenzoo.subspace.bundles.verifying_against import checks_against
from eigenzoo.subspace.rebuilt import check_layout
from eigenzoo.subspace.stored import StoredSubspace
from eigenzoo.zoo.base_modules import open_base, shown_base
from eigenzoo.zoo.verification import Check, Loader, Verification, checked


def verify(
    space: StoredSubspace,
    against: str | os.PathLike[str] | Model | None = None,
    loader: Loader | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Run every check on a subspace, and also against a base if one is given.

    Raises BundleError if another process replaces the bundle meanwhile.
    """
    try:
        with local_workers() as workers:
            verification = _verify(space, against, loader, workers, progress)
    except (EigenzooError, OSError):
        space.check_current()
        raise
    space.check_current()
    return verification


def _verify(
    space: StoredSubspace,
    against: str | os.PathLike[str] | Model | None,
    loader: Loader | None,
    workers: Workers,
    progress: Progress,
) -> Verification:
    base = None if against is None else open_base(against)
    num_models, num_layers = len(space.names), len(space.layers)
    checks = [Check("manifest", "follows the format, and so do the headers")]
    manifest, folder = space.manifest, space.path
    if manifest.files:
        compared = workers.each("comparing files", partial(file_fault, folder, manifest), manifest.files, progress)
        broken = tuple(fault for _, fault in compared if fault is not None)
        checks += [
            checked(
                "checksums",
                f"{len(manifest.files)} files have the bytes that the manifest says",
                broken,
                f"{len(broken)} of {len(manifest.files)} files differ from what the manifest says",
            ),
            checked("unknown files", "none", unknown_files(folder, manifest)),
            checked("contents", "what models need besides is there, under its hash", _contents(space)),
            checked("basis id", "the basis is the one that the coefficients belong to", _identity(space)),
        ]
    basis = open_basis(folder)
    read = workers.each("reading bases", partial(is_finite, basis), basis.names, progress)
    spoilt = tuple(f"basis tensor {name}: NaN or Inf" for name, finite in read if not finite)
    checks += [
        checked(
            "finite basis",
            f"{len(basis.names)} tensors without NaN or Inf",
            spoilt,
            f"NaN or Inf in {len(spoilt)} of {len(basis.names)} tensors",
        ),
        _orthonormality(space, workers, progress),
        checked(
            "coefficients",
            f"of {num_models} models, finite, and as many as {num_layers} layers take",
            _coefficients(space, workers, progress),
        ),
        checked("layouts", "every model's files have every layer in its shape", _layouts(space)),
        checked("moments", "finite" if space.has_moments else "none are kept", _moments(space, workers, progress)),
    ]
    if base is None:
        return Verification(str(folder), "bundle", None, tuple(checks))
    more, changes = checks_against(space, base, loader, workers, progress)
    return Verification(str(folder), "bundle", shown_base(base), (*checks, *more), changes)


def _contents(space: StoredSubspace) -> Iterator[str]:
    yield from model_faults(space.path, space.manifest)
    yield from content_faults(space.path, space.manifest)


def _identity(space: StoredSubspace) -> Iterator[str]:
    if identify(open_basis(space.path)) != space.manifest.basis_id:
        yield "basis: it is not the one that the coefficients belong to"


def _orthonormality(space: StoredSubspace, workers: Workers, progress: Progress) -> Check:
    faults, largest, layers = [], 0.0, space.layers
    found = workers.each("multiplying bases", lambda name: _deviation(layers[name]), layers, progress)
    for name, deviation in found:
        if isinstance(deviation, str):
            faults.append(f"layer {name}: {deviation}")
            continue
        # Weights make directions of quantised factors orthonormal as they are stored.
        exact = space.manifest.coding and layers[name].form == STACKED
        if not deviation <= ORTHONORMAL["float32" if exact else space.manifest.dtype]:
            faults.append(f"layer {name}: the basis deviates from orthonormality by {deviation:.1e}")
        largest = max(largest, deviation)
    detail = f"off by at most {largest:.0e}; {ORTHONORMAL[space.manifest.dtype]:.0e} is allowed"
    return Check("orthonormality", detail, tuple(faults))


def _deviation(basis: LayerBasis) -> float | str:
    """How far a layer's directions are from orthonormal, or what is wrong with their codes."""
    try:
        return basis.orthonormality()
    except EigenzooError as error:
        return str(error)


def _coefficients(space: StoredSubspace, workers: Workers, progress: Progress) -> Iterator[str]:
    task = partial(_coefficient_faults, space)
    for _, faults in workers.each("reading coefficients", task, space.manifest.models, progress):
        yield from faults


def _coefficient_faults(space: StoredSubspace, record: ModelRecord) -> list[str]:
    try:
        stored = space.stored(record)
    except EigenzooError as error:
        return [str(error)]
    faults = []
    # The product of finite factors of a core can overflow.
    values = split_coefficients(stored.values, space.layers)
    if not all(bool(torch.isfinite(coefficients).all()) for coefficients in values.values()):
        faults.append(f"model {record.name}: coefficients are NaN or Inf")
    # The residual share of a model that is zero up to round-off may be infinite.
    energies_L = torch.zeros(1) if stored.energies_L is None else stored.energies_L
    if not bool((stored.residuals_L >= 0).all() and (torch.isfinite(energies_L) & (energies_L >= 0)).all()):
        faults.append(f"model {record.name}: residuals or energies are negative or NaN")
    return faults


def _layouts(space: StoredSubspace) -> Iterator[str]:
    """Check each pair of a layout and a config once, because most models of a zoo share them."""
    seen = set()
    for record in space.manifest.models:
        if (record.layout, record.config) in seen:
            continue
        seen.add((record.layout, record.config))
        try:
            template = space.template(record.name)
            check_layout(space.layers, template.layout, record.name)
            _ = template.config
        except (EigenzooError, KeyError) as error:
            yield f"model {record.name}: {error}"


def _moments(space: StoredSubspace, workers: Workers, progress: Progress) -> Iterator[str]:
    if space.has_moments:
        faults = workers.each("reading moments", partial(_moments_fault, space), space.layers, progress)
        yield from (fault for _, fault in faults if fault is not None)


def _moments_fault(space: StoredSubspace, name: str) -> str | None:
    try:
        moments = space.moments(name)
    except EigenzooError as error:
        return str(error)
    values = [
        moments.gram_NN,
        moments.cross_N,
        torch.tensor([moments.reference_energy, moments.round_off], dtype=torch.float64),
    ]
    values += [
        part for part in (moments.shift_N, moments.sums_N, moments.singular_NR, moments.starts_NN) if part is not None
    ]
    finite = all(bool(torch.isfinite(value).all()) for value in values)
    return None if finite else f"layer {name}: its moments are NaN or Inf"
