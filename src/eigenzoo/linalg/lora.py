"""Compute with low-rank updates X_n = B_n A_n by their factors. No product B·A is formed.

Legend: N models, O outputs, I inputs, R one update's rank, P ranks of all updates stacked, K kept directions. The scale
of an update is in its B. All sums are float64, because products of small factors are cheap and centring follows.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def truncated(
    left_OP: Tensor, right_PI: Tensor, max_rank: int | None = None, noise: float = 0.0
) -> tuple[Factors, float]:
    """Return the balanced factors of least rank of the product left · right, and the share of energy that they leave out.

    QR of both sides, SVD of the small core. The rank is the least that leaves out at most `TRUNCATION` of the energy, or
    the energy `noise` (round-off of what cancelled in the product, which its own energy does not show), or `max_rank` where
    that is less; rank 1 with zeros for a zero product. Float64; cost (O + I)·P² + P³.
    """
    q_left, r_left = torch.linalg.qr(left_OP)
    q_right, r_right = torch.linalg.qr(right_PI.T)
    core_PP = r_left @ r_right.T
    # The energy as well as the values: where their squares overflow, no rank could be told from another.
    if not bool(core_PP.square().sum().isfinite()):
        raise DataError("factors contain NaN or Inf, or their product overflows", rule="an update has finite values")
    u_PP, values_P, vt_PP = torch.linalg.svd(core_PP, full_matrices=False)
    energies_P = values_P.square()
    total = float(energies_P.sum())
    tails = total - energies_P.cumsum(0)
    rank = max(1, min(values_P.numel(), int((tails > max(TRUNCATION * total, noise)).sum()) + 1))
    rank = rank if max_rank is None else min(rank, max_rank)
    root_R = values_P[:rank].sqrt()
    left_out = max(float(tails[rank - 1]), 0.0) / total if total > 0 and rank < values_P.numel() else 0.0
    return ((q_left @ u_PP[:, :rank]) * root_R, root_R[:, None] * (vt_PP[:rank] @ q_right.T)), left_out


def cut(factors: Factors, max_rank: int) -> tuple[Factors, float]:
    """Return the factors of the best approximation of rank `max_rank` of BA, and ‖BA − M̂‖²: the energy that it leaves out.

    Factors of at most that rank come back as they are. QR of both sides and SVD of the core (Eckart and Young 1936); BA is
    never formed. Float64; cost (O + I)·R² + R³.
    """
    if factors[1].shape[0] <= max_rank:
        return factors, 0.0
    factors_cut, share = truncated(*factors, max_rank)
    return factors_cut, share * energy(factors)
