"""Fit axes `outputs` and `inputs` of one layer: compute the bases and all models' cores from its moments and rank rules.

Legend: N models, O outputs, I inputs, P kept outputs, Q kept inputs, K kept directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from eigenzoo.linalg import lora, low_rank
from eigenzoo.linalg.heldout import NUM_FOLDS, make_folds
from eigenzoo.linalg.nulls import axis_null
from eigenzoo.linalg.rank import AUTO, RankChoice, RankRule, choose_rank
from eigenzoo.linalg.side import SideMoment
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.passes.resources import Resources
from eigenzoo.subspace.bases.basis import CORES, TUCKER, WholeTensorWriter
from eigenzoo.subspace.bases.tucker import Cores, LeadingCores, collect_cores, cut_cores, write_tucker
from eigenzoo.subspace.fitting.models_fit import FittedLayer, describe_fit, models_axis
from eigenzoo.subspace.fitting.options import SKETCH, FitOptions
from eigenzoo.subspace.moments.collecting import LARGEST_SIDE, collect
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack
from eigenzoo.zoo.zoo import Zoo

LARGEST_HELD_OUT = 2048
"""Largest side with a held-out share. A second eigendecomposition of a larger one takes seconds. Sketches have no limit.
"""


def fit_tucker(
    stack: Stack,
    moments: LayerMoments,
    options: FitOptions,
    resources: Resources,
    writer: WholeTensorWriter,
    leading: LeadingCores | None = None,
) -> FittedLayer:
    """Axes `outputs` and `inputs` from their moments, then axis `models` from the cores.

    Cores that the choice of ranks has collected are not collected again.
    """
    ranks: dict[str, int] = {}
    reasons: dict[str, str] = {}
    bases: dict[str, Tensor | None] = {"outputs": None, "inputs": None}
    most: list[float] = []
    for axis, moment in (("outputs", moments.outputs), ("inputs", moments.inputs)):
        if axis in options.axes and moment is None:
            reasons[axis] = f"kept whole: more than {LARGEST_SIDE:,} {axis}; solver 'sketch' truncates them"
        elif axis in options.axes and moment is not None:
            choice, basis, largest_energy = _side(axis, moment, stack, moments, options)
            reasons[axis] = choice.reason
            most.append(largest_energy / moment.trace if moment.trace > 0 else 0.0)
            # A side that is not truncated needs no basis: U = 1.
            if choice.rank < moment.size:
                ranks[axis], bases[axis] = choice.rank, basis
    if leading is not None and leading.holds(ranks):
        found = leading.at(ranks)
        bases, cores = {"outputs": found.outputs_OP, "inputs": found.inputs_IQ}, found.cores
    else:
        cores = collect_cores(stack, moments, bases["outputs"], bases["inputs"])
    coefficients, shared_KPQ = cores.cores_NPQ, None
    kept_N = coefficients.flatten(1).square().sum(1)
    lost_N = torch.zeros_like(kept_N)
    if "models" in options.axes:
        choice, coefficients, shared_KPQ = _shared_cores(cores, moments, options)
        ranks["models"], reasons["models"] = choice.rank, choice.reason
        kept_N, lost_N = (kept := coefficients.square().sum(1)), kept_N - kept
    elif CORES in options.rules:
        choice = _core_rank(options.rules[CORES], cores, stack, moments)
        reasons[CORES] = choice.reason
        if low_rank.pays(cores.shape, choice.rank):
            ranks[CORES] = choice.rank
            coefficients, errors_NPQ = _cut(cores, stack, choice.rank, options)
            lost_N = errors_NPQ.flatten(1).square().sum(1)
            # The mean error of updates is a loss of energy, and not of variance.
            varying_NPQ = errors_NPQ - errors_NPQ.mean(0) if _has_mean(cores, stack) else errors_NPQ
            kept_N = kept_N - varying_NPQ.flatten(1).square().sum(1)
    write_tucker(stack.layer.name, cores, bases["outputs"], bases["inputs"], shared_KPQ, options.torch_dtype, writer)
    captured, outside_N = _tucker_energies(stack, moments, cores, kept_N, lost_N)
    shown = {axis: ranks.get(axis, stack.layer.shape[0 if axis == "outputs" else 1]) for axis in options.axes}
    if CORES in options.rules:
        shown[CORES] = ranks.get(CORES, min(cores.shape))
    heldout = None
    if options.center == "models":
        heldout = tucker_capture(stack, moments, ranks, options, resources)
    record = describe_fit(stack.layer, moments, options, shown, reasons, captured, float(outside_N.sum()), heldout)
    if options.solver == SKETCH:
        record = replace(record, bound=_bound(stack, moments, ranks, most, float(outside_N.sum())))
    return FittedLayer(
        stack.layer.name,
        TUCKER,
        ranks,
        cores.mean is not None and cores.mean.numel() > 0,
        coefficients,
        outside_N,
        record,
    )


def leading_task(zoo: Zoo, precision: str, layer: tuple[str, Mapping[str, int], LayerMoments]) -> LeadingCores:
    """Collect one layer's cores between so many eigenvectors of its sides: one pass over its weights."""
    name, ranks, moments = layer
    stack = zoo.stack(name, precision=precision)
    bases = {
        axis: side.eigenvectors().basis(ranks[axis])
        for axis, side in (("outputs", moments.outputs), ("inputs", moments.inputs))
        if side is not None and axis in ranks
    }
    outputs_OP, inputs_IQ = bases.get("outputs"), bases.get("inputs")
    cores = collect_cores(stack, moments, outputs_OP, inputs_IQ)
    return LeadingCores(outputs_OP, inputs_IQ, cores, isinstance(stack, UpdateStack))


