"""Compute with low-rank updates X_n = B_n A_n by their factors. No product B·A is formed.

Legend: N models, O outputs, I inputs, R one update's rank, P ranks of all updates stacked, K kept directions. The scale
of an update is in its B. All sums are float64, because products of small factors are cheap and centring follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from eigenzoo.errors import DataError

Factors = tuple[Tensor, Tensor]
"""(B with shape (O, R), A with shape (R, I)); the update is B @ A."""

ROUND_OFF = 2.0**-46
"""Share of the energy of float32 coefficients and of the center that is their round-off: eps², several times what it is."""

TRUNCATION = 1e-10
"""Share of an update's energy that its rebuilt factors may leave out: 1e-5 of its norm.

Float32 coefficients leave round-off of about 1e-12 of the energy in directions that the update has not.
"""


def inner_products(left: Sequence[Factors], right: Sequence[Factors]) -> Tensor:
    """Return ⟨X_i, X_j⟩ for every pair: Σ (B_iᵀB_j) ∘ (A_iA_jᵀ). Ranks may differ. Two GEMMs, P·P′·(O + I) products."""
    b_left, a_left, owner_left = stack_factors(left)
    b_right, a_right, owner_right = stack_factors(right)
    products_PP = (b_left.T @ b_right).mul_(a_left @ a_right.T)
    rows_NP = products_PP.new_zeros(len(left), products_PP.shape[1]).index_add_(0, owner_left, products_PP)
    products_NN: Tensor = rows_NP.new_zeros(len(left), len(right)).index_add_(1, owner_right, rows_NP)
    return products_NN


def stack_factors(factors: Sequence[Factors]) -> tuple[Tensor, Tensor, Tensor]:
    """Stack factors to B (O, P) and A (P, I), with the owner (model number) of each of the P ranks."""
    owner_P = torch.repeat_interleave(torch.arange(len(factors)), torch.tensor([b.shape[1] for b, _ in factors]))
    return torch.cat([b for b, _ in factors], 1), torch.cat([a for _, a in factors], 0), owner_P


def energy(factors: Factors) -> float:
    """Return ‖BA‖² from the two small Grams."""
    b_OR, a_RI = factors
    return float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum())


def singular_values(factors: Factors) -> Tensor:
    """Return the singular values of BA, descending, at most R: those of the product of two small triangles. Cost (O + I)·R²."""
    b_OR, a_RI = factors
    left, right = torch.linalg.qr(b_OR, mode="r")[1], torch.linalg.qr(a_RI.T, mode="r")[1]
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def output_factor(factors: Factors) -> Tensor:
    """Return F (O, R) with F Fᵀ = (BA)(BA)ᵀ; the factor of the input moment is the same function of (Aᵀ, Bᵀ)."""
    b_OR, a_RI = factors
    # eigh and not Cholesky: a rank-deficient A (unused ranks are zero rows) has a singular Gram.
    values_R, vectors_RR = torch.linalg.eigh(a_RI @ a_RI.T)
    factor_OR: Tensor = b_OR @ (vectors_RR * values_R.clamp_min(0).sqrt())
    return factor_OR


class Cut(NamedTuple):
    """A product of factors, cut to a rank.

    Attributes:
        factors: balanced factors of what is kept.
        energies_P: squared singular values of the product, descending, as many as its own rank.
        energy: ‖left · right‖², with what lies below the own rank.
    """

    factors: Factors
    energies_P: Tensor
    energy: float

    @property
    def whole(self) -> int:
        """The rank of the product, above round-off."""
        return self.energies_P.numel()

    @property
    def lost(self) -> float:
        """The energy that the cut leaves out; zero where it keeps the whole rank."""
        return float(self.energies_P[self.factors[1].shape[0] :].sum())


def cut_product(left_OP: Tensor, right_PI: Tensor, max_rank: int | None = None, noise: float = 0.0) -> Cut:
    """Return the best approximation of rank `max_rank` of the product left · right by balanced factors (Eckart and Young 1936).

    The product's own rank is the least that leaves out at most `TRUNCATION` of the energy, or the energy `noise` (round-off of
    what cancelled in the product, which its own energy does not show); rank 1 with zeros for a zero product. A side that is shorter
    than P is not turned by a QR: the core is then as small without it. The eigenvectors are those of the core's smaller Gram, in a
    third of the time of an SVD; what they are projected on is the product itself, so that singular values down to `TRUNCATION`
    are right. Float64; cost (O + I)·P² + min(O, I, P)³.
    """
    q_left, core = torch.linalg.qr(left_OP) if left_OP.shape[0] > left_OP.shape[1] else (None, left_OP)
    q_right, r_right = torch.linalg.qr(right_PI.T) if right_PI.shape[1] > right_PI.shape[0] else (None, right_PI.T)
    core = core @ r_right.T
    # The energy as well as the values: where their squares overflow, no rank could be told from another.
    total = float(core.square().sum())
    if not isfinite(total):
        raise DataError("factors contain NaN or Inf, or their product overflows", rule="an update has finite values")
    wide = core.shape[0] <= core.shape[1]
    thin_SL = core if wide else core.T
    values_S, vectors_SS = torch.linalg.eigh(thin_SL @ thin_SL.T)
    energies_S = values_S.flip(0).clamp_min(0)
    tails = total - energies_S.cumsum(0)
    whole = max(1, min(energies_S.numel(), int((tails > max(TRUNCATION * total, noise)).sum()) + 1))
    rank = whole if max_rank is None else min(whole, max_rank)
    kept_SR = vectors_SS.flip(1)[:, :rank]
    root_R = energies_S[:rank].sqrt().sqrt()
    other_RL = (kept_SR.T @ thin_SL) / root_R.where(root_R > 0, torch.ones_like(root_R))[:, None]
    left, right = (kept_SR * root_R, other_RL) if wide else (other_RL.T, (kept_SR * root_R).T)
    factors = left if q_left is None else q_left @ left, right if q_right is None else right @ q_right.T
    return Cut(factors, energies_S[:whole], total)


def truncated(
    left_OP: Tensor, right_PI: Tensor, max_rank: int | None = None, noise: float = 0.0
) -> tuple[Factors, float]:
    """Return the factors of `cut_product`, and the share of energy that they leave out."""
    cut = cut_product(left_OP, right_PI, max_rank, noise)
    kept = float(cut.energies_P[: cut.factors[1].shape[0]].sum())
    whole_side = cut.factors[1].shape[0] >= min(*left_OP.shape, right_PI.shape[1])
    return cut.factors, max(cut.energy - kept, 0.0) / cut.energy if cut.energy > 0 and not whole_side else 0.0


def cut(factors: Factors, max_rank: int) -> tuple[Factors, float]:
    """Return the factors of the best approximation of rank `max_rank` of BA, and ‖BA − M̂‖²: the energy that it leaves out.

    Factors of at most that rank come back as they are; BA is never formed where it is larger than they are.
    """
    if factors[1].shape[0] <= max_rank:
        return factors, 0.0
    found = cut_product(*factors, max_rank)
    return found.factors, found.lost
