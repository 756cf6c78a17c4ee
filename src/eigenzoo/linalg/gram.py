"""Grams of stacks: the N × N second moment from which every statement about a zoo follows.

Legend: N models, D values of one flattened layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALING_ROUNDS = 8
"""The most rounds of norms and mean, from the plain mean on: enough where norms range over two decades."""

SETTLED = 1e-3
"""Relative change of all squared norms below which no round follows: a tenth of what chance does to them in 10⁴ dimensions."""

LEAST_SQUARE = 1e-4
"""Models of less than this share of the usual energy are not scaled up further: they may be copies of the mean."""


def center_gram(gram_NN: Tensor) -> Tensor:
    """Return HKH with H = I − 11ᵀ/N, the Gram of the rows after their mean is removed; symmetric to the last bit.

    Exact in exact arithmetic whatever common offset the rows had. In floating point the offset's energy cancels, so
    remove most of it from the rows first: what is lost is eps · (offset energy).
    """
    centered = gram_NN - gram_NN.mean(0, keepdim=True)
    centered = centered - centered.mean(1, keepdim=True)
    return (centered + centered.T) / 2


def shift_gram(gram_NN: Tensor, cross_N: Tensor, energy: float) -> Tensor:
    """Return the Gram of rows y_n + d from that of y_n, with `cross_N` = ⟨y_n, d⟩ and `energy` = ⟨d, d⟩."""
    return gram_NN + cross_N[:, None] + cross_N[None, :] + energy


def split_gram(raw_NN: Tensor) -> tuple[Tensor, Tensor, float]:
    """Split the Gram of raw rows into (centred Gram, ⟨mean, x_n − mean⟩, ⟨mean, mean⟩); `shift_gram` is its inverse."""
    energy = float(raw_NN.mean())
    return center_gram(raw_NN), raw_NN.mean(1) - energy, energy


def squared_distances(gram_NN: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖² for all pairs; any Gram of the rows will do, since a common offset drops out."""
    diagonal = gram_NN.diagonal()
    return (diagonal[:, None] + diagonal[None, :] - 2 * gram_NN).clamp_min(0)


def unit(vector_N: Tensor) -> Tensor:
    """Return a vector at length one; zero stays zero."""
    length = vector_N.norm()
    return vector_N / length if float(length) > 0 else vector_N


def project_out(gram_NN: Tensor, unit_N: Tensor) -> Tensor:
    """Return PGP with P = I − uuᵀ: `center_gram` for a direction other than that of ones."""
    gram_NN = gram_NN - torch.outer(unit_N, unit_N @ gram_NN)
    gram_NN = gram_NN - torch.outer(gram_NN @ unit_N, unit_N)
    return (gram_NN + gram_NN.T) / 2


def scale_models(gram_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Scale every row to one norm about the common mean; returns the scaled Gram and the direction that the mean then takes.

    With x_n = mean + y_n and s_n = ‖y_n‖, rows x_n / s_n contain the mean times 1 / s_n: projecting out the vector of 1 / s_n
    removes it whatever it is, and leaves noise of one variance. That is the generalised least squares mean, which models of
    large norm do not pull; its weights need s_n, and s_n the mean: a few rounds, each model seen from the mean of the others.
    """
    squares_N = gram_NN.new_ones(gram_NN.shape[0])
    for number in range(SCALING_ROUNDS):
        weights_NN = (1 / squares_N).expand_as(gram_NN).clone().fill_diagonal_(0)
        weights_NN /= weights_NN.sum(1, keepdim=True)
        reached_NN = weights_NN @ gram_NN
        distances_N = gram_NN.diagonal() - 2 * reached_NN.diagonal() + (reached_NN * weights_NN).sum(1)
        # The median, because one large model does not change it. If most models are copies of each other, the mean.
        usual = max(float(distances_N.median()), LEAST_SQUARE**2 * float(distances_N.mean()))
        least = max(LEAST_SQUARE * usual, torch.finfo(torch.float64).tiny)
        # ‖x_n − mean of the others‖² = s_n² + the noise of the others' mean, which is unknown in the first round.
        noise_N = weights_NN.square() @ squares_N if number else 0.0
        previous_N, squares_N = squares_N, (distances_N - noise_N).clamp_min(least)
        if float((squares_N / previous_N - 1).abs().max()) < SETTLED:
            break
    level_N = squares_N.rsqrt()
    return level_N[:, None] * gram_NN * level_N, level_N


def contrast_gram(scaled_NN: Tensor, level_N: Tensor) -> Tensor:
    """Return the Gram of N − 1 independent contrasts of the models: the mean's direction turned onto an axis, and dropped.

    By one Householder reflection, N² operations; of unrelated models of one norm the contrasts are as unrelated as they were.
    """
    mirror_N = unit(level_N).clone()
    mirror_N[0] += 1 if float(mirror_N[0]) >= 0 else -1
    mirror_N = unit(mirror_N)
    reached_NN = scaled_NN - 2 * torch.outer(mirror_N, mirror_N @ scaled_NN)
    return (reached_NN - 2 * torch.outer(reached_NN @ mirror_N, mirror_N))[1:, 1:]


def excess_moments(scaled_NN: Tensor, level_N: Tensor, num_values: int) -> tuple[float, float]:
    """Estimate q·m² and q·m³ of q directions of strength m, from what a cloud of models has beyond isotropic noise.

    Strength is variance in units of the noise's, over the detection threshold √(D/N) (Baik, Ben Arous and Péché 2005). With Σ the
    models' covariance scaled to trace D, q·s² = tr Σ² − D and q·s³ = tr Σ³ − D − 3·q·s²; products of two and of three different
    contrasts estimate the traces without bias, which eigenvalues do not. Zero for fewer than five models. Cost N³.
    """
    gram_NN = contrast_gram(scaled_NN, level_N)
    num = gram_NN.shape[0]
    trace = float(gram_NN.diagonal().mean()) if num else 0.0
    if num < 4 or trace <= 0:
        return 0.0, 0.0
    gram_NN = (gram_NN * (num_values / trace)).fill_diagonal_(0)
    second = float(gram_NN.square().sum()) / (num * (num - 1)) - num_values
    third = float((gram_NN @ gram_NN * gram_NN).sum()) / (num * (num - 1) * (num - 2)) - num_values - 3 * second
    threshold = (num_values / num) ** 0.5
    return second / threshold**2, third / threshold**3


def effective_directions(second: float, third: float) -> float:
    """Solve q·m² = `second`, q·m³ = `third` for q: how many equal directions such a cloud has; infinite where none leads.

    >>> effective_directions(4 * 1.5**2, 4 * 1.5**3)
    4.0
    """
    return second**3 / third**2 if second > 0 and third > 0 else float("inf")
