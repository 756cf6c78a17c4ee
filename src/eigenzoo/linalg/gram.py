"""Grams of stacks: the N × N second moment from which every statement about a zoo follows.

Legend: N models, D values of one flattened layer.
"""

from __future__ import annotations

from torch import Tensor


def center_gram(gram_NN: Tensor) -> Tensor:
    """Return HKH with H = I − 11ᵀ/N, the Gram of the rows after their mean is removed; symmetric to the last bit.

    Exact in exact arithmetic whatever common offset the rows had. In floating point the offset's energy cancels, so
    remove most of it from the rows first: what is lost is eps · (offset energy).
    """
    centered = gram_NN - gram_NN.mean(0, keepdim=True)
    centered = centered - centered.mean(1, keepdim=True)
    return (centered + centered.T) / 2


def shift_gram(gram_NN: Tensor, cross_N: Tensor, energy: float) -> Tensor:
    """Return the Gram of rows y_n + d from that of y_n, with `cross_N` = ⟨y_n, d⟩ and `energy` = ⟨d, d⟩."""
    return gram_NN + cross_N[:, None] + cross_N[None, :] + energy


def split_gram(raw_NN: Tensor) -> tuple[Tensor, Tensor, float]:
    """Split the Gram of raw rows into (centred Gram, ⟨mean, x_n − mean⟩, ⟨mean, mean⟩); `shift_gram` is its inverse."""
    energy = float(raw_NN.mean())
    return center_gram(raw_NN), raw_NN.mean(1) - energy, energy


def squared_distances(gram_NN: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖² for all pairs; any Gram of the rows will do, since a common offset drops out."""
    diagonal = gram_NN.diagonal()
    return (diagonal[:, None] + diagonal[None, :] - 2 * gram_NN).clamp_min(0)
