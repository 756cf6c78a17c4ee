"""Fit one layer: from its moments and rank rules to a written basis and all models' coefficients.

Legend: N models, O outputs, I inputs, P kept outputs, Q kept inputs, K kept directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.linalg.heldout import cross_validated_capture
from eigenzoo.linalg.nulls import axis_null, norm_matched_spectra
from eigenzoo.linalg.rank import AUTO, RankChoice, choose_rank
from eigenzoo.linalg.side import SideMoment
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.records import LayerFit
from eigenzoo.subspace.basis import FLAT, STACKED, TUCKER, TensorWriter
from eigenzoo.subspace.flat import write_flat
from eigenzoo.subspace.heldout import tucker_capture
from eigenzoo.subspace.moments import LARGEST_SIDE, LayerMoments, collect
from eigenzoo.subspace.options import FitOptions
from eigenzoo.subspace.stacked import write_stacked
from eigenzoo.subspace.tucker import Cores, collect_cores, write_tucker
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack


@dataclass(frozen=True)
class FittedLayer:
    """A layer's form and ranks, its coefficients (N, …) in float64, energy lost per model, and its record."""

    name: str
    form: str
    ranks: dict[str, int]
    has_mean: bool
    coefficients: Tensor
    outside_N: Tensor
    record: LayerFit


def fit_layer(stack: Stack, moments: LayerMoments, options: FitOptions, writer: TensorWriter) -> FittedLayer:
    """Choose ranks, write the basis, and return all models' coefficients; `moments` must hold what the axes ask for."""
    if options.axes == ("models",):
        return _fit_models(stack, moments, options, writer)
    return _fit_tucker(stack, moments, options, writer)


def _fit_models(stack: Stack, moments: LayerMoments, options: FitOptions, writer: TensorWriter) -> FittedLayer:
    """Axis `models` alone: everything but the directions themselves follows from the Gram."""
    choice, values_K, vectors_NK = _models_axis(moments.centered_NN, moments, options)
    roots_K = values_K.sqrt()
    weights_NK, coefficients_NK = vectors_NK / roots_K, vectors_NK * roots_K
    if isinstance(stack, UpdateStack):
        write_stacked(stack, moments, weights_NK, writer)
        form, has_mean = STACKED, moments.removed is None
    else:
        coefficients_NK = write_flat(stack, moments, weights_NK, coefficients_NK, options.torch_dtype, writer)
        form, has_mean = FLAT, moments.removed is None or float(moments.removed.abs().max()) > 0
    ranks = {"models": choice.rank}
    outside_N = (moments.centered_NN.diagonal() - coefficients_NK.square().sum(1)).clamp_min(0)
    captured = float(values_K.sum())
    record = _record(stack, moments, options, ranks, {"models": choice.reason}, captured, float(outside_N.sum()))
    return FittedLayer(stack.layer.name, form, ranks, has_mean, coefficients_NK, outside_N, record)


def _models_axis(gram_NN: Tensor, moments: LayerMoments, options: FitOptions) -> tuple[RankChoice, Tensor, Tensor]:
    """Rank, eigenvalues and eigenvectors of the models axis, from the Gram of the layers or of their cores."""
    total = moments.variance
    if total == 0:
        return RankChoice(0, "no variance"), gram_NN.new_zeros(0), gram_NN.new_zeros(gram_NN.shape[0], 0)
    values_N, vectors_NN = eigenpairs(gram_NN, moments.round_off)
    rule, null = options.rules["models"], None
    if rule == AUTO:
        centered = moments.removed is None
        null = norm_matched_spectra(gram_NN.diagonal(), moments.num_values, centered=centered, seed=options.seed)
    choice = choose_rank(rule, values_N, total, null)
    return choice, values_N[: choice.rank], vectors_NN[:, : choice.rank]


def _fit_tucker(stack: Stack, moments: LayerMoments, options: FitOptions, writer: TensorWriter) -> FittedLayer:
    """Axes `outputs` and `inputs` from their moments, then axis `models` from the cores."""
    ranks: dict[str, int] = {}
    reasons: dict[str, str] = {}
    bases: dict[str, Tensor | None] = {"outputs": None, "inputs": None}
    for axis, moment in (("outputs", moments.outputs), ("inputs", moments.inputs)):
        if axis in options.axes and moment is None:
            reasons[axis] = f"kept whole: more than {LARGEST_SIDE:,} {axis}"
        elif axis in options.axes and moment is not None:
            choice, basis = _side(axis, moment, stack, moments, options)
            reasons[axis] = choice.reason
            # A side kept whole needs no basis: U = 1.
            if choice.rank < moment.size:
                ranks[axis], bases[axis] = choice.rank, basis
    cores = collect_cores(stack, moments, bases["outputs"], bases["inputs"])
    coefficients, shared_KPQ = cores.cores_NPQ, None
    if "models" in options.axes:
        choice, coefficients, shared_KPQ = _shared_cores(cores, moments, options)
        ranks["models"], reasons["models"] = choice.rank, choice.reason
    write_tucker(stack.layer.name, cores, bases["outputs"], bases["inputs"], shared_KPQ, options.torch_dtype, writer)
    captured, outside_N = _tucker_energies(stack, moments, cores, coefficients)
    shown = {axis: ranks.get(axis, stack.layer.shape[0 if axis == "outputs" else 1]) for axis in options.axes}
    heldout = None
    if options.center == "models":
        heldout = tucker_capture(
            stack, moments, ranks, lambda part: collect(part, options.axes, options.center), seed=options.seed
        )
    record = _record(stack, moments, options, shown, reasons, captured, float(outside_N.sum()), heldout)
    return FittedLayer(
        stack.layer.name,
        TUCKER,
        ranks,
        cores.mean is not None and cores.mean.numel() > 0,
        coefficients,
        outside_N,
        record,
    )


