"""Compute the alpha score of the subspace hypothesis's authors: is each model's own layer a power law with similar exponents?

    q = (1 − e^(−N/20)) · mean φ(α) · e^(−σ),   φ(α) = e^(−(α − 2)/2) for α in [2, 6], else 0

α is the exponent of one model's layer, fitted to the eigenvalues of its WᵀW (squared singular values; of an update those of ΔW),
σ the standard deviation of α over models, N their number. A layer is retained if the mean α is in [2, 6], σ is at most 1, at least
half of the models are in range, and q is at least 0.2. A family (the layers of one role) has the geometric mean of its layers' q.

Source: P. Kaushik et al. 2025 (arXiv:2512.05117), and their later publications. These do not specify three details, chosen here: σ
    is that of the population (over N), N counts the models with an exponent, and a tail has at least four eigenvalues
    (`suitability.power_law`). `suitability` answers another question: it fits the spectrum of the stacked models.

Legend: N models, R singular values of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import exp, log
from statistics import fmean, pstdev

import torch
from torch import Tensor

from eigenzoo.evidence.suitability import power_law
from eigenzoo.weights.roles import role
from eigenzoo.zoo.stack import DenseStack

LOW, HIGH, SPREAD, SHARE, Q = 2.0, 6.0, 1.0, 0.5, 0.2
"""The authors' published bounds of a retained layer."""

SCALE = 20
"""Number of models at which the first factor is 1 − 1/e."""


@dataclass(frozen=True)
class OwnSpectra:
    """Every model's own singular values of one layer.

    Attributes:
        singular_NR: descending, padded with zeros.
        floor: share of a model's largest eigenvalue below which eigenvalues are round-off.
    """

    singular_NR: Tensor
    floor: float


@dataclass(frozen=True)
class AlphaScore:
    """One layer's exponents.

    Attributes:
        exponents: α of each model; None for a model with fewer than four eigenvalues.
    """

    exponents: tuple[float | None, ...]

    @cached_property
    def fitted(self) -> tuple[float, ...]:
        """The exponents that are not None."""
        return tuple(alpha for alpha in self.exponents if alpha is not None)

    @property
    def mean(self) -> float | None:
        """Mean exponent."""
        return fmean(self.fitted) if self.fitted else None

    @property
    def spread(self) -> float | None:
        """Standard deviation σ of the exponents, of the population."""
        return pstdev(self.fitted) if self.fitted else None

    @property
    def share(self) -> float:
        """Share of the exponents in range."""
        return sum(LOW <= alpha <= HIGH for alpha in self.fitted) / len(self.fitted) if self.fitted else 0.0

    @property
    def q(self) -> float:
        """The score, from 0 to 1."""
        if self.spread is None:
            return 0.0
        return (1 - exp(-len(self.fitted) / SCALE)) * fmean(map(phi, self.fitted)) * exp(-self.spread)

    @property
    def is_retained(self) -> bool:
        """Whether the authors' rule retains the layer."""
        mean, spread = self.mean, self.spread
        if mean is None or spread is None:
            return False
        return LOW <= mean <= HIGH and spread <= SPREAD and self.share >= SHARE and self.q >= Q


def phi(alpha: float) -> float:
    """Return φ(α).

    >>> phi(2.0), round(phi(4.0), 4), phi(1.9), phi(6.1)
    (1.0, 0.3679, 0.0, 0.0)
    """
    return exp(-(alpha - LOW) / 2) if LOW <= alpha <= HIGH else 0.0


def alpha_score(spectra: OwnSpectra) -> AlphaScore:
    """Fit every model's exponent. Cost: R² operations each."""
    exponents = []
    for singular_R in spectra.singular_NR.double():
        values_R = singular_R.square()
        exponents.append(power_law(values_R[values_R > spectra.floor * values_R[:1]])[0])
    return AlphaScore(tuple(exponents))


def families(layers: Mapping[str, AlphaScore]) -> dict[str, float]:
    """Return the geometric mean of q over the layers of each role."""
    scores: dict[str, list[float]] = {}
    for name, layer in layers.items():
        scores.setdefault(role(name), []).append(layer.q)
    return {name: exp(fmean(map(log, own))) if min(own) > 0 else 0.0 for name, own in scores.items()}


def own_spectra(stack: DenseStack, device: str = "cpu") -> OwnSpectra:
    """Read every model's layer once, and compute its singular values in float64.

    Cost: N·min(O, I)²·max(O, I) operations. Memory: one model's layer, twice. Raises DataError, naming the model, for NaN and Inf.
    """
    rows = [torch.linalg.svdvals(stack.matrix(index).to(device, torch.float64)).cpu() for index in range(len(stack))]
    floor = (torch.finfo(torch.float64).eps * max(stack.layer.shape)) ** 2
    return OwnSpectra(torch.stack(rows), floor)
