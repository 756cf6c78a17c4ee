"""Compute principal angles between subspaces: of explicit bases, of two halves of a zoo from its Gram, and of random subspaces.

Legend: N models, D values of one flattened layer, K and L directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eigenzoo.linalg.gram import center_gram
from eigenzoo.linalg.heldout import FLOOR
from eigenzoo.linalg.nulls import bartlett_factor
from eigenzoo.linalg.spectrum import eigenpairs


def principal_cosines(basis_KD: Tensor, other_LD: Tensor) -> Tensor:
    """Cosines of the principal angles between two row-orthonormal bases, descending (Björck and Golub 1973).

    The cosine cannot tell angles below 1e-8; for those use `subspace_gap`.
    """
    cosines: Tensor = torch.linalg.svdvals(basis_KD @ other_LD.T).clamp_max(1)
    return cosines


def subspace_gap(basis_KD: Tensor, other_LD: Tensor) -> float:
    """Sine of the largest principal angle: the spectral norm of what one basis leaves outside the other.

    >>> subspace_gap(torch.eye(3)[:1], torch.eye(3)[:2])
    0.0
    """
    outside = basis_KD - (basis_KD @ other_LD.T) @ other_LD
    return float(torch.linalg.matrix_norm(outside, ord=2))


def half_cosines(gram_NN: Tensor, first: Tensor, second: Tensor, rank: int) -> Tensor:
    """Cosines between the top `rank` directions of two disjoint groups of models, each centred by its own mean.

    Singular values of Λ_A^-½ U_Aᵀ K_AB U_B Λ_B^-½: exact from any Gram of the rows, no weight is read. Fewer than `rank` where
    a group spans less. Cost A³ + B³.
    """
    cross_AB = gram_NN[first][:, second]
    cross_AB = cross_AB - cross_AB.mean(0, keepdim=True)
    cross_AB = cross_AB - cross_AB.mean(1, keepdim=True)
    values_A, vectors_A = eigenpairs(center_gram(gram_NN[first][:, first]), FLOOR)
    values_B, vectors_B = eigenpairs(center_gram(gram_NN[second][:, second]), FLOOR)
    left, right = vectors_A[:, :rank] / values_A[:rank].sqrt(), vectors_B[:, :rank] / values_B[:rank].sqrt()
    cosines: Tensor = torch.linalg.svdvals(left.T @ cross_AB @ right).clamp_max(1)
    return cosines


def random_cosines(rank: int, num_values: int, *, draws: int = 20, seed: int = 0) -> Tensor:
    """Cosines between two unrelated subspaces of `rank` directions in D dimensions: (draws, rank), descending.

    Their squares are the eigenvalues of W₁(W₁ + W₂)⁻¹, W₁ and W₂ Wishart with K and D − K degrees of freedom (Muirhead 1982,
    3.3): exact, and K³ whatever D. Two subspaces of more than D / 2 directions must meet: those cosines are 1.
    """
    if 2 * rank > num_values:
        inner = random_cosines(num_values - rank, num_values, draws=draws, seed=seed)
        return torch.cat([torch.ones(draws, 2 * rank - num_values, dtype=torch.float64), inner], 1)
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.zeros(draws, rank, dtype=torch.float64)
    for draw in range(draws if rank else 0):
        first = bartlett_factor(rank, rank, generator)
        second = bartlett_factor(rank, num_values - rank, generator)
        near, far = first @ first.T, second @ second.T
        root = torch.linalg.cholesky(near + far)
        inner = torch.linalg.solve_triangular(root, near, upper=False)
        shares = torch.linalg.eigvalsh(torch.linalg.solve_triangular(root, inner.T, upper=False))
        cosines[draw] = shares.flip(0).clamp(0, 1).sqrt()
    return cosines
