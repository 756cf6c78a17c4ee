"""The second moment of one side of a stack: its outputs or its inputs.

Legend: S size of the side, P columns of a factor, K directions above round-off.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pow

import torch
from torch import Tensor

from eigenzoo.errors import RankError
from eigenzoo.linalg.spectrum import eigenpairs


@dataclass(frozen=True)
class Outside:
    """What a sketch leaves out of a moment S: S − F·Fᵀ, positive semidefinite to the products' round-off.

    Attributes:
        energy: its trace.
        fourth: no less than its Schatten-4 norm, (Σ λ⁴)^¼, but for `sketch.CHANCE`; infinite where it is not known.
        upper_P: leading eigenvalues, descending, of a matrix that S is not above, but for the same.
        columns: how many directions were tried; a factor of fewer columns holds all that are above round-off.
    """

    energy: float
    fourth: float
    upper_P: Tensor
    columns: int


@dataclass(frozen=True)
class SideMoment:
    """An S × S second moment, held dense or as a factor F (S, P) with moment = F·Fᵀ, or F·Fᵀ + `outside` for a sketch.

    LoRA updates of a small zoo have P < S ranks in all: then the P × P Gram of the factor has the same eigenvalues, at
    P³ instead of S³.
    """

    dense_SS: Tensor | None = None
    factor_SP: Tensor | None = None
    outside: Outside | None = None

    @property
    def size(self) -> int:
        """S."""
        stored = self.dense_SS if self.factor_SP is None else self.factor_SP
        return 0 if stored is None else stored.shape[0]

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues, those outside of a sketch too: the denominator of every share."""
        if self.factor_SP is not None:
            return float(self.factor_SP.square().sum()) + (0.0 if self.outside is None else self.outside.energy)
        return 0.0 if self.dense_SS is None else float(self.dense_SS.diagonal().sum())

    @property
    def matrix_SS(self) -> Tensor:
        """The moment itself; of a sketch what it holds."""
        if self.factor_SP is not None:
            return self.factor_SP @ self.factor_SP.T
        return torch.zeros(0, 0, dtype=torch.float64) if self.dense_SS is None else self.dense_SS

    def eigenvectors(self) -> Eigenvectors:
        """Eigenvalues above round-off, and a basis of as many leading directions as are then asked for."""
        if self.factor_SP is None:
            return Eigenvectors(*eigenpairs(self.matrix_SS), None)
        return Eigenvectors(*eigenpairs(self.factor_SP.T @ self.factor_SP), self.factor_SP, self.outside)


@dataclass(frozen=True)
class Eigenvectors:
    """Eigenvalues (descending) of a moment, and its eigenvectors: dense, or behind a factor; of a sketch those it holds."""

    values_K: Tensor
    vectors: Tensor
    factor_SP: Tensor | None
    outside: Outside | None = None

    def check_rank(self, rank: int) -> None:
        """Raise RankError for a rank that a sketch does not hold, though the moment may."""
        num_directions = self.values_K.numel()
        if self.outside is not None and self.factor_SP is not None and rank > num_directions:
            if self.factor_SP.shape[1] < self.outside.columns:
                return
            raise RankError(
                f"rank {rank}, but the sketch has only {num_directions} directions",
                rule="a sketch is made for a rank, with some spare directions",
                next_step=f"sketch again for rank {rank}, use rank <= {num_directions}, or use solver 'exact'",
            )

    def most(self, rank: int) -> float:
        """Return what any `rank` directions can hold of the moment at most: Σ λ, and for a sketch what may lie outside of it."""
        energy = float(self.values_K[:rank].sum())
        if self.outside is None:
            return energy
        # Σₖ λ(S) ≤ Σₖ λ(F·Fᵀ) + Σₖ λ(S − F·Fᵀ) (Ky Fan), and Σₖ λ ≤ k^¾ (Σ λ⁴)^¼ (Hölder).
        rest = min(self.outside.energy, pow(rank, 0.75) * self.outside.fourth)
        return max(energy, min(energy + rest, float(self.outside.upper_P[:rank].sum())))

    def basis(self, rank: int) -> Tensor:
        """Return the leading `rank` eigenvectors as orthonormal columns (S, rank); all there are where those are fewer."""
        self.check_rank(rank)
        vectors = self.vectors[:, :rank]
        if self.factor_SP is None:
            return vectors.contiguous()
        # For small eigenvalues F·w is not orthogonal, by eps · largest / own. QR corrects this and keeps the order.
        basis: Tensor = torch.linalg.qr(self.factor_SP @ (vectors / self.values_K[:rank].sqrt()))[0]
        return basis.contiguous()
