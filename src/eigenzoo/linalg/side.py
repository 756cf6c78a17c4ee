"""The second moment of one side of a stack: its outputs or its inputs.

Legend: S size of the side, P columns of a factor, K directions above round-off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.linalg.spectrum import eigenpairs


@dataclass(frozen=True)
class SideMoment:
    """An S × S second moment, held dense or as a factor F (S, P) with moment = F·Fᵀ.

    LoRA updates of a small zoo have P < S ranks in all: then the P × P Gram of the factor has the same eigenvalues, at
    P³ instead of S³.
    """

    dense_SS: Tensor | None = None
    factor_SP: Tensor | None = None

    @property
    def size(self) -> int:
        """S."""
        held = self.dense_SS if self.factor_SP is None else self.factor_SP
        return 0 if held is None else held.shape[0]

    @property
    def trace(self) -> float:
        """The sum of the eigenvalues."""
        if self.factor_SP is not None:
            return float(self.factor_SP.square().sum())
        return 0.0 if self.dense_SS is None else float(self.dense_SS.diagonal().sum())

    @property
    def matrix_SS(self) -> Tensor:
        """The moment itself."""
        if self.factor_SP is not None:
            return self.factor_SP @ self.factor_SP.T
        return torch.zeros(0, 0, dtype=torch.float64) if self.dense_SS is None else self.dense_SS

    def eigenvectors(self) -> Eigenvectors:
        """Eigenvalues above round-off, and a basis of as many leading directions as are then asked for."""
        if self.factor_SP is None:
            return Eigenvectors(*eigenpairs(self.matrix_SS), None)
        return Eigenvectors(*eigenpairs(self.factor_SP.T @ self.factor_SP), self.factor_SP)


@dataclass(frozen=True)
class Eigenvectors:
    """Eigenvalues (descending) of a moment, and its eigenvectors: dense, or behind a factor."""

    values_K: Tensor
    vectors: Tensor
    factor_SP: Tensor | None

    def basis(self, rank: int) -> Tensor:
        """Return the leading `rank` eigenvectors as orthonormal columns (S, rank)."""
        vectors = self.vectors[:, :rank]
        if self.factor_SP is None:
            return vectors.contiguous()
        # Small eigenvalues leave F·w short of orthogonal by eps · largest / own; QR mends it and keeps the order.
        basis: Tensor = torch.linalg.qr(self.factor_SP @ (vectors / self.values_K[:rank].sqrt()))[0]
        return basis.contiguous()
