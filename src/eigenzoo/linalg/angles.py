"""Principal angles between subspaces."""

from __future__ import annotations

import torch
from torch import Tensor


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
