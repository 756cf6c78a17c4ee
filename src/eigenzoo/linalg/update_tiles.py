"""Compute Grams of low-rank updates X_n = B_n A_n by tiles of models: ⟨X_i, X_j⟩ = Σ (B_iᵀB_j) ∘ (A_iA_jᵀ), without B·A.

Legend: n models of a tile, O outputs, I inputs, R one update's rank, P ranks of a tile's updates stacked. The scale is in B.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from eigenzoo.linalg import kernels
from eigenzoo.linalg.block_sums import FAST


@dataclass(frozen=True)
class Tile:
    """The factors of some models side by side: B (O, P) and A (P, I), each model's ranks in a run."""

    b_OP: Tensor
    a_PI: Tensor
    ranks: tuple[int, ...]

    @property
    def firsts(self) -> np.ndarray:
        """Where each model's run of ranks begins."""
        return np.cumsum([0, *self.ranks[:-1]])

    def sum_ranks(self, values_PQ: Tensor) -> Tensor:
        """Sum the rows of each model (n, Q): a product with zeros and ones, the fastest way to add up the ranks of many models."""
        return kernels.product(self._belongs_nP.to(values_PQ.dtype), values_PQ)

    @cached_property
    def _belongs_nP(self) -> Tensor:
        owner_P = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        return (torch.arange(len(self.ranks))[:, None] == owner_P).to(self.b_OP)

    @cached_property
    def starts_n(self) -> Tensor:
        """`firsts` on the device of the factors."""
        return torch.from_numpy(self.firsts).to(self.b_OP.device)

    def sums(self) -> Tensor:
        """Return the sum of each update's entries (n,), in float64."""
        along_P = self.b_OP.sum(0).double() * self.a_PI.sum(1).double()
        return self.sum_ranks(along_P[:, None])[:, 0].cpu()


@dataclass(frozen=True)
class TileProducts:
    """Products of two tiles: of the updates, and of the leading rows of their A-factors; `small_B`, `small_A` as of `products`."""

    updates_nn: Tensor
    starts_nn: Tensor
    outputs_PP: Tensor
    inputs_PP: Tensor


def products(left: Tile, right: Tile, num_rows: int, precision: str) -> TileProducts:
    """Return the products of two tiles, float64: ⟨X_i, X_j⟩, and those of the first `num_rows` rows of A_i and A_j.

    Two products of P × P′ in the factors' dtype: symmetric ones, at half the cost, for a tile with itself.
    """
    outputs_PP = _product(left.b_OP.T, None if right is left else right.b_OP.T, precision)
    inputs_PP = _product(left.a_PI, None if right is left else right.a_PI, precision)
    joint_PP = outputs_PP * inputs_PP
    # Sixteen terms in the factors' dtype, all others in float64.
    reduced_nP = left.sum_ranks(joint_PP).double()
    updates_nn = right.sum_ranks(reduced_nP.T.contiguous()).T
    starts_nn = torch.zeros_like(updates_nn)
    rows_n, columns_n = left.starts_n, right.starts_n
    for row in range(num_rows):
        starts_nn += inputs_PP[rows_n[:, None] + row, columns_n + row]
    return TileProducts(updates_nn.cpu(), starts_nn.cpu(), outputs_PP, inputs_PP)


def _product(left_PS: Tensor, right_PS: Tensor | None, precision: str) -> Tensor:
    if precision == FAST and left_PS.dtype == torch.float32:
        if right_PS is None:
            return kernels.bfloat16_gram(left_PS)
        return kernels.product(left_PS.bfloat16().float(), right_PS.bfloat16().float().T)
    return kernels.gram(left_PS) if right_PS is None else kernels.product(left_PS, right_PS.T)


def singular_values(tile: Tile, own: TileProducts, width: int) -> Tensor:
    """Return each update's singular values (n, width), descending and padded with zeros, from its own small products.

    Those of BA are the roots of the eigenvalues of (AAᵀ)^½ (BᵀB) (AAᵀ)^½: right to half of the digits of the products, relative
    to the largest.
    """
    values_nR = torch.zeros(len(tile.ranks), width, dtype=torch.float64)
    outputs, inputs = own.outputs_PP.double().cpu(), own.inputs_PP.double().cpu()
    firsts = torch.from_numpy(tile.firsts)
    for rank in set(tile.ranks):
        models_n = torch.tensor([model for model, own_rank in enumerate(tile.ranks) if own_rank == rank])
        index = firsts[models_n][:, None] + torch.arange(rank)
        b_nRR, a_nRR = (values[index[:, :, None], index[:, None, :]] for values in (outputs, inputs))
        levels_nR, vectors_nRR = np.linalg.eigh(a_nRR.numpy())
        half_nRR = vectors_nRR * np.sqrt(np.clip(levels_nR, 0, None))[:, None, :]
        squares_nR = np.linalg.eigvalsh(half_nRR.transpose(0, 2, 1) @ b_nRR.numpy() @ half_nRR)
        values_nR[models_n, :rank] = torch.from_numpy(np.sqrt(np.clip(squares_nR[:, ::-1], 0, None)).copy())
    return values_nR
