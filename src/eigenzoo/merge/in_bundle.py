"""Merge models of a bundle by their coefficients. The result is a file of coefficients, exact inside the subspace.

    tucker:   X̂_t = U (C̄ + C_t) Vᵀ        the whole cores C̄ + C_t are updates in an orthonormal frame: every method applies
    others:   X̂_t = M + L(c_t)            only averages stay in M + L(c): their weights sum to 1

Legend: T models, P and Q the sides of a core, K coefficients of a layer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import UnsupportedError, UsageError
from eigenzoo.linalg.core_frame import truncate
from eigenzoo.linalg.selection import least_of_largest
from eigenzoo.merge.adapters import CORE, Request
from eigenzoo.merge.certificate import Certificate, LayerCertificate, LayerSums, SourceCertificate, compare, summarise
from eigenzoo.merge.layer_updates import Combination, Context, Product, RowWise, UpdatesInMemory
from eigenzoo.passes.machine import peak_memory
from eigenzoo.records import Progress, telling
from eigenzoo.subspace.bases.basis import LayerBasis
from eigenzoo.subspace.bases.tucker import TuckerBasis
from eigenzoo.subspace.coefficient_file import save_coefficients
from eigenzoo.subspace.subspace import Subspace

SMALL_SIDE = 256
"""Side of a matrix up to which all its singular values are computed to know the largest."""

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


def merge_in_bundle(space: Subspace, names: Sequence[str], request: Request, progress: Progress) -> MergedCoefficients:
    """Merge models of a bundle.

    Raises:
        UsageError: for names that are not in the bundle, and spaces other than its own.
        UnsupportedError: where the merge does not stay in the subspace.
    """
    started = time.perf_counter()
    if request.space != CORE:
        raise UsageError(f"space {request.space!r}", rule="the models of a bundle are merged in its own core")
    models = [space.coefficients(name) for name in names]

    def values(name: str) -> Tensor:
        return torch.stack([model.values[name].double() for model in models])

    share, thresholds_T = request.method.over_model(request.options), None
    if share is not None and all(_has_cores(basis) for basis in space.layers.values()):
        shares = [share] * len(names) if isinstance(share, int | float) else share
        total = sum(basis.num_coefficients for basis in space.layers.values())
        thresholds_T = least_of_largest(
            lambda: ((values(name) + basis.removed()).flatten(1) for name, basis in space.layers.items()),
            [int(each * total) for each in shares],
        )
    results = {
        name: _merge_layer(basis, values(name), names, request, thresholds_T)
        for name, basis in telling(progress, "merging layers", space.layers.items())
    }
    loss, norms, kept = summarise({name: sums for name, (_, sums) in results.items()})
    sources = {
        name: SourceCertificate(weight, norm, share, outside=model.residual)
        for name, weight, norm, share, model in zip(names, request.weights_T.tolist(), norms, kept, models, strict=True)
    }
    coefficients = {name: values for name, (values, _) in results.items()}
    certificate = Certificate(
        method=request.method.name,
        semantics=request.options.get("semantics"),
        space=CORE if request.method.kind == "elements" else None,
        scale=request.scale,
        options=request.options,
        models=sources,
        layers={name: LayerCertificate(sums.rank, sums.loss) for name, (_, sums) in results.items()},
        loss=loss,
        bytes=4 * sum(basis.num_coefficients for basis in space.layers.values()),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
    )
    return MergedCoefficients(space, coefficients, certificate)


def _has_cores(basis: LayerBasis) -> bool:
    """Tell whether each model's update is a core of its own, with the mean in it."""
    return isinstance(basis, TuckerBasis) and basis.layer.kind == "update" and "models" not in basis.ranks


def _merge_layer(
    basis: LayerBasis, values_TK: Tensor, names: Sequence[str], request: Request, thresholds_T: Tensor | None
) -> tuple[Tensor, LayerSums]:
    """Return the coefficients of the merged layer, and the terms of its certificate."""
    if _has_cores(basis):
        return _merge_cores(basis, values_TK, names, request, thresholds_T)
    return _average(basis, values_TK, names, request)


def _merge_cores(
    basis: LayerBasis, values_TPQ: Tensor, names: Sequence[str], request: Request, thresholds_T: Tensor | None
) -> tuple[Tensor, LayerSums]:
    mean = basis.removed()
    cores_TPQ = values_TPQ + mean
    context = Context(basis.layer.name, tuple(names), request.weights_T, request.seed, thresholds_T)
    layer = UpdatesInMemory(context, values_TPQ=cores_TPQ)
    result = request.method.merge(layer, **request.options)
    if isinstance(result, Combination):
        merged = torch.tensordot(result.coefficients_T, cores_TPQ, 1)
    elif isinstance(result, RowWise):
        merged = torch.cat([result.apply(block) for block in layer.blocks()])
    elif isinstance(result, Product):
        raise UnsupportedError(f"method {request.method.name} in a bundle", next_step="merge the models' own files")
    else:
        merged = result
    merged = merged * request.scale
    form = basis.low_rank()
    coefficients = merged - mean
    stored = coefficients.float() if form is None else form.matrices(form.numbers(coefficients).float())
    return coefficients, _sums(merged, stored.double() + mean, cores_TPQ)


def _sums(merged: Tensor, stored: Tensor, sources_TPQ: Tensor) -> LayerSums:
    values, difference = torch.linalg.svdvals(merged), torch.linalg.svdvals(merged - stored)
    return LayerSums(
        rank=int(torch.linalg.matrix_rank(stored)),
        energy=float(values.square().sum()),
        lost=float(difference.square().sum()),
        largest=float(values.max()),
        largest_lost=float(difference.max()),
        energies_T=sources_TPQ.square().sum((1, 2)),
        products_T=(sources_TPQ * stored).sum((1, 2)),
    )


def _average(basis: LayerBasis, values_TK: Tensor, names: Sequence[str], request: Request) -> tuple[Tensor, LayerSums]:
    if request.method.name not in AVERAGES or request.scale != 1:
        raise UnsupportedError(
            f"method {request.method.name} with scale {request.scale:g}",
            where=f"layer '{basis.layer.name}'",
            rule=f"models that are not whole cores stay in the subspace only as averages ({', '.join(AVERAGES)}, scale 1)",
            next_step="fit adapters with --axes outputs,inputs, or merge the models' own files",
        )
    context = Context(basis.layer.name, tuple(names), request.weights_T)
    averages = UpdatesInMemory(context, values_TPQ=values_TK)
    result = request.method.merge(averages, **request.options)
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
        largest=_largest(exact_OI),
        largest_lost=_largest(exact_OI - written_OI),
        energies_T=torch.stack([each.square().sum() for each in others]),
        products_T=torch.stack([(each * written_OI).sum() for each in others]),
    )
    return merged, sums


def _largest(matrix: Tensor) -> float:
    """Return the largest singular value of a dense matrix; of a large one by Lanczos' method."""
    if min(matrix.shape) <= SMALL_SIDE or not bool(matrix.any()):
        return float(torch.linalg.matrix_norm(matrix, 2))
    from scipy.sparse.linalg import svds

    start = torch.ones(min(matrix.shape), dtype=torch.float64).numpy()
    return float(svds(matrix.numpy(), k=1, v0=start, return_singular_vectors=False)[0])
