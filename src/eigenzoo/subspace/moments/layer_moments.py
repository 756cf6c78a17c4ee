"""Second moments of a layer's stack: the result of one pass over the weights, from which everything else is computed.

`collecting` computes them for full weights, `update_moments` for LoRA updates.

Legend: N models, D values of one flattened layer, O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eigenzoo.display import counted
from eigenzoo.linalg.block_sums import FAST, sample
from eigenzoo.linalg.gram import center_gram, shift_gram, split_gram
from eigenzoo.linalg.kernels import BFLOAT16_ROUND_OFF
from eigenzoo.linalg.side import SideMoment
from eigenzoo.linalg.spectrum import FLOAT32_ROUND_OFF, NO_VARIANCE, NUMERICAL_RANK
from eigenzoo.zoo.stack import Stack


@dataclass(frozen=True)
class LayerMoments:
    """The second moments of one layer's stack X (N × O × I), in float64.

    With R the mean of the first `num_reference` models (all of them, until models are added), Y = X − R, and M the center
    that is removed (the models' mean, its column means, zero, or a scalar):

    Attributes:
        gram_NN: ⟨Y_i, Y_j⟩.
        cross_N: ⟨R, Y_i⟩.
        reference_energy: ⟨R, R⟩.
        num_values: D.
        round_off: share of the largest eigenvalue below which eigenvalues are the products' round-off.
        num_reference: the number of first models whose mean is R.
        removed: M, broadcastable over (O, I); None for center `models`, because it needs a pass over the weights.
        shift_N: ⟨R − M, Y_i⟩, and shift_energy: ⟨R − M, R − M⟩; for center `models` zero and unused.
        outputs, inputs: Σ (X_n − M)(X_n − M)ᵀ and its mirror, for the truncated axes. For LoRA updates they are about zero, so that
            the bases contain the mean (see `tucker`).
        entries: effective dimension of the models if their entries varied independently: (Σ v)² / Σ v² with v the entries'
            variances over about 64 models or fewer. D if all variances are equal. None for LoRA updates, which are not multiplied
            out. This and all below are None after growth from a bundle alone.
        sums_N: sum of each model's entries, ⟨1, X_n⟩.
        singular_NR: for LoRA updates, their singular values, descending, padded with zeros.
        starts_NN: for LoRA updates, the inner products of the leading rows of A that all models have. They reveal a shared
            initialisation, which the product B·A may not.
    """

    gram_NN: Tensor
    cross_N: Tensor
    reference_energy: float
    num_values: int
    num_reference: int
    round_off: float = NUMERICAL_RANK
    removed: Tensor | None = None
    shift_N: Tensor | None = None
    shift_energy: float = 0.0
    outputs: SideMoment | None = None
    inputs: SideMoment | None = None
    entries: float | None = None
    sums_N: Tensor | None = None
    singular_NR: Tensor | None = None
    starts_NN: Tensor | None = None

    def __repr__(self) -> str:
        return f"LayerMoments({counted(self.num_models, 'model')}, {counted(self.num_values, 'value')})"

    @property
    def num_models(self) -> int:
        """N."""
        return self.gram_NN.shape[0]

    @cached_property
    def centered_NN(self) -> Tensor:
        """The Gram of X_n − M, the second moment of the models axis."""
        if self.shift_N is None:
            return center_gram(self.gram_NN)
        return shift_gram(self.gram_NN, self.shift_N, self.shift_energy)

    @property
    def raw_NN(self) -> Tensor:
        """The Gram of X_n, without centring."""
        return shift_gram(self.gram_NN, self.cross_N, self.reference_energy)

    @cached_property
    def energies_N(self) -> Tensor:
        """‖X_n‖² of each model."""
        return (self.gram_NN.diagonal() + 2 * self.cross_N + self.reference_energy).clamp_min(0)

    @cached_property
    def variance(self) -> float:
        """Energy of X − M, summed over models; zero if it is only round-off of the whole energy."""
        centered = float(self.centered_NN.trace())
        return centered if centered > NO_VARIANCE * float(self.energies_N.sum()) else 0.0

    @property
    def mean_share(self) -> float:
        """Share of the stack's energy in the mean over all models."""
        total = float(self.energies_N.sum())
        mean = float(self.gram_NN.mean() + 2 * self.cross_N.mean()) + self.reference_energy
        return self.num_models * mean / total if total > 0 else 0.0


def round_off(stack: Stack) -> float:
    """Return the share of the largest eigenvalue that is the round-off of a stack's products."""
    if stack.dtype == torch.float64:
        return NUMERICAL_RANK
    return BFLOAT16_ROUND_OFF if stack.precision == FAST else FLOAT32_ROUND_OFF


def from_raw_gram(raw_NN: Tensor, num_values: int, floor: float = NUMERICAL_RANK) -> LayerMoments:
    """Return moments about the models' mean from the uncentred Gram."""
    gram_NN, cross_N, energy = split_gram(raw_NN)
    return LayerMoments(gram_NN, cross_N, energy, num_values, raw_NN.shape[0], floor)


def recentered(moments: LayerMoments) -> LayerMoments:
    """Return the moments with the mean of all models as reference. Only their sums are needed, and no large terms cancel."""
    means_N, along, mean = moments.gram_NN.mean(1), float(moments.cross_N.mean()), float(moments.gram_NN.mean())
    cross_N = moments.cross_N + means_N - (along + mean)
    energy = moments.reference_energy + 2 * along + mean
    return replace(
        moments,
        gram_NN=center_gram(moments.gram_NN),
        cross_N=cross_N,
        reference_energy=energy,
        num_reference=moments.num_models,
        removed=None,
        shift_N=None,
        shift_energy=0.0,
        outputs=None,
        inputs=None,
    )


def center_of(mean_OI: Tensor, center: str) -> Tensor:
    """Return M, broadcastable over (O, I), for a center: the mean, its column means, zero, or the mean of its entries."""
    if center == "models":
        return mean_OI
    if center == "columns":
        return mean_OI.mean(0, keepdim=True)
    if center == "global":
        return mean_OI.mean().view(1, 1)
    return mean_OI.new_zeros(1, 1)


def shifted_to_zero(moments: LayerMoments) -> LayerMoments:
    """Return the moments with zero as the center."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return replace(moments, shift_N=moments.cross_N, shift_energy=moments.reference_energy, removed=zero)


def entry_dimensions(gram_NN: Tensor, squares: float) -> float:
    """Return (Σ v)² / Σ v² over the entries' variances v, corrected for the sampling error of Σ v².

    The variances are over the models of `block_sums.sample`, about the mean of all: E v² = v²·(1 + 2/n) from n of N values, and 1 +
    2/(N − 1) from all.
    """
    chosen = gram_NN.diagonal()[sample(gram_NN.shape[0])]
    num_free = min(chosen.numel(), gram_NN.shape[0] - 1)
    chance = (num_free + 2) / num_free if num_free > 0 else 1.0
    total = float(chosen.sum())
    # Division first, because the square of a finite value may overflow.
    return total / squares * total * chance if squares > 0 else 0.0
