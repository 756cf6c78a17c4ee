"""Fit axis `models` alone: compute coefficients and weights over the models from a layer's moments, without reading weights.

Legend: N models, K kept directions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eigenzoo.linalg.heldout import cross_validated_capture
from eigenzoo.linalg.nulls import norm_matched_spectra
from eigenzoo.linalg.rank import AUTO, RankChoice, choose_rank
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.records import Layer, LayerFit
from eigenzoo.subspace.bases.basis import FLAT, STACKED
from eigenzoo.subspace.fitting.alone import Losses
from eigenzoo.subspace.fitting.options import FitOptions
from eigenzoo.subspace.moments.layer_moments import LayerMoments

NULL_DRAWS = 200
"""Number of models in all draws of the null together. Draws of more models differ less, so fewer are needed."""


NULL_MODELS = 256
"""Largest number of models in that null. If there are more, a part of them is used."""


@dataclass(frozen=True)
class FittedLayer:
    """A layer's form and ranks, its stored coefficients (N, …) in float64, the lost energy of each model, and its record.

    For full weights also what models lose if they are cut alone, if it was measured.
    """

    name: str
    form: str
    ranks: dict[str, int]
    has_mean: bool
    coefficients: Tensor
    outside_N: Tensor
    record: LayerFit
    alone: Losses | None = None


@dataclass(frozen=True)
class ModelsFit:
    """A layer fitted on axis `models`, and the weights W of its directions V = Wᵀ(X − M)."""

    fitted: FittedLayer
    weights_NK: Tensor


def fit_models(layer: Layer, moments: LayerMoments, options: FitOptions) -> ModelsFit:
    """Choose the rank, and compute all models' coefficients and the directions' weights from the Gram."""
    choice, values_K, vectors_NK = models_axis(moments.centered_NN, moments, options)
    roots_K = values_K.sqrt()
    coefficients_NK = vectors_NK * roots_K
    if layer.kind == "update":
        form, has_mean = STACKED, moments.removed is None
    else:
        form, has_mean = FLAT, moments.removed is None or float(moments.removed.abs().max()) > 0
    ranks = {"models": choice.rank}
    outside_N = (moments.centered_NN.diagonal() - coefficients_NK.square().sum(1)).clamp_min(0)
    captured = float(values_K.sum())
    record = describe_fit(layer, moments, options, ranks, {"models": choice.reason}, captured, float(outside_N.sum()))
    fitted = FittedLayer(layer.name, form, ranks, has_mean, coefficients_NK, outside_N, record)
    return ModelsFit(fitted, vectors_NK / roots_K)


def models_axis(gram_NN: Tensor, moments: LayerMoments, options: FitOptions) -> tuple[RankChoice, Tensor, Tensor]:
    """Return rank, eigenvalues and eigenvectors of the models axis, from the Gram of the layers or of their cores."""
    total = moments.variance
    if total == 0:
        return RankChoice(0, "no variance"), gram_NN.new_zeros(0), gram_NN.new_zeros(gram_NN.shape[0], 0)
    rule, null = options.rules["models"], None
    values_N, vectors_NN = eigenpairs(gram_NN, moments.round_off, rule if isinstance(rule, int) else None)
    if rule == AUTO:
        centered = moments.removed is None
        null = norm_matched_spectra(gram_NN.diagonal(), moments.num_values, centered=centered, seed=options.seed)
    choice = choose_rank(rule, values_N, total, null)
    return choice, values_N[: choice.rank], vectors_NN[:, : choice.rank]


def null_share(energies_N: Tensor, num_values: int, rank: int, seed: int) -> float:
    """Return the share of the variance in `rank` directions, for unrelated models with these energies about their mean.

    For many models only every second (third, …) by energy is drawn, in half (a third) of the dimensions. The spectrum depends on
    the distribution of the energies and on N/D, and its leading share on the share of directions. Accurate to a few percent.
    """
    thinning = -(-energies_N.numel() // NULL_MODELS)
    kept_N = energies_N.sort().values[thinning // 2 :: thinning]
    draws = max(1, min(5, NULL_DRAWS // kept_N.numel()))
    spectrum = norm_matched_spectra(kept_N, max(num_values // thinning, 1), draws=draws, seed=seed).mean(0)
    whole, part = divmod(rank / thinning, 1)
    following = float(spectrum[int(whole)]) if int(whole) < spectrum.numel() else 0.0
    return float(spectrum[: int(whole)].sum()) + part * following


def describe_fit(
    layer: Layer,
    moments: LayerMoments,
    options: FitOptions,
    ranks: dict[str, int],
    reasons: dict[str, str],
    captured: float,
    outside: float,
    heldout: float | None = None,
) -> LayerFit:
    """Describe the fit of a layer: captured variance, and for axis `models` also its held-out and null values."""
    total, energy = moments.variance, float(moments.energies_N.sum())
    null = None
    if total > 0 and options.axes == ("models",) and options.center == "models":
        folds = cross_validated_capture(moments.centered_NN, [ranks["models"]], seed=options.seed)
        heldout = folds[0] if folds is not None else None
        null = null_share(moments.centered_NN.diagonal(), moments.num_values, ranks["models"], options.seed)
    return LayerFit(
        shape=layer.shape,
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
