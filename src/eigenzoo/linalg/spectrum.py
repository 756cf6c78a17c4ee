"""Compute spectra of symmetric second moments.

Legend: N rows of the moment, K kept directions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NO_VARIANCE = 1e-13
"""Share of a stack's energy below which its variance is round-off.

The squared distance between float32 weights that agree to 3e-7 of their norm: six float32 factorings of one LoRA
update differ by about 1e-7 of it.
"""

FLOAT32_ROUND_OFF = 1e-7
"""The same for a moment of float32 products: measured, their sum over blocks is right to a few 1e-8 of the largest."""

NUMERICAL_RANK = 1e-13
"""Eigenvalues below this share of the largest are round-off of a float64 moment; see `eigenpairs`."""


LEADING_FROM = 192
"""Rows from which on a few leading eigenpairs are found alone, in less than half the time of all of them."""


def eigenpairs(moment_NN: Tensor, floor: float = NUMERICAL_RANK, num: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors (columns) of a symmetric moment, without those that are round-off.

    Float64 in and out; eigenvalues at or below `floor` · largest are left out, so a rank-deficient stack gives fewer
    than N. With `num`, the leading `num` of what is left. Cost N³ time, N² memory.
    """
    size = moment_NN.shape[0]
    if num is not None and size >= LEADING_FROM and 0 < num <= size // 4:
        # Imported here, because its import takes a third of the time of all of eigenzoo, and smaller zoos never need it.
        import scipy.linalg

        values, vectors = scipy.linalg.eigh(
            moment_NN.numpy(), subset_by_index=[size - num, size - 1], check_finite=False
        )
    else:
        # A quarter faster than numpy's at 40 to 500 rows (docs/log.md).
        values, vectors = (found.numpy() for found in torch.linalg.eigh(moment_NN))
    largest = float(values[-1]) if len(values) else 0.0
    num_above = int(np.count_nonzero(values > max(floor * largest, 0.0))) if largest > 0 else 0
    leading = slice(None, -1 - (num_above if num is None else min(num, num_above)), -1)
    return torch.from_numpy(values[leading].copy()), torch.from_numpy(vectors[:, leading].copy())


def explained_variance_ratio(moment_NN: Tensor) -> Tensor:
    """Eigenvalues of a centred moment, descending, over its trace: the denominator is the total, never the kept part.

    Length N, padded by the zeros of a rank-deficient moment; all zero where there is no variance at all.

    >>> explained_variance_ratio(torch.diag(torch.tensor([1.0, 3.0])).double()).tolist()
    [0.75, 0.25]
    """
    values_N = torch.linalg.eigvalsh(moment_NN).flip(0).clamp_min(0)
    total = float(moment_NN.diagonal().sum())
    return values_N / total if total > 0 else torch.zeros_like(values_N)


def effective_rank(ratio_N: Tensor) -> float:
    """exp of the entropy of a spectrum (Roy and Vetterli 2007): 1 for one direction, N for N equal ones.

    >>> round(effective_rank(torch.full((4,), 0.25)), 6)
    4.0
    """
    shares = ratio_N[ratio_N > 0].double()
    if not shares.numel():
        return 0.0
    shares = shares / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


SMALL_SIDE = 256
"""Side of a matrix up to which all its singular values are computed to know the largest."""


def largest_singular_value(matrix: Tensor) -> float:
    """Return the largest singular value of a dense float64 matrix; of a large one by Lanczos' method, in some tens of products."""
    if min(matrix.shape) <= SMALL_SIDE or not bool(matrix.any()):
        return float(torch.linalg.matrix_norm(matrix, 2))
    from scipy.sparse.linalg import svds

    start = np.ones(min(matrix.shape))
    # The error of the value is of the order of the squared tolerance, which is that of the vector.
    return float(svds(matrix.numpy(), k=1, v0=start, tol=1e-5, return_singular_vectors=False)[0])