def lost_at(leading: LeadingCores, moments: LayerMoments, ranks: Mapping[str, int]) -> float:
    """Return the energy that a fit of these ranks loses, as `fit_tucker` counts it."""
    corner_NPQ = leading.cores.cores_NPQ[:, : ranks.get("outputs"), : ranks.get("inputs")]
    cores_NPQ = corner_NPQ.flatten(1)
    kept_N = cores_NPQ.square().sum(1)
    if not leading.is_update:
        lost = float((moments.centered_NN.diagonal() - kept_N).clamp_min(0).sum())
    else:
        mean, whole_NPQ = leading.cores.mean, corner_NPQ
        if mean is not None:
            whole_NPQ = corner_NPQ + mean[: ranks.get("outputs"), : ranks.get("inputs")]
        lost = float((moments.energies_N - whole_NPQ.flatten(1).square().sum(1)).clamp_min(0).sum())
        if CORES in ranks and low_rank.pays((corner_NPQ.shape[1], corner_NPQ.shape[2]), ranks[CORES]):
            lost += float(low_rank.tails(whole_NPQ)[ranks[CORES]])
    if "models" in ranks:
        values_N = torch.linalg.eigvalsh(cores_NPQ @ cores_NPQ.T).flip(0)
        lost += float(values_N[ranks["models"] :].clamp_min(0).sum())
    return lost


def _side(
    axis: str, moment: SideMoment, stack: Stack, moments: LayerMoments, options: FitOptions
) -> tuple[RankChoice, Tensor, float]:
    """Return rank and basis (O, P) of the outputs or (I, Q) of the inputs, and the largest energy in that many directions."""
    # These moments of equal updates contain their mean, but those of equal full weights only round-off.
    if moments.variance == 0 and (isinstance(stack, DenseStack) or moment.trace <= 0):
        return RankChoice(0, "no variance"), torch.zeros(moment.size, 0, dtype=torch.float64), 0.0
    eigenvectors = moment.eigenvectors()
    rule = options.rules[axis]
    if isinstance(rule, int):
        eigenvectors.check_rank(rule)
    null = None
    if rule == AUTO:
        centered = isinstance(stack, DenseStack) and moments.removed is None
        null = axis_null(moment.size, moments.energies_N, _columns(stack, axis), centered=centered, seed=options.seed)
    choice = choose_rank(rule, eigenvectors.values_K, moment.trace, null)
    if moment.outside is not None:
        choice = replace(choice, reason=f"{choice.reason}, from a sketch of {moment.outside.columns} directions")
    return choice, eigenvectors.basis(choice.rank), eigenvectors.most(choice.rank)


