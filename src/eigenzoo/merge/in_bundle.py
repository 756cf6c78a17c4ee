"""Merge models of a bundle by their coefficients. The result is a file of coefficients, exact inside the subspace.

    tucker:   X̂_t = U (C̄ + C_t) Vᵀ        the whole cores C̄ + C_t are updates in an orthonormal frame: every method applies
    others:   X̂_t = M + L(c_t)            only averages stay in M + L(c): their weights sum to 1

Legend: T models, P and Q the sides of a core, K coefficients of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import UnsupportedError, UsageError
from eigenzoo.linalg.core_frame import truncate
from eigenzoo.linalg.lora import Factors
from eigenzoo.linalg.spectrum import largest_singular_value
from eigenzoo.merge.certificate import Certificate, LayerSums, certify, compare
from eigenzoo.merge.layer_updates import Combination, Product, UpdatesInMemory, values_of
from eigenzoo.merge.request import Job, Request
from eigenzoo.merge.trimming import with_thresholds
from eigenzoo.records import Progress, telling
from eigenzoo.subspace.bases.basis import LayerBasis
from eigenzoo.subspace.bases.tucker import TuckerBasis
from eigenzoo.subspace.coefficient_file import save_coefficients
from eigenzoo.subspace.subspace import Subspace

AVERAGES = ("mean", "linear")
"""Methods whose weights sum to 1."""


class MergedCoefficients:
    """Models of a bundle merged into one.

    Attributes:
        coefficients: of the merged model, by layer; `Subspace.rebuild` takes a file of them.
        certificate: what the merge lost, what is left of each source, and what of each source lies outside the subspace.
    """

    def __init__(self, space: Subspace, coefficients: Mapping[str, Tensor], certificate: Certificate) -> None:
        self._space, self.coefficients, self.certificate = space, coefficients, certificate

    def __repr__(self) -> str:
        return f"MergedCoefficients({self.certificate!r})"

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write a file of coefficients, and return its path. It appears complete or not at all.

        `force` replaces an existing file of coefficients, but no other file.
        """
        return save_coefficients(self.coefficients, self._space, path, force=force)


def merge_in_bundle(
    space: Subspace, names: Sequence[str], jobs: Mapping[str, Job], started: float, progress: Progress
) -> MergedCoefficients:
    """Merge models of a bundle.

    Raises:
        UsageError: for names that are not in the bundle.
        UnsupportedError: where the merge does not stay in the subspace.
    """
    request = next(iter(jobs.values())).request
    if request.method.kind == "factors":
        raise UnsupportedError(f"method {request.method.name} in a bundle", next_step="merge the models' own files")
    for name in names:
        last = os.path.basename(os.path.normpath(name))
        if name not in space.names and last != name and last in space.names and not os.path.isfile(name):
            raise UsageError(
                f"no model is called {name!r}",
                where=str(space.path),
                rule="models of a bundle are named, not their files",
                next_step=f"write {last}",
            )
    models = [space.coefficients(name) for name in names]

    precision = torch.finfo(getattr(torch, space.manifest.coefficients_dtype)).eps

    def values(name: str) -> Tensor:
        return torch.stack([model.values[name].double() for model in models])

    def cores(job: Job) -> UpdatesInMemory:
        name = job.context.layer
        whole_TPQ = values(name) + space.layers[name].removed()
        halves = [_without_round_off(core, precision) for core in whole_TPQ]
        return UpdatesInMemory(job.context, halves=halves, factors=halves)

    if all(_has_cores(basis) for basis in space.layers.values()):
        jobs = with_thresholds(jobs, cores)
    coefficients, layers = {}, {}
    for name, basis in telling(progress, "merging layers", space.layers.items()):
        if _has_cores(basis):
            coefficients[name], layers[name] = _merge_cores(basis, cores(jobs[name]), request)
        else:
            coefficients[name], layers[name] = _average(basis, values(name), jobs[name])
    certificate = certify(
        request,
        dict(zip(names, jobs[name].context.weights_T.tolist(), strict=True)),
        layers,
        4 * sum(basis.num_coefficients for basis in space.layers.values()),
        started,
        outside={name: model.residual for name, model in zip(names, models, strict=True)},
    )
    return MergedCoefficients(space, coefficients, certificate)


