"""Leaving out one by one from one eigendecomposition, against fitting as many times as there are models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import random_stack, seeded
from eigenzoo.linalg.gram import center_gram
from eigenzoo.linalg.heldout import leave_one_out, make_grouped_folds
from eigenzoo.linalg.spectrum import eigenpairs
from tolerance import tolerance

NUM_MODELS, NUM_VALUES = 12, 40


def noise(num_models: int, num_values: int = NUM_VALUES, seed: int = 0) -> Tensor:
    return torch.randn(num_models, num_values, generator=seeded(seed), dtype=torch.float64)


def with_merged(dtype: torch.dtype) -> Tensor:
    """Models and their own mean, as a merged model is stored: all but equal to the mean of the others."""
    rows_ND = noise(NUM_MODELS).to(dtype).double()
    return torch.cat([rows_ND, rows_ND.mean(0, keepdim=True).to(dtype).double()])


CASES = {
    "noise": noise(NUM_MODELS),
    "fewer values than models": noise(NUM_MODELS, 5),
    "low rank": random_stack(NUM_MODELS, (NUM_VALUES,), seed=1, rank=4),
    "uneven norms": noise(NUM_MODELS) * torch.logspace(-1, 1, NUM_MODELS, dtype=torch.float64)[:, None],
    "steep": noise(NUM_MODELS) @ torch.diag(torch.logspace(0, -2, NUM_VALUES, dtype=torch.float64)),
    "pairs of copies": noise(NUM_MODELS // 2).repeat(2, 1),
    "all but three equal": torch.cat([noise(1, seed=2).expand(NUM_MODELS - 3, -1), noise(3)]),
    "the mean among them": with_merged(torch.float64),
    "a merged model in float32": with_merged(torch.float32),
    "a merged model in bfloat16": with_merged(torch.bfloat16),
    "opposite pairs around zero": torch.cat([noise(4), -noise(4), torch.zeros(1, NUM_VALUES)]).double(),
    "two blocks of one spectrum": torch.block_diag(noise(6, 20), noise(6, 20)),
    "orthogonal, of growing norms": torch.diag(torch.arange(1.0, NUM_MODELS + 1)).double(),
}


def refitted(rows_ND: Tensor, rank: int) -> tuple[np.ndarray, float]:
    """Cumulative energy of each model in the top directions of all others, about their mean: one SVD per model."""
    captured, energy = np.zeros(rank), 0.0
    for left in range(len(rows_ND)):
        others = np.delete(rows_ND.numpy(), left, 0)
        _, values, vectors_KD = np.linalg.svd(others - others.mean(0), full_matrices=False)
        away_D = rows_ND[left].numpy() - others.mean(0)
        along_K = (vectors_KD @ away_D) ** 2 * (values > 1e-6 * values[0])
        captured += np.cumsum(along_K)[:rank]
        energy += float((away_D**2).sum())
    return captured, energy


def spread(rows_ND: Tensor) -> float:
    """The largest eigenvalue over the smallest that is not round-off."""
    values = np.linalg.svd((rows_ND - rows_ND.mean(0)).numpy(), compute_uv=False) ** 2
    return float(values[0] / values[values > 1e-10 * values[0]].min())


def left_out(rows_ND: Tensor, rank: int = 16) -> tuple[Tensor, float]:
    return leave_one_out(*eigenpairs(center_gram(rows_ND @ rows_ND.T)), rank)


@pytest.mark.parametrize("name", CASES)
def test_leaving_out_one_by_one_is_fitting_without_it(name):
    rows_ND = CASES[name]
    found_K, energy = left_out(rows_ND)
    expected_K, total = refitted(rows_ND, len(found_K))
    assert len(found_K) >= 2
    # Energies are divided by eigenvalues and by their distances; a thousand is 1 / the least relative distance of the cases.
    assert np.abs(found_K.numpy() - expected_K).max() <= tolerance(NUM_VALUES, scale=1e3 * spread(rows_ND) * total)
    assert energy == pytest.approx(total, rel=tolerance(NUM_VALUES))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("num_models", [3, 8, 20])
def test_orthogonal_models_of_one_norm_hold_nothing_of_each_other(num_models, scale):
    """All their eigenvalues are equal, so that no root has a bracket; what one is, no other has."""
    found_K, energy = left_out(scale * torch.eye(num_models, dtype=torch.float64))
    assert len(found_K) == min(16, num_models - 2)
    assert float(found_K.abs().max()) <= tolerance(num_models, scale=energy)
    # ‖e_h − mean of the others‖² = 1 + 1 / (N − 1).
    assert energy == pytest.approx(scale**2 * num_models * num_models / (num_models - 1), rel=tolerance(num_models))


def test_eigenvalues_that_are_equal_to_the_last_bit_are_told_apart():
    """Two blocks of the same rows have every eigenvalue twice; with a model gone from one, the other keeps its own."""
    part_ND = noise(6, 20, seed=4)
    values_K, vectors_NK = eigenpairs(center_gram(part_ND @ part_ND.T))
    centered_ND = part_ND - part_ND.mean(0)
    twice_K = values_K.repeat_interleave(2)
    vectors = torch.zeros(12, 2 * len(values_K), dtype=torch.float64)
    vectors[:6, 0::2], vectors[6:, 1::2] = vectors_NK, vectors_NK
    found_K, energy = leave_one_out(twice_K, vectors, 16)
    expected_K, total = refitted(torch.block_diag(centered_ND, centered_ND), len(found_K))
    assert energy == pytest.approx(total, rel=tolerance(40))
    assert np.abs(found_K.numpy() - expected_K).max() <= tolerance(40, scale=1e3 * total)


def test_leaving_out_follows_the_scale_of_the_weights():
    rows_ND = CASES["uneven norms"]
    shares = [
        found_K / energy for found_K, energy in (left_out(scale * rows_ND) for scale in (1.0, 2.0**-100, 2.0**100))
    ]
    # LAPACK scales a matrix by its norm before it begins, and rounds there.
    bound = tolerance(NUM_VALUES, scale=1e3 * spread(rows_ND))
    assert float((shares[0] - shares[1]).abs().max()) <= bound
    assert float((shares[0] - shares[2]).abs().max()) <= bound


def test_too_few_models_and_directions_leave_nothing():
    for rows_ND in (noise(2), random_stack(9, (20,), rank=1), torch.ones(5, 6).double()):
        found_K, energy = left_out(rows_ND)
        assert len(found_K) == 0
        assert energy == pytest.approx(refitted(rows_ND, 0)[1], abs=tolerance(20, scale=float(rows_ND.square().sum())))


def test_whole_groups_are_dealt_largest_first():
    groups = [[3], [0, 7, 8, 9], [1, 2], [4, 5, 6], [10]]
    folds = [fold.tolist() for fold in make_grouped_folds(groups, 3)]
    assert folds == [[0, 7, 8, 9], [4, 5, 6, 10], [1, 2, 3]]
    assert [fold.tolist() for fold in make_grouped_folds(groups, 9)] == [[0, 7, 8, 9], [4, 5, 6], [1, 2], [3], [10]]