def _bound(
    stack: Stack, moments: LayerMoments, ranks: dict[str, int], most: list[float], outside: float
) -> float | None:
    """Return the largest share of the energy that other bases and cores of these ranks could add, limited by each axis."""
    centered = float(moments.centered_NN.diagonal().sum())
    total = float(moments.energies_N.sum()) if isinstance(stack, UpdateStack) else moments.variance
    if total <= 0:
        return None
    if "models" in ranks:
        values_N = eigenpairs(moments.centered_NN, moments.round_off)[0]
        most = [*most, (total - centered + float(values_N[: ranks["models"]].sum())) / total]
    return max(min(most, default=1.0) - (1 - outside / total), 0.0)


def _columns(stack: Stack, axis: str) -> float:
    """Return the number of independent columns (rows) of one model in the outputs' (inputs') moment."""
    if isinstance(stack, UpdateStack):
        return sum(stack.ranks) / len(stack)
    outputs, inputs = stack.layer.shape
    return inputs if axis == "outputs" else outputs


def _shared_cores(cores: Cores, moments: LayerMoments, options: FitOptions) -> tuple[RankChoice, Tensor, Tensor]:
    """Return rank, coefficients (N, K) and shared cores (K, P, Q) by PCA of the cores."""
    flat_ND = cores.cores_NPQ.flatten(1)
    choice, values_K, vectors_NK = models_axis(flat_ND @ flat_ND.T, moments, options)
    roots_K = values_K.sqrt()
    shared_KD = (vectors_NK / roots_K).T @ flat_ND
    return choice, vectors_NK * roots_K, shared_KD.view(choice.rank, *cores.cores_NPQ.shape[1:])


def _core_rank(rule: RankRule, cores: Cores, stack: Stack, moments: LayerMoments) -> RankChoice:
    """The rank that every model's core is cut to; that of whole cores where factors of the rank take no fewer numbers."""
    full, reason = min(cores.shape), "as asked"
    if rule == AUTO:
        whole_NPQ = _whole(cores, stack)
        about = moments.energies_N if isinstance(stack, UpdateStack) else moments.centered_NN.diagonal()
        energy = float(whole_NPQ.square().sum())
        allowed = max(float(about.sum()) - energy, lora.ROUND_OFF * energy)
        rule = max(1, int((low_rank.tails(whole_NPQ) > allowed).sum()))
        reason = "the least at which the cut loses no more than the sides"
    if not low_rank.pays(cores.shape, int(rule)):
        why = f"more than {low_rank.LARGEST:,} numbers" if prod(cores.shape) > low_rank.LARGEST else ""
        return RankChoice(full, f"kept whole: {why or f'two factors of rank {rule} take no fewer numbers'}")
    return RankChoice(int(rule), reason)


def _has_mean(cores: Cores, stack: Stack) -> bool:
    """Whether the cores that are cut contain the mean: those of updates."""
    return cores.mean is not None and isinstance(stack, UpdateStack)


def _whole(cores: Cores, stack: Stack) -> Tensor:
    """The cores that are cut: of updates with their mean."""
    return cores.cores_NPQ if cores.mean is None or isinstance(stack, DenseStack) else cores.cores_NPQ + cores.mean


def _cut(cores: Cores, stack: Stack, rank: int, options: FitOptions) -> tuple[Tensor, Tensor]:
    """All models' factors as they are stored, and what each core loses by the cut (N, P, Q)."""
    whole_NPQ = _whole(cores, stack)
    factors, kept_NPQ = cut_cores(whole_NPQ, rank, options.coefficients_dtype, stack.layer.name)
    return factors.double(), whole_NPQ - kept_NPQ


