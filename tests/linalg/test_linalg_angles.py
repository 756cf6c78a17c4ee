"""Principal angles against scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from builders import random_stack, seeded
from eigenzoo.linalg.angles import half_cosines, principal_cosines, subspace_gap
from tolerance import tolerance


def basis(rank: int, size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, rank, generator=seeded(seed), dtype=torch.float64))[0].T


@pytest.mark.parametrize(("rank", "other", "size"), [(3, 3, 20), (2, 5, 12), (5, 2, 12), (4, 4, 5), (1, 1, 2)])
def test_principal_angles_are_those_of_scipy(rank, other, size):
    first, second = basis(rank, size, 0), basis(other, size, 1)
    angles = np.sort(subspace_angles(first.T.numpy(), second.T.numpy()))
    # scipy takes angles near π/2 from their sine, where the cosine's error is that of the sine over the cosine.
    steepness = 1 / max(np.cos(angles).min(), 1e-3)
    assert np.abs(principal_cosines(first, second).numpy() - np.cos(angles)).max() <= tolerance(size, scale=steepness)
    if rank <= other:
        assert abs(subspace_gap(first, second) - math.sin(angles[-1])) <= tolerance(size)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-4, 0.3, math.pi / 2])
def test_the_gap_is_the_sine_of_a_known_angle(angle):
    first = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=torch.float64)
    assert abs(subspace_gap(first, second) - math.sin(angle)) <= tolerance(1)


def test_a_subspace_inside_another_has_no_gap_and_cosines_of_one():
    whole = basis(6, 15, 2)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=seeded(3), dtype=torch.float64))[0]
    part = (rotation @ whole)[:4]
    assert subspace_gap(part, whole) <= tolerance(15)
    assert subspace_gap(whole, part) == pytest.approx(1, abs=tolerance(15))
    assert principal_cosines(part, whole).tolist() == pytest.approx([1.0] * 4, abs=tolerance(15))
    assert float(principal_cosines(part, whole).max()) <= 1


HALVES = {
    "noise": random_stack(13, (50,), seed=1),
    "a shared subspace": random_stack(13, (50,), seed=2, rank=3) + 0.1 * random_stack(13, (50,), seed=3),
    "exactly low rank": random_stack(13, (50,), seed=4, rank=3),
    "fewer values than models": random_stack(13, (4,), seed=5),
    "uneven norms": random_stack(13, (50,), seed=6) * torch.logspace(-1, 1, 13, dtype=torch.float64)[:, None],
}


@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize("name", HALVES)
def test_cosines_of_halves_are_those_of_their_explicit_bases(name, rank):
    rows_ND = HALVES[name] + 10
    order = torch.randperm(13, generator=seeded(rank))
    parts = [order[:6], order[6:]]
    bases, spread = [], 1.0
    for part in parts:
        centered_ND = rows_ND[part] - rows_ND[part].mean(0)
        _, values, vectors_KD = np.linalg.svd(centered_ND.numpy(), full_matrices=False)
        kept = min(rank, int((values > 1e-6 * values[0]).sum()))
        bases.append(vectors_KD[:kept])
        # Vectors turn by round-off over the gap between kept and lost eigenvalues, and are scaled by the smallest kept one.
        gap = values[kept - 1] ** 2 - (values[kept] ** 2 if kept < len(values) and kept == rank else 0.0)
        spread = max(spread, values[0] ** 2 / min(gap, values[kept - 1] ** 2))
    expected = np.sort(np.cos(subspace_angles(bases[0].T, bases[1].T)))[::-1]
    found = half_cosines(rows_ND @ rows_ND.T, *parts, rank)
    assert len(found) == len(expected)
    # The common offset of ten passes through the Gram.
    offset = float(rows_ND.square().sum() / (rows_ND - rows_ND.mean(0)).square().sum())
    assert np.abs(found.numpy() - expected).max() <= tolerance(50, scale=spread * offset)
    assert float(found.max()) <= 1
