"""Principal angles against scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from builders import seeded
from eigenzoo.linalg.angles import principal_cosines, subspace_gap
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