def _tucker_energies(
    stack: Stack, moments: LayerMoments, cores: Cores, kept_N: Tensor, lost_N: Tensor
) -> tuple[float, Tensor]:
    """Return the kept centred energy, and each model's lost energy ‖X − X̂‖².

    The lost part is orthogonal to the kept part, so energies subtract. For updates the mean is part of the core.

    Args:
        kept_N, lost_N: each model's energy that is kept of its core, and lost of it.
    """
    if isinstance(stack, DenseStack):
        return max(float(kept_N.sum()), 0.0), (moments.centered_NN.diagonal() - kept_N).clamp_min(0)
    outside_N = moments.energies_N - _whole(cores, stack).flatten(1).square().sum(1) + lost_N
    return max(float(kept_N.sum()), 0.0), outside_N.clamp_min(0)


def tucker_capture(
    stack: Stack,
    moments: LayerMoments,
    ranks: Mapping[str, int],
    options: FitOptions,
    resources: Resources,
) -> float | None:
    """Return the share of held-out models' centred energy in bases and cores of the same ranks that are fitted to the other models.

    One fold of five (by a seeded permutation) is held out. Cost: a second pass over the weights, and a second eigendecomposition or
    sketch of each side. Axis `models` alone does not need this, because its held-out share follows from the Gram
    (`linalg.heldout`). None for fewer than five models, for sides above `LARGEST_HELD_OUT` that are not sketched, and without
    variance.
    """
    num_models = len(stack)
    if num_models < NUM_FOLDS or moments.variance == 0 or _is_large(moments, ranks):
        return None
    heldout, *folds = make_folds(num_models, NUM_FOLDS, options.seed)
    fitted = torch.cat(folds)
    part = stack.subset(fitted.tolist())
    part_moments = collect(part, options.axes, options.center, resources, sketch=options.sketch)
    bases = {
        axis: side.eigenvectors().basis(ranks[axis])
        for axis, side in (("outputs", part_moments.outputs), ("inputs", part_moments.inputs))
        if side is not None and axis in ranks
    }
    outputs_OP, inputs_IQ = bases.get("outputs"), bases.get("inputs")
    collected = collect_cores(stack, moments, outputs_OP, inputs_IQ)
    cores = collected.cores_NPQ.flatten(1)
    # The moments are about the mean of all models. A held-out model is measured about the mean of the fitted models only.
    cores = cores - cores[fitted].mean(0)
    total = centered_energy(moments.centered_NN, fitted, heldout)
    if "models" in ranks:
        return float(_inside(cores[fitted], cores[heldout], ranks["models"]) / total)
    kept = cores[heldout].square().sum()
    if CORES in ranks:
        # The cores that a fit to the others would cut: of full weights about its own mean. Those of updates contain the mean.
        is_update = _has_mean(collected, stack)
        about = collected if is_update else replace(collected, cores_NPQ=cores.view_as(collected.cores_NPQ))
        errors_NPQ = _cut(about, stack, ranks[CORES], options)[1]
        of_mean = errors_NPQ[fitted].mean(0) if is_update else 0.0
        kept = kept - (errors_NPQ[heldout] - of_mean).square().sum()
    return float(kept / total)


def _is_large(moments: LayerMoments, ranks: Mapping[str, int]) -> bool:
    sides = {"outputs": moments.outputs, "inputs": moments.inputs}
    exact = (side for axis, side in sides.items() if axis in ranks and side is not None and side.outside is None)
    return any(side.size > LARGEST_HELD_OUT for side in exact)


def centered_energy(gram_NN: Tensor, fitted: Tensor, heldout: Tensor) -> Tensor:
    """Return Σ‖x_h − mean of the fitted‖² over held-out models, from the Gram."""
    block = gram_NN[fitted][:, fitted]
    return (gram_NN.diagonal()[heldout] - 2 * gram_NN[fitted][:, heldout].mean(0) + block.mean()).clamp_min(0).sum()


def _inside(fitted_ND: Tensor, heldout_ND: Tensor, rank: int) -> Tensor:
    """Return the energy of held-out rows in the leading directions of the fitted ones."""
    values_K, vectors_NK = eigenpairs(fitted_ND @ fitted_ND.T)
    directions_KD = (vectors_NK / values_K.sqrt()).T[:rank] @ fitted_ND
    return (heldout_ND @ directions_KD.T).square().sum()
