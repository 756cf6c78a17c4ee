"""The smallest space that holds some low-rank updates, in a basis that depends on the updates alone.

    X_t = U C_t Vᵀ,   U (O, P) and V (I, Q) orthonormal,   C_t (P, Q)

U holds the left singular vectors of [X_1 … X_T], V the right ones of the same matrices one below the other. They come from QR
decompositions of the stacked factors. A factor pair (B·G, G⁻¹·A) is the same update, and gives the same frame; so does any order of
the updates. The basis that singular vectors of the stacked *factors* form has neither property.

A singular vector is only known up to its sign, and vectors of equal singular values up to a rotation. `gap` says how close two are.

Legend: T updates, O outputs, I inputs, R one update's rank, S ranks of all updates, P and Q the frame's dimensions, K kept rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eigenzoo.linalg.lora import Factors

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class CoreFrame:
    """Updates as cores in one frame.

    Attributes:
        outputs_OP, inputs_IQ: orthonormal columns.
        halves: each update's core C_t as two factors (P, R) and (R, Q).
        gap: smallest difference of two neighbouring singular values, relative to the largest. Where it is near zero, the basis is
            not unique, nor is what depends on it.
    """

    outputs_OP: Tensor
    inputs_IQ: Tensor
    halves: tuple[Factors, ...]
    gap: float

    def cores(self) -> Tensor:
        """Return the updates in this frame, (T, P, Q)."""
        return torch.stack([left @ right for left, right in self.halves])


def core_frame(updates: Sequence[Factors]) -> CoreFrame:
    """Return the frame of updates B·A, float64. Exact to round-off, whatever their ranks.

    Cost (O + I)·S² + S³. Nothing is dense.
    """
    ranks = [a.shape[0] for _, a in updates]
    left, reduced_left = _reduced(torch.cat([b for b, _ in updates], 1))
    right, reduced_right = _reduced(torch.cat([a for _, a in updates], 0).T)
    halves = list(zip(torch.split(reduced_left, ranks, 1), torch.split(reduced_right, ranks, 1), strict=True))
    # [X_1 … X_T] and [B_1 L_1ᵀ … B_T L_Tᵀ], with A_tᵀ = Q_t L_t, have the same left singular vectors: no Gram loses digits.
    turn_left, gap_left = _singular_vectors(torch.cat([b @ _triangle(a).T for b, a in halves], 1), left.shape[0])
    turn_right, gap_right = _singular_vectors(torch.cat([a @ _triangle(b).T for b, a in halves], 1), right.shape[0])
    turned = tuple((turn_left.T @ b, (turn_right.T @ a).T) for b, a in halves)
    return CoreFrame(left @ turn_left, right @ turn_right, turned, min(gap_left, gap_right))


class Truncated(NamedTuple):
    """A product of two factors, cut to a rank.

    Attributes:
        factors: balanced factors B (O, K) and A (K, I) of what is kept; rank 1 with zeros where nothing is.
        values: all singular values of the product above round-off, descending.
    """

    factors: Factors
    values: Tensor


def truncate(
    left_OS: Tensor, right_SI: Tensor, choose: Callable[[Tensor], int] = Tensor.numel, round_off: float = 0.0
) -> Truncated:
    """Return the best approximation of a product left · right of the rank that `choose` gives for its singular values.

    Values up to `round_off`, an absolute number, count as zero: what cancelled in the product does not show in it. The core of two
    QR decompositions has the product's singular values, so that they are right down to eps times the largest. Float64; cost
    (O + I)·S² + S³.
    """
    q_left, r_left = _reduced(left_OS)
    q_right, r_right = _reduced(right_SI.T)
    u, values, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    largest = float(values[0]) if values.numel() else 0.0
    floor = max(round_off, largest * max(left_OS.shape[0], right_SI.shape[1]) * EPSILON)
    values = values[values > floor]
    kept = min(choose(values), values.numel()) if values.numel() else 0
    if not kept:
        zeros = left_OS.new_zeros(left_OS.shape[0], 1), right_SI.new_zeros(1, right_SI.shape[1])
        return Truncated(zeros, values)
    root = values[:kept].sqrt()
    return Truncated(((q_left @ u[:, :kept]) * root, root[:, None] * (vt[:kept] @ q_right.T)), values)


def _reduced(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of the columns, and the columns in it."""
    if stacked.shape[0] <= stacked.shape[1]:
        return torch.eye(stacked.shape[0], dtype=stacked.dtype), stacked
    basis, triangle = torch.linalg.qr(stacked)
    return basis, triangle


def _triangle(columns: Tensor) -> Tensor:
    triangle: Tensor = torch.linalg.qr(columns, mode="r")[1]
    return triangle


def _singular_vectors(factor: Tensor, side: int) -> tuple[Tensor, float]:
    """Return the left singular vectors above round-off (at least one), and the smallest relative gap of their values."""
    vectors, values, _ = torch.linalg.svd(factor, full_matrices=False)
    largest = float(values[0])
    if largest == 0:
        return vectors[:, :1], 1.0
    # The rule of numpy.linalg.matrix_rank.
    rank = int((values > largest * max(side, factor.shape[1]) * EPSILON).sum())
    gaps = -values[:rank].diff() / largest
    return vectors[:, :rank], float(gaps.min()) if rank > 1 else 1.0