def _side(
    axis: str, moment: SideMoment, stack: Stack, moments: LayerMoments, options: FitOptions
) -> tuple[RankChoice, Tensor]:
    """Rank and basis (O, P) of the outputs or (I, Q) of the inputs."""
    # Equal updates still have their mean in these moments; equal full weights have round-off only.
    if moments.variance == 0 and (isinstance(stack, DenseStack) or moment.trace <= 0):
        return RankChoice(0, "no variance"), torch.zeros(moment.size, 0, dtype=torch.float64)
    found = moment.eigenvectors()
    rule = options.rules[axis]
    null = None
    if rule == AUTO:
        centered = isinstance(stack, DenseStack) and moments.removed is None
        null = axis_null(moment.size, moments.energies_N, _columns(stack, axis), centered=centered, seed=options.seed)
    choice = choose_rank(rule, found.values_K, moment.trace, null)
    return choice, found.basis(choice.rank)


def _columns(stack: Stack, axis: str) -> float:
    """How many independent columns (rows) one model brings to the outputs' (inputs') moment."""
    if isinstance(stack, UpdateStack):
        return sum(stack.ranks) / len(stack)
    outputs, inputs = stack.layer.shape
    return inputs if axis == "outputs" else outputs


def _shared_cores(cores: Cores, moments: LayerMoments, options: FitOptions) -> tuple[RankChoice, Tensor, Tensor]:
    """PCA of the cores: rank, coefficients (N, K) and shared cores (K, P, Q)."""
    flat_ND = cores.cores_NPQ.flatten(1)
    choice, values_K, vectors_NK = _models_axis(flat_ND @ flat_ND.T, moments, options)
    roots_K = values_K.sqrt()
    shared_KD = (vectors_NK / roots_K).T @ flat_ND
    return choice, vectors_NK * roots_K, shared_KD.view(choice.rank, *cores.cores_NPQ.shape[1:])


def _tucker_energies(stack: Stack, moments: LayerMoments, cores: Cores, coefficients: Tensor) -> tuple[float, Tensor]:
    """Centered energy that is kept, and each model's energy ‖X − X̂‖² that is not.

    Everything dropped is orthogonal to everything kept, so energies subtract; for updates the mean is part of the core.
    """
    kept_N = coefficients.flatten(1).square().sum(1)
    if isinstance(stack, DenseStack):
        return float(kept_N.sum()), (moments.centered_NN.diagonal() - kept_N).clamp_min(0)
    whole = cores.cores_NPQ if cores.mean is None else cores.cores_NPQ + cores.mean
    lost_in_models_N = cores.cores_NPQ.flatten(1).square().sum(1) - kept_N
    outside_N = moments.energies_N - whole.flatten(1).square().sum(1) + lost_in_models_N
    return float(kept_N.sum()), outside_N.clamp_min(0)


def _record(
    stack: Stack,
    moments: LayerMoments,
    options: FitOptions,
    ranks: dict[str, int],
    reasons: dict[str, str],
    captured: float,
    outside: float,
    heldout: float | None = None,
) -> LayerFit:
    total, energy = moments.variance, float(moments.energies_N.sum())
    null = None
    if total > 0 and options.axes == ("models",) and options.center == "models":
        folds = cross_validated_capture(moments.centered_NN, [ranks["models"]], seed=options.seed)
        heldout = folds[0] if folds is not None else None
        spectra = norm_matched_spectra(moments.centered_NN.diagonal(), moments.num_values, draws=5, seed=options.seed)
        null = float(spectra.mean(0)[: ranks["models"]].sum())
    return LayerFit(
        shape=stack.layer.shape,
        rank=ranks,
        reason=reasons,
        energy=energy,
        variance=total,
        captured=min(captured / total, 1.0) if total > 0 else None,
        heldout=heldout,
        null=null,
        mean_energy=moments.mean_share,
        residual=outside / energy if energy > 0 else 0.0,
        note=_note(moments, ranks, total),
    )


def _note(moments: LayerMoments, ranks: dict[str, int], total: float) -> str:
    if total == 0:
        return "no variance"
    if ranks.get("models", 0) >= moments.num_models - 1 > 0:
        return f"trivial: {ranks['models']} directions hold any {moments.num_models} models"
    return ""
