"""Held-out capture from the Gram alone against the same on the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import random_stack, seeded
from eigenzoo.linalg.heldout import cross_validated_capture, hold_out
from tolerance import tolerance

CASES = {
    "random": random_stack(12, (40,), seed=1),
    "low rank": random_stack(12, (40,), seed=2, rank=3),
    "fewer values than models": random_stack(12, (4,), seed=3),
    "uneven norms": random_stack(12, (40,), seed=4) * torch.logspace(-1, 1, 12, dtype=torch.float64)[:, None],
}


def brute_force(rows_ND: Tensor, fitted: Tensor, held: Tensor) -> tuple[np.ndarray, float]:
    """Cumulative energy of held-out rows in the right singular vectors of the fitted ones, and their total energy."""
    mean_D = rows_ND[fitted].mean(0)
    _, values, vectors_KD = np.linalg.svd((rows_ND[fitted] - mean_D).numpy(), full_matrices=False)
    # The rank that numpy's own matrix_rank would take: directions below are round-off and capture nothing real.
    vectors_KD = vectors_KD[values > values[0] * max(rows_ND.shape) * np.finfo(np.float64).eps]
    held_HD = (rows_ND[held] - mean_D).numpy()
    return np.cumsum(((held_HD @ vectors_KD.T) ** 2).sum(0)), float((held_HD**2).sum())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_captured_energy_is_that_of_the_weights(name, offset):
    rows_ND = CASES[name] + offset
    order = torch.randperm(12, generator=seeded(5))
    fitted, held = order[:8], order[8:]
    found = hold_out(rows_ND @ rows_ND.T, fitted, held)
    cumulative, total = found.captured_K, found.energy
    expected, expected_total = brute_force(rows_ND, fitted, held)
    bound = tolerance(rows_ND.shape[1], scale=float(rows_ND.square().sum()))
    assert abs(total - expected_total) <= bound
    assert cumulative.shape == expected.shape
    # The last direction's energy is divided by its eigenvalue: round-off counts by how far the spectrum reaches down.
    values = np.linalg.svd((rows_ND[fitted] - rows_ND[fitted].mean(0)).numpy(), compute_uv=False)[: len(expected)]
    assert np.abs(cumulative.numpy() - expected).max() <= bound * (values[0] / values[-1]) ** 2


@pytest.mark.parametrize("name", CASES)
def test_cross_validation_is_the_mean_over_folds_of_the_weights(name):
    rows_ND = CASES[name]
    ranks = [0, 1, 2, 3, 20]
    found = cross_validated_capture(rows_ND @ rows_ND.T, ranks, folds=4, seed=7)
    order = torch.randperm(12, generator=seeded(7))
    captured, total = np.zeros(len(ranks)), 0.0
    for held in order.view(4, 3):
        fitted = order[~torch.isin(order, held)]
        cumulative, energy = brute_force(rows_ND, fitted, held)
        total += energy
        captured += [cumulative[min(rank, len(cumulative)) - 1] if rank else 0.0 for rank in ranks]
    # Three orders above round-off, for the eigenvalues that energies are divided by.
    assert found == pytest.approx(list(captured / total), abs=1e3 * tolerance(40))
    assert found[0] == 0.0
    assert found == sorted(found)


def test_what_lies_in_a_shared_subspace_is_captured_whole_and_noise_is_not():
    shared = random_stack(20, (500,), seed=8, rank=3)
    assert cross_validated_capture(shared @ shared.T, [3])[0] == pytest.approx(1.0, abs=1e3 * tolerance(500))
    noise = torch.randn(20, 500, generator=seeded(9), dtype=torch.float64)
    # Three of 500 dimensions hold 3/500 of unrelated directions; 5 % is eight times that.
    assert cross_validated_capture(noise @ noise.T, [3])[0] < 0.05


@pytest.mark.parametrize("num_models", [1, 2])
def test_too_few_models_have_no_held_out_figure(num_models):
    rows_ND = random_stack(num_models, (9,))
    assert cross_validated_capture(rows_ND @ rows_ND.T, [1]) is None


def test_equal_models_have_no_held_out_figure():
    assert cross_validated_capture(torch.zeros(5, 5, dtype=torch.float64), [1, 2]) is None
