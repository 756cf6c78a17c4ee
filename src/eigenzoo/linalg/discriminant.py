"""Linear discriminant analysis with a shrunk pooled covariance: distances of rows to the means of groups.

    d²(x, m) = (x − μ_m)ᵀ Σ⁻¹ (x − μ_m),   Σ = (1 − γ) S + γ (tr S / D) 1

S is the covariance of the examples about their own group's mean, γ the shrinkage of Ledoit and Wolf (2004). The same numbers as
scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=γ)` for groups of one size. Its `shrinkage="auto"` differs:
it shrinks each group by itself, after scaling the features.

Σ is never formed. The right singular vectors of the centred examples are its eigenvectors, and all other directions have the
eigenvalue γ tr S / D, so examples of many features cost their own memory.

Legend: G groups, N examples of all groups, D features, R = min(N, D) directions, X rows to measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

LEAST_SHRINKAGE = 1e-6
"""Directions without any spread in the examples count as a millionth of the average one, and not as zero."""

BLOCK = 2**22
"""Values of rows that are measured at once."""


@dataclass(frozen=True)
class Discriminant:
    """Groups with one covariance, as their means after whitening.

    Attributes:
        origin_D: mean of all examples.
        directions_RD: eigenvectors of Σ.
        stretch_R: what whitening adds to each of them, λ^-½ − scale.
        scale: the factor for every other direction.
        means_GD: the groups' whitened means.
        shrinkage: γ.
    """

    origin_D: Tensor
    directions_RD: Tensor
    stretch_R: Tensor
    scale: float
    means_GD: Tensor
    shrinkage: float

    def distances(self, rows_XD: Tensor) -> Tensor:
        """Return d² of every row to every group, (X, G) float64. Cost: X·D·(2R + G) products, a block of rows at a time."""
        blocks = torch.split(rows_XD, max(1, BLOCK // rows_XD.shape[1]))
        return torch.cat([self._distances(block) for block in blocks])

    def blend(self, rows_XD: Tensor) -> Tensor:
        """Return weights (G,), not negative, of sum 1: their average of the means is nearest, by d², to the rows' mean."""
        mean_D = self._whitened(rows_XD.double().mean(0, keepdim=True))
        offsets_DG = (self.means_GD - mean_D).T.numpy()
        unit = float(np.linalg.norm(offsets_DG)) / len(self.means_GD) ** 0.5
        if unit == 0:
            return torch.full((len(self.means_GD),), 1 / len(self.means_GD), dtype=torch.float64)
        # Of all w ≥ 0 with sum s the last row costs (s − 1)², so the best direction is that of the best weights of sum 1.
        system = np.vstack([offsets_DG / unit, np.ones(offsets_DG.shape[1])])
        weights, _ = nnls(system, np.append(np.zeros(len(offsets_DG)), 1.0))
        return torch.from_numpy(weights / weights.sum())

    def _whitened(self, rows_XD: Tensor) -> Tensor:
        return _whiten(rows_XD.double() - self.origin_D, self.directions_RD, self.stretch_R, self.scale)

    def _distances(self, rows_XD: Tensor) -> Tensor:
        whitened_XD = self._whitened(rows_XD)
        # Not by the squares of norms, which would lose the digits of rows near a mean.
        columns = [(whitened_XD - mean_D).square().sum(1) for mean_D in self.means_GD]
        return torch.stack(columns, 1)


def discriminant(groups: Sequence[Tensor], shrinkage: float | None = None) -> Discriminant:
    """Fit groups of examples (n_g, D) with a pooled covariance.

    Args:
        groups: at least one example each; finite.
        shrinkage: γ in [0, 1]. Default: the estimate of Ledoit and Wolf, and at least `LEAST_SHRINKAGE`.

    Raises ValueError if no group has two examples that differ. Cost: one SVD of (N, D).
    """
    means_GD = torch.stack([rows.double().mean(0) for rows in groups])
    within_ND = torch.cat([rows.double() - mean_D for rows, mean_D in zip(groups, means_GD, strict=True)])
    count, width = within_ND.shape
    _, values_R, directions_RD = torch.linalg.svd(within_ND, full_matrices=False)
    variances_R = values_R.square() / count
    average = float(variances_R.sum()) / width
    # Round-off of the mean of equal examples is not a spread.
    if not average > torch.finfo(torch.float64).eps ** 2 * float(torch.cat(list(groups)).double().square().mean()):
        raise ValueError("no group has two examples that differ")
    if shrinkage is None:
        shrinkage = max(LEAST_SHRINKAGE, ledoit_wolf(within_ND, variances_R))
    origin_D = torch.cat(list(groups)).double().mean(0)
    scale = (max(shrinkage, LEAST_SHRINKAGE**2) * average) ** -0.5
    stretch_R = ((1 - shrinkage) * variances_R + scale**-2).rsqrt() - scale
    whitened_GD = _whiten(means_GD - origin_D, directions_RD, stretch_R, scale)
    return Discriminant(origin_D, directions_RD, stretch_R, scale, whitened_GD, shrinkage)


def ledoit_wolf(within_ND: Tensor, variances_R: Tensor) -> float:
    """Return the shrinkage that minimises the expected error of Σ, from centred examples and the eigenvalues of S.

    Equal to `sklearn.covariance.ledoit_wolf_shrinkage(…, assume_centered=True)`.
    """
    count, width = within_ND.shape
    trace, squares = float(variances_R.sum()), float(variances_R.square().sum())
    fourth = float(within_ND.square().sum(1).square().sum()) / count
    spread = squares - trace**2 / width
    noise = min((fourth - squares) / count, spread)
    return noise / spread if noise > 0 else 0.0


def _whiten(rows_XD: Tensor, directions_RD: Tensor, stretch_R: Tensor, scale: float) -> Tensor:
    return rows_XD * scale + (rows_XD @ directions_RD.T * stretch_R) @ directions_RD
