"""Judge the suitability of layers: is a layer's spectrum a power law with an exponent like those of trained layers?

Eigenvalues λ ≥ x_min have a density ∝ λ^(−α). α is fitted by maximum likelihood, and x_min has the least Kolmogorov–Smirnov
distance (Clauset, Shalizi and Newman 2009). Trained layers have α between about 2 and 6 (Martin and Mahoney 2021). A layer has one
exponent per random half of the zoo. It is suited for a shared subspace if enough of its exponents are in range and agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from statistics import fmean, pstdev

import torch
from torch import Tensor

from eigenzoo.evidence.unseen import LARGE_ZOO
from eigenzoo.linalg.gram import center_gram
from eigenzoo.subspace.moments.layer_moments import LayerMoments

MIN_TAIL = 4
"""Least number of eigenvalues above x_min. Fewer fit any exponent."""

AT_ONCE = 2**19
"""Number of distances that are computed at once."""

NUM_HALVES = 8
NUM_HALVES_LARGE = 4


@dataclass(frozen=True)
class Thresholds:
    """Conditions for a suited layer's exponents: mean in [low, high], largest spread, least share in range and least q."""

    low: float = 2.0
    high: float = 6.0
    spread: float = 1.0
    share: float = 0.5
    q: float = 0.2


@dataclass(frozen=True)
class Suitability:
    """A layer's exponents.

    Attributes:
        exponent, xmin, num_values: exponent of the whole zoo's spectrum, smallest eigenvalue in the fit, and number of them.
        exponents: exponents of random halves of the zoo, with their mean and spread (standard deviation).
    """

    exponent: float | None
    xmin: float | None
    num_values: int
    exponents: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Mean exponent over the halves."""
        return fmean(self.exponents) if self.exponents else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the halves."""
        return pstdev(self.exponents) if self.exponents else None

    def share(self, thresholds: Thresholds) -> float:
        """Share of the halves with an exponent in range."""
        inside = sum(thresholds.low <= exponent <= thresholds.high for exponent in self.exponents)
        return inside / len(self.exponents) if self.exponents else 0.0

    def q(self, thresholds: Thresholds) -> float:
        """Share in range over one plus the spread: 1 if all halves agree and are in range, 0 if none is in range."""
        return self.share(thresholds) / (1 + (self.spread or 0.0))

    def is_suited(self, thresholds: Thresholds) -> bool:
        """Tell whether the layer is retained."""
        mean, spread = self.mean, self.spread
        return (
            mean is not None
            and spread is not None
            and thresholds.low <= mean <= thresholds.high
            and spread <= thresholds.spread
            and self.share(thresholds) >= thresholds.share
            and self.q(thresholds) >= thresholds.q
        )


NOTHING = Suitability(None, None, 0, ())


def suitability(moments: LayerMoments, values_K: Tensor, seed: int = 0) -> Suitability:
    """Fit the exponents of a layer's spectrum (`values_K`, above round-off) and of spectra of random halves of the zoo."""
    if moments.variance == 0:
        return NOTHING
    exponent, xmin, num_values = power_law(values_K)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range((NUM_HALVES if moments.num_models <= LARGE_ZOO else NUM_HALVES_LARGE) // 2):
        for half in torch.randperm(moments.num_models, generator=generator).tensor_split(2):
            values = torch.linalg.eigvalsh(center_gram(moments.gram_NN[half][:, half])).flip(0)
            found.append(power_law(values[values > moments.round_off * values[:1]])[0])
    return Suitability(exponent, xmin, num_values, tuple(value for value in found if value is not None))


def power_law(values_K: Tensor) -> tuple[float | None, float | None, int]:
    """Return exponent α and x_min of a continuous power law, and the number of values from x_min on; None for too few values.

    Agrees with the package `powerlaw` (Alstott et al. 2014) to round-off. Every value except the largest ones is tried as x_min.
    Cost: K² operations, with several candidates at once, so that memory stays below a few tens of MB.
    """
    rising = values_K[values_K > 0].double().flip(0)
    num = rising.numel()
    if num < MIN_TAIL:
        return None, None, 0
    starts = torch.arange(num - 1)
    logs = rising.log()
    counts = num - starts
    tails = logs.flip(0).cumsum(0).flip(0)[:-1] - counts * logs[:-1]
    alphas = 1 + counts / tails
    # Rows: candidates for x_min; columns: the values at or above it, with the fitted and the empirical distribution.
    distances = torch.cat(
        [_distances(run, logs, alphas, counts) for run in torch.split(starts, max(1, AT_ONCE // num))]
    )
    distances = torch.where(alphas.isfinite() & (counts >= MIN_TAIL), distances, torch.inf)
    best = int(distances.argmin())
    alpha = float(alphas[best])
    return (alpha, float(rising[best]), int(counts[best])) if isfinite(alpha) else (None, None, 0)


def _distances(starts: Tensor, logs: Tensor, alphas: Tensor, counts: Tensor) -> Tensor:
    """Return Kolmogorov–Smirnov distances of some candidates for x_min."""
    places = torch.arange(logs.numel())[None, :] - starts[:, None]
    theory = 1 - torch.exp((1 - alphas[starts])[:, None] * (logs[None, :] - logs[starts, None]))
    # A quotient of two integers would have the default dtype.
    empirical = places.double() / counts[starts, None]
    return torch.where(places >= 0, (theory - empirical).abs(), torch.zeros(())).amax(1)
