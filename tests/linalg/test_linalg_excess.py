"""What a cloud of models has beyond isotropic noise, against the dense contrasts and against directions that are known."""

from __future__ import annotations

from math import inf, isinf

import pytest
import torch
from torch import Tensor

from builders import seeded
from eigenzoo.linalg.gram import (
    center_gram,
    contrast_gram,
    effective_directions,
    excess_moments,
    project_out,
    scale_models,
    unit,
)
from tolerance import tolerance


def cloud(num_models: int, num_values: int, num_directions: int, strength: float, seed: int) -> Tensor:
    """Unrelated models that vary along directions too, each of `strength` times the noise's variance."""
    draw = seeded(seed)
    rows_ND = torch.randn(num_models, num_values, generator=draw, dtype=torch.float64)
    if num_directions:
        raw = torch.randn(num_values, num_directions, generator=draw, dtype=torch.float64)
        weights_NK = torch.randn(num_models, num_directions, generator=draw, dtype=torch.float64)
        rows_ND += strength**0.5 * weights_NK @ torch.linalg.qr(raw)[0].T
    return rows_ND


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("num_models", [2, 5, 12])
def test_contrasts_are_what_is_left_without_the_mean(num_models: int, sign: int) -> None:
    rows_ND = cloud(num_models, 40, 0, 0, 1)
    level_N = sign * torch.linspace(0.5, 2, num_models, dtype=torch.float64)
    gram_NN = rows_ND @ rows_ND.T
    found = contrast_gram(gram_NN, level_N)
    # An orthonormal basis of what is orthogonal to the mean's direction, from a full QR: the same Gram but for a rotation.
    basis = torch.linalg.qr(level_N[:, None], mode="complete")[0][:, 1:]
    expected = torch.linalg.eigvalsh(basis.T @ gram_NN @ basis)
    bound = tolerance(num_models * 40, scale=float(gram_NN.diagonal().max()))
    assert found.shape == (num_models - 1, num_models - 1)
    assert float((torch.linalg.eigvalsh(found) - expected).abs().max()) <= bound
    whole = torch.linalg.eigvalsh(project_out(gram_NN, unit(level_N)))
    assert float((whole[1:] - expected).abs().max()) <= bound


def moments_of(rows_ND: Tensor) -> tuple[float, float]:
    return excess_moments(*scale_models(center_gram(rows_ND @ rows_ND.T)), rows_ND.shape[1])


@pytest.mark.parametrize(("num_directions", "multiple"), [(0, 0.0), (1, 3.0), (3, 2.0), (6, 1.5)])
def test_moments_are_those_of_the_covariance_on_average(num_directions: int, multiple: float) -> None:
    """Second and third moments in units of the detection threshold, whether or not the directions can be told one by one."""
    num_models, num_values, times = 60, 300, 200
    threshold = (num_values / (num_models - 1)) ** 0.5
    strength = multiple * threshold
    found = torch.tensor(
        [moments_of(cloud(num_models, num_values, num_directions, strength, seed)) for seed in range(times)],
        dtype=torch.float64,
    )
    # The covariance at trace D: noise and directions share it.
    values_D = torch.ones(num_values, dtype=torch.float64)
    values_D[:num_directions] += strength
    away_D = values_D * num_values / values_D.sum() - 1
    expected = torch.stack([away_D.square().sum() / threshold**2, away_D.pow(3).sum() / threshold**3])
    error = found.std(0) / times**0.5
    # Models are scaled to one norm one by one, which takes a little from those that go far along the directions.
    assert bool(((found.mean(0) - expected).abs() <= 4 * error + 0.05 * expected).all()), (
        found.mean(0),
        expected,
        error,
    )


def test_neither_the_mean_nor_the_scale_nor_uneven_norms_are_an_excess() -> None:
    rows_ND = cloud(20, 500, 0, 0, 2)
    norms_N = torch.logspace(-0.5, 0.5, 20, dtype=torch.float64)
    plain = moments_of(rows_ND)
    assert moments_of(1e-6 * (rows_ND + 7)) == pytest.approx(plain, rel=1e-9)
    # Chance alone gives second moments of about ±1 at this size; uneven norms would make it hundreds.
    assert max(map(abs, (*plain, *moments_of(rows_ND * norms_N[:, None])))) < 6


def test_too_few_models_have_no_excess() -> None:
    for num_models in (1, 2, 4):
        assert moments_of(cloud(num_models, 30, 0, 0, 3)) == (0.0, 0.0)
    assert excess_moments(torch.zeros(9, 9).double(), torch.ones(9).double(), 30) == (0.0, 0.0)


@pytest.mark.parametrize(("count", "strength"), [(1, 1.0), (4, 1.5), (40, 0.3)])
def test_as_many_directions_as_there_are_come_back(count: int, strength: float) -> None:
    assert effective_directions(count * strength**2, count * strength**3) == pytest.approx(count)


@pytest.mark.parametrize(("second", "third"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 2.0), (2.0, -1.0)])
def test_no_direction_leads_where_a_moment_is_not_positive(second: float, third: float) -> None:
    assert isinf(effective_directions(second, third))
    assert effective_directions(second, third) == inf
