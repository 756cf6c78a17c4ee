"""Sketch a side's moment S (size × size). S is only multiplied with thin blocks, so no size × size matrix is formed.

Legend: S size of the side, L columns of one test block, P all test columns, K of them above round-off, G probes.

The range is found by a randomised block Krylov iteration (Halko, Martinsson and Tropp 2011; Musco and Musco 2015): a Gaussian
block Q₁, then Q₂ = orth(S·Q₁) against Q₁, and so on; each product with S is one read of the weights. Of all blocks
Q = [Q₁ Q₂ …] and their products Y = S·Q comes the Nyström approximation (Tropp et al. 2017)

    Ŝ = Y (QᵀY)⁺ Yᵀ = F·Fᵀ,      R = S − Ŝ,      0 ≤ R ≤ ρ·(1 − QQᵀ)  in the order of semidefinite matrices, since R·Q = 0,

so that S lies between two matrices whose eigenvalues are known:  Ŝ ≤ S ≤ Ŝ + ρ·(1 − QQᵀ).

* k directions of Ŝ hold in S at least what they hold in Ŝ.
* Any k directions hold at most Σₖ λ(Ŝ) + tr R (Ky Fan), and tr R = tr S − tr Ŝ is known. Where the spectrum falls slowly that is
  all of the tail, and says nothing.
* They hold at most Σₖ λ(Ŝ + ρ·(1 − QQᵀ)) too: next to nothing beyond Σₖ λ(Ŝ), once ρ is below the eigenvalues that are kept.
  ρ = tr R would do. Probes z that are drawn apart from Q give a smaller one, the more so the flatter the tail is: with
  P = 1 − QQᵀ, the mean of ‖R·P·S·z‖² is tr R·PS²P·R ≥ tr R·(PSP)²·R ≥ tr R⁴ ≥ ‖R‖⁴ (PSP ≥ R; the last but one step is the
  Araki–Lieb–Thirring inequality). Right but for `CHANCE`.
* Beforehand: E tr R ≤ (1 + k / (L − k − 1)) · Σ_{j>k} λ_j for every k < L − 1 after one pass (Theorem 10.5 of Halko et al., whose A
  is S^½ here: tr R is what of it lies off the range of S^½·Q₁); further passes only add to Q.

Declined: Q·(QᵀSQ)·Qᵀ, whose basis needs one more read to be as good; subspace iteration, which keeps Q's last block alone and
misses twice to a hundred times as much after the same reads; a single pass of three times the columns, which misses 3 to 40 times
as much where eigenvalues fall like 1/j. Figures: docs/decisions/sketch.md.
"""

from __future__ import annotations

from math import inf, sqrt

import torch
from torch import Tensor

from eigenzoo.linalg.side import Outside, SideMoment
from eigenzoo.linalg.spectrum import FLOAT32_ROUND_OFF, NUMERICAL_RANK, eigenpairs

PASSES = 2
"""Reads of the weights."""

OVERSAMPLING = 32
"""Columns beyond the rank; half the rank where that is more. Measured on spectra from flat to exponential."""

PROBES = 16
"""Gaussian columns that measure ‖R‖, in the last two passes."""

CHANCE = 1e-6
"""How often the average over probes is below `SHORTFALL` of its mean, at most."""

SHORTFALL = 0.069
"""t with (t·e^(1−t))^(PROBES/2) ≤ CHANCE: so rarely is a sum of χ² of PROBES degrees of freedom below t of its mean.

By Chernoff's bound, whatever the weights of the sum: Π (1 + 2sa_i)^(−G/2) ≤ (1 + 2sΣa_i)^(−G/2).
"""