def _has_cores(basis: LayerBasis) -> bool:
    """Tell whether each model's update is a core of its own, with the mean in it."""
    return isinstance(basis, TuckerBasis) and basis.layer.kind == "update" and "models" not in basis.ranks


def _without_round_off(core_PQ: Tensor, precision: float) -> Factors:
    """Return a core as two factors, without the singular values that are the rounding of stored coefficients.

    Methods that make all singular values equal, or divide by them, would make such directions as large as any other.
    """
    identity = torch.eye(core_PQ.shape[0], dtype=core_PQ.dtype)
    return truncate(identity, core_PQ, round_off=precision * float(torch.linalg.matrix_norm(core_PQ))).factors


def _merge_cores(basis: LayerBasis, layer: UpdatesInMemory, request: Request) -> tuple[Tensor, LayerSums]:
    result = request.method.merge(layer, **request.options)
    assert not isinstance(result, Product)
    merged, mean, form = values_of(result, layer) * request.scale, basis.removed(), basis.low_rank()
    coefficients = merged - mean
    stored = coefficients.float() if form is None else form.matrices(form.numbers(coefficients).float())
    return coefficients, _sums(merged, stored.double() + mean, layer.whole())


def _sums(merged: Tensor, stored: Tensor, sources_TPQ: Tensor) -> LayerSums:
    values, difference = torch.linalg.svdvals(merged), torch.linalg.svdvals(merged - stored)
    return LayerSums(
        rank=int(torch.linalg.matrix_rank(stored, rtol=torch.finfo(torch.float32).eps * max(stored.shape))),
        energy=float(values.square().sum()),
        lost=float(difference.square().sum()),
        largest=float(values.max()),
        largest_lost=float(difference.max()),
        energies_T=sources_TPQ.square().sum((1, 2)),
        products_T=(sources_TPQ * stored).sum((1, 2)),
    )


def _average(basis: LayerBasis, values_TK: Tensor, job: Job) -> tuple[Tensor, LayerSums]:
    request = job.request
    if request.method.name not in AVERAGES or request.scale != 1:
        raise UnsupportedError(
            f"method {request.method.name}" if request.scale == 1 else f"scale {request.scale:g}",
            where=f"layer '{basis.layer.name}'",
            rule=f"models that are not whole cores stay in the subspace only as averages ({', '.join(AVERAGES)}, scale 1)",
            next_step="fit adapters with --axes outputs,inputs, or merge the models' own files",
        )
    result = request.method.merge(UpdatesInMemory(job.context, values_TPQ=values_TK), **request.options)
    assert isinstance(result, Combination)
    merged = torch.tensordot(result.coefficients_T, values_TK, 1)
    form = basis.low_rank()
    stored = (merged.float() if form is None else form.matrices(form.numbers(merged).float())).double()
    rebuilt = [basis.rebuild(each) for each in (merged, stored, *values_TK)]
    if basis.layer.kind == "update":
        exact, written, *sources = [each for each in rebuilt if isinstance(each, tuple)]
        return merged, compare(exact, truncate(*exact).values, written, sources)
    exact_OI, written_OI, *others = [each.reshape(basis.layer.shape) for each in rebuilt if isinstance(each, Tensor)]
    sums = LayerSums(
        rank=min(basis.layer.shape),
        energy=float(exact_OI.square().sum()),
        lost=float((exact_OI - written_OI).square().sum()),
        largest=largest_singular_value(exact_OI),
        largest_lost=largest_singular_value(exact_OI - written_OI),
        energies_T=torch.stack([each.square().sum() for each in others]),
        products_T=torch.stack([(each * written_OI).sum() for each in others]),
    )
    return merged, sums
