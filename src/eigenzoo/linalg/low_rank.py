"""Matrices cut to a low rank, and kept as two small factors: a core (P, Q) as R·(P + Q) numbers.

    C ≈ L·H,   L = U √S (P, R),   H = √S Vᵀ (R, Q)   with U S Vᵀ the leading part of the SVD of C

The best approximation of its rank (Eckart and Young 1936). The columns of L are orthogonal, and so are the rows of H, with the same
lengths: neither factor needs a wider range of numbers than the other.

Legend: N matrices, P rows, Q columns, R kept rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

LARGEST = 2**26
"""Most numbers of a matrix that is kept as factors. Readers multiply the factors, and a small file must not ask for much memory."""


@dataclass(frozen=True)
class LowRank:
    """How matrices are kept as factors.

    Attributes:
        shape: (P, Q).
        rank: R.
        center: (P, Q), or None. The factors are those of the matrix plus the center.
    """

    shape: tuple[int, int]
    rank: int
    center: Tensor | None = None

    @property
    def num_numbers(self) -> int:
        """Numbers of both factors of one matrix."""
        return num_numbers(self.shape, self.rank)

    def matrices(self, numbers: Tensor) -> Tensor:
        """Return the matrices (…, P, Q) that factors (…, R·(P + Q)) stand for, in their dtype; computed in float64."""
        found = multiply(numbers.double(), self.shape, self.rank)
        return (found if self.center is None else found - self.center.double()).to(numbers.dtype)

    def numbers(self, matrices: Tensor) -> Tensor:
        """Return the factors (…, R·(P + Q)) of the best approximations of matrices (…, P, Q), in their dtype."""
        whole = matrices.double() if self.center is None else matrices.double() + self.center.double()
        many = matrices.shape[:-2]
        return factor(whole.reshape(prod(many), *self.shape), self.rank).reshape(*many, -1).to(matrices.dtype)


def num_numbers(shape: tuple[int, int], rank: int) -> int:
    """Numbers of both factors of one matrix."""
    return rank * sum(shape)


def pays(shape: tuple[int, int], rank: int) -> bool:
    """Tell whether the factors take fewer numbers than the matrix, and the matrix is none too large to make from them."""
    return num_numbers(shape, rank) < shape[0] * shape[1] <= LARGEST


def factor(matrices_NPQ: Tensor, rank: int) -> Tensor:
    """Return the factors (N, R·(P + Q)) of each matrix's best approximation: L row by row, then H. Cost N·P·Q·min(P, Q)."""
    u_NPK, values_NK, vt_NKQ = torch.linalg.svd(matrices_NPQ, full_matrices=False)
    roots_NR = values_NK[:, :rank].sqrt()
    left_NPR = u_NPK[:, :, :rank] * roots_NR[:, None]
    right_NRQ = roots_NR[:, :, None] * vt_NKQ[:, :rank]
    return torch.cat([left_NPR.flatten(1), right_NRQ.flatten(1)], 1)


def multiply(numbers: Tensor, shape: tuple[int, int], rank: int) -> Tensor:
    """Return L·H (…, P, Q) of factors (…, R·(P + Q)), in their dtype."""
    rows, columns = shape
    left, right = torch.split(numbers, [rows * rank, rank * columns], -1)
    many = numbers.shape[:-1]
    return left.reshape(*many, rows, rank) @ right.reshape(*many, rank, columns)


def tails(matrices_NPQ: Tensor) -> Tensor:
    """Return what all matrices lose together, Σ‖C − L·H‖², at ranks 0, 1, … min(P, Q)."""
    energies_K = torch.linalg.svdvals(matrices_NPQ).square().sum(0)
    # Summed from the smallest on, so that small tails are not differences of large sums.
    return torch.cat([energies_K.flip(0).cumsum(0).flip(0), energies_K.new_zeros(1)])
