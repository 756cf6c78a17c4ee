"""What directions found on some models capture of others, from the Gram alone.

Legend: N models, T fitted ones, H held-out ones, K directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eigenzoo.linalg.gram import center_gram
from eigenzoo.linalg.spectrum import eigenpairs

FLOOR = 1e-7
"""Eigenvalues below this share of the largest are left out: they may be a float32 product's round-off, and are divided by."""


def captured_energy(gram_NN: Tensor, fitted: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of held-out models that the fitted models' leading directions capture.

    Held-out models are centred by the fitted models' mean: ‖Pₖ(x_h − mean)‖² = Σ_{j≤k} (u_jᵀ k_h)² / λ_j with u, λ of the
    fitted models' centred Gram. Exact; no weight is read. Cost T³.

    Returns:
        (cumulative energy captured by 1, 2, … directions, summed over the held-out models; their total energy).
    """
    block_TT = gram_NN[fitted][:, fitted]
    cross_TH = gram_NN[fitted][:, held]
    mean_cross_H = cross_TH.mean(0)
    mean_energy = block_TT.mean()
    energies_H = gram_NN.diagonal()[held] - 2 * mean_cross_H + mean_energy
    cross_TH = cross_TH - block_TT.mean(1, keepdim=True) - mean_cross_H + mean_energy
    values_K, vectors_TK = eigenpairs(center_gram(block_TT), FLOOR)
    energy_KH = (vectors_TK.T @ cross_TH).square() / values_K[:, None]
    return energy_KH.sum(1).cumsum(0), energies_H.clamp_min(0).sum()


def cross_validated_capture(gram_NN: Tensor, ranks: list[int], *, folds: int = 5, seed: int = 0) -> list[float] | None:
    """Share of held-out models' centred energy that the top k directions of the others capture, for each k of `ranks`.

    Models are dealt to `folds` folds by a seeded permutation. A k beyond what the fitted models span counts as all that
    they span. None for fewer than three models, which leave nothing to fit on, and where nothing varies.
    """
    num_models = gram_NN.shape[0]
    if num_models < 3:
        return None
    order = torch.randperm(num_models, generator=torch.Generator().manual_seed(seed))
    captured = torch.zeros(len(ranks), dtype=torch.float64)
    total = 0.0
    for held in order.tensor_split(min(folds, num_models)):
        fitted = order[~torch.isin(order, held)]
        cumulative_K, energy = captured_energy(gram_NN, fitted, held)
        total += float(energy)
        for place, rank in enumerate(ranks):
            if rank > 0 and cumulative_K.numel():
                captured[place] += float(cumulative_K[min(rank, cumulative_K.numel()) - 1])
    return (captured / total).tolist() if total > 0 else None