def num_columns(rank: int) -> int:
    """Return L for a rank.

    >>> num_columns(8), num_columns(128)
    (40, 192)
    """
    return rank + max(OVERSAMPLING, rank // 2)


class Krylov:
    """The state of one sketch between the reads: ask for `block`, multiply it with S, hand the product to `take`.

        for _ in range(krylov.passes):
            krylov.take(S @ krylov.block())
        moment = krylov.moment(trace=S.trace())

    Args:
        size: S.
        columns: L; fewer where the side is too short for so many in every pass.
        passes: how many blocks and reads; with one, ρ = tr R.
        seed: of the first block and the probes, which depend on nothing else.
        dtype: what the products run in. Blocks are rounded to it, so that what is multiplied is what was asked.

    Float64 in and out. Exact, to round-off, where S has no more than L directions. Cost besides the products: about 8·P²·S and
    10·P³, P = passes·L; memory 4·P·S.
    """

    def __init__(
        self, size: int, columns: int, *, passes: int = PASSES, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> None:
        self.passes = passes
        self._dtype = dtype
        draw = torch.Generator().manual_seed(seed)
        block_SL = torch.randn(size, min(columns, size // passes), generator=draw, dtype=torch.float64)
        self._probes_SG = self._rounded(torch.randn(size, PROBES, generator=draw, dtype=torch.float64))
        self._probed_SG, self._scale = self._probes_SG, 1.0
        self._blocks = [self._rounded(torch.linalg.qr(block_SL)[0])]
        self._products: list[Tensor] = []

    def block(self) -> Tensor:
        """Return the columns that S is to be multiplied with next: a test block, in the last two passes the probes beside it."""
        return torch.cat([self._blocks[-1], self._probes_SG], 1) if self._is_probed() else self._blocks[-1]

    def take(self, product: Tensor) -> None:
        """Take S times the block."""
        columns, probed = self._blocks[-1].shape[1], self._is_probed()
        self._products.append(product[:, :columns])
        if len(self._products) < self.passes:
            block_SL = torch.linalg.qr(self._outside(self._products[-1]))[0]
            # A second time: if little was new, the remainder is not yet orthogonal to the earlier blocks.
            self._blocks.append(self._rounded(torch.linalg.qr(self._outside(block_SL))[0]))
        if probed:
            self._probed_SG = product[:, columns:]
            if len(self._products) < self.passes:
                # P·S·z, at a scale whose products the dtype can hold.
                outside_SG = self._outside(self._probed_SG)
                level = float(outside_SG.norm()) or 1.0
                self._probes_SG, self._scale = self._rounded(outside_SG / level), sqrt(level)

    def moment(self, trace: float) -> SideMoment:
        """Return the moment as F (S × K) and what is outside of it, from the trace of S."""
        tests_SP, products_SP = torch.cat(self._blocks, 1), torch.cat(self._products, 1)
        inner_PP = tests_SP.T @ products_SP
        # Directions at the products' round-off would be divided by their own size. They are left out and counted as outside.
        floor = NUMERICAL_RANK if self._dtype == torch.float64 else FLOAT32_ROUND_OFF
        values_K, vectors_PK = eigenpairs((inner_PP + inner_PP.T) / 2, floor)
        factor_SK = products_SP @ (vectors_PK / values_K.sqrt())
        energy = max(trace - float(factor_SK.square().sum()), 0.0)
        rest_SG = self._probed_SG - factor_SK @ (factor_SK.T @ self._probes_SG)
        fourth = self._scale * (float(rest_SG.square().sum()) / (PROBES * SHORTFALL)) ** 0.25
        fourth = fourth if self.passes > 1 else inf
        upper_P = _upper(factor_SK, tests_SP, min(energy, fourth))
        return SideMoment(factor_SP=factor_SK, outside=Outside(energy, fourth, upper_P, tests_SP.shape[1]))

    def _is_probed(self) -> bool:
        return self.passes > 1 and len(self._products) >= self.passes - 2

    def _outside(self, columns: Tensor) -> Tensor:
        """Remove from columns their part in the test blocks."""
        for earlier_SL in self._blocks:
            columns = columns - earlier_SL @ (earlier_SL.T @ columns)
        return columns

    def _rounded(self, block: Tensor) -> Tensor:
        return block.to(self._dtype).double()


def _upper(factor_SK: Tensor, tests_SP: Tensor, largest: float) -> Tensor:
    """Return the P largest eigenvalues of F·Fᵀ + ρ·(1 − QQᵀ), descending.

    In a basis of [Q, what of F lies off Q] it is small; in all other directions it is ρ.
    """
    along_PK = tests_SP.T @ factor_SK
    rest_KK = torch.linalg.qr(factor_SK - tests_SP @ along_PK, mode="r")[1]
    factor = torch.cat([along_PK, rest_KK])
    small = factor @ factor.T
    num_tests, size = tests_SP.shape[1], tests_SP.shape[0]
    small.diagonal()[num_tests:] += largest
    others = small.new_full((max(size - small.shape[0], 0),), largest)[:num_tests]
    values: Tensor = torch.cat([torch.linalg.eigvalsh(small), others]).sort(descending=True).values
    return values[:num_tests]
