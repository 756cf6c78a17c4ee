"""Compare a layer's centred spectrum with those of models that share nothing.

The controls are spectra of unrelated models: with equal norms (iid), with the zoo's norms (norm-matched), with each model's entries
shuffled (permuted), and for LoRA updates with each model's singular values and random singular vectors (spectrum-matched).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from eigenzoo.linalg.nulls import (
    edge_null,
    iid_spectra,
    norm_matched_spectra,
    permuted_spectra,
    scaled_shares,
    spectrum_matched_spectra,
)
from eigenzoo.linalg.rank import AUTO, choose_rank
from eigenzoo.linalg.spectrum import effective_rank
from eigenzoo.subspace.moments.layer_moments import LayerMoments

LARGE_ZOO = 128
"""From this many models on fewer draws are enough, because the spread of a spectrum falls as N^(-2/3)."""

BAND = (0.05, 0.95)
"""Quantiles of the null's draws for its band."""

EVEN = 1e-9
"""Least standard deviation of the null. If there are only k directions, the share in k directions is 1 in every draw."""

LARGEST_DEVIATE = 20.0
"""Largest number of standard deviations, because these are estimated from draws."""

SKEWNESS = 0.2935
"""Skewness of the Tracy–Widom law of real noise."""

LEAST_DIMENSIONS = 4
"""Least number of dimensions. With fewer every direction is a leading one."""


@dataclass(frozen=True)
class Chance:
    """A layer's spectrum and its nulls.

    Attributes:
        explained_variance_ratio: eigenvalues of the stack about its center over their total; N − 1 values about the models' mean.
        effective_rank: exp of the spectrum's entropy.
        norm_matched: the mean spectrum of unrelated models with the same norms; `low` and `high`: its band.
        iid: that of unrelated models with equal norms.
        permuted: that of the same models with each one's entries shuffled; None if the sums of entries are not known.
        spectrum_matched: for LoRA updates, that of random singular vectors; None for other layers.
        auto: number of leading directions above the norm-matched null (parallel analysis).
        var90: number of directions with 90 % of the variance.
    """

    explained_variance_ratio: tuple[float, ...]
    effective_rank: float
    norm_matched: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    iid: tuple[float, ...]
    permuted: tuple[float, ...] | None
    spectrum_matched: tuple[float, ...] | None
    auto: int
    var90: int


def _nothing(length: int) -> Chance:
    """Return the zeros of a layer without variance."""
    zeros = (0.0,) * length
    return Chance(zeros, 0.0, zeros, zeros, zeros, zeros, None, None, 0, 0)


def chance(moments: LayerMoments, values_K: Tensor, shape: tuple[int, int], seed: int = 0) -> Chance:
    """Compare a layer's spectrum (`values_K`, eigenvalues above round-off) with chance, from moments. Cost: N³ per draw."""
    centered = moments.shift_N is None
    length = moments.num_models - centered
    if moments.variance == 0:
        return _nothing(length)
    gram_NN = moments.centered_NN
    num_models, num_values = moments.num_models, moments.num_values
    draws = num_draws(num_models)
    ratio_K = values_K / moments.variance
    energies_N = gram_NN.diagonal()
    null = norm_matched_spectra(energies_N, num_values, centered=centered, draws=draws, seed=seed)
    few = 5 if num_models <= LARGE_ZOO else 1
    permuted = spectrum = None
    if centered and moments.sums_N is not None:
        sums_N = moments.sums_N - moments.sums_N.mean()
        permuted = permuted_spectra(energies_N, sums_N, num_values, draws=few, seed=seed)
    if moments.singular_NR is not None:
        spectrum = spectrum_matched_spectra(moments.singular_NR, shape, centered=centered, draws=few, seed=seed)
    low, high = (null.quantile(quantile, dim=0) for quantile in BAND)
    return Chance(
        _listed(ratio_K, length),
        effective_rank(ratio_K),
        _listed(null.mean(0), length),
        _listed(low, length),
        _listed(high, length),
        _iid(num_models, num_values, centered, draws, seed)[:length],
        None if permuted is None else _listed(permuted.mean(0), length),
        None if spectrum is None else _listed(spectrum.mean(0), length),
        choose_rank(AUTO, values_K, moments.variance, null).rank,
        choose_rank(0.9, values_K, moments.variance).rank,
    )


def edges(scaled: tuple[Tensor, Tensor], rank: Sequence[int], dimensions: Sequence[float]) -> list[tuple[float, ...]]:
    """Return by how many standard deviations the top k eigenvalues exceed those of unrelated models, for each k of `rank`.

    Every model is scaled to one norm (`scaled`, from `scale_models`), also in the null, so that none outweighs the others.
    `dimensions` are the effective dimensions of unrelated models: D, or fewer if their entries are related. Each has its own
    result.
    """
    places = torch.tensor(rank) - 1
    found = scaled_shares(*scaled).cumsum(0)[places]
    answers = []
    for number in dimensions:
        if number < LEAST_DIMENSIONS:
            answers.append((0.0,) * len(rank))
            continue
        middle, spread = edge_null(scaled[0].shape[0], number)
        deviates = (found - middle[places]) / spread[places].clamp_min(EVEN)
        answers.append(tuple(_unskewed(deviates).clamp(-LARGEST_DEVIATE, LARGEST_DEVIATE).tolist()))
    return answers


def _unskewed(deviates: Tensor) -> Tensor:
    """Return normal deviates of a gamma variable with the skewness of the Tracy–Widom law of largest eigenvalues.

    The cube root of a gamma variable is nearly normal (Wilson and Hilferty 1931).
    """
    shape = 4 / SKEWNESS**2
    cubes = (1 + deviates / shape**0.5).clamp_min(0) ** (1 / 3)
    normal: Tensor = (cubes - (1 - 1 / (9 * shape))) * 3 * shape**0.5
    return normal


def num_draws(num_models: int) -> int:
    """Return the number of draws of a null for a zoo of this size."""
    return 20 if num_models <= LARGE_ZOO else 8


def _listed(values: Tensor, length: int) -> tuple[float, ...]:
    """Return a spectrum of exactly `length` values, filled up with zeros."""
    padded = torch.zeros(length, dtype=torch.float64)
    padded[: min(length, values.numel())] = values[:length]
    return tuple(padded.tolist())


@lru_cache(maxsize=256)
def _iid(num_models: int, num_values: int, centered: bool, draws: int, seed: int) -> tuple[float, ...]:
    """Return the iid null, which is the same for every layer of one size."""
    return tuple(iid_spectra(num_models, num_values, centered=centered, draws=draws, seed=seed).mean(0).tolist())
