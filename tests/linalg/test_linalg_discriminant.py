"""Linear discriminant analysis beside scikit-learn's, and the laws of its distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from builders import seeded
from eigenzoo.linalg.discriminant import discriminant
from tolerance import tolerance

SHAPES = {"wide": (4, 5, 40), "tall": (3, 60, 7), "square": (3, 8, 24)}


def drawn(shape: tuple[int, int, int], seed: int = 0) -> list[Tensor]:
    groups, count, width = shape
    draw = seeded(seed)
    mixing = torch.randn(width, width, generator=draw, dtype=torch.float64)
    rows = torch.randn(groups, count, width, generator=draw, dtype=torch.float64) @ mixing
    return list(rows + 3 * torch.randn(groups, 1, width, generator=draw, dtype=torch.float64))


def dense(groups: list[Tensor], shrinkage: float, rows: Tensor) -> Tensor:
    """The definition, with Σ formed and solved."""
    within = torch.cat([group - group.mean(0) for group in groups])
    covariance = within.T @ within / len(within)
    width = len(covariance)
    sigma = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / width * torch.eye(width).double()
    columns = []
    for group in groups:
        far = rows - group.mean(0)
        columns.append((far * torch.linalg.solve(sigma, far.T).T).sum(1))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("shrinkage", [0.03, 0.5, 1.0])
def test_distances_are_those_of_the_definition(shape: tuple[int, int, int], shrinkage: float) -> None:
    groups = drawn(shape)
    rows = torch.cat(drawn(shape, seed=1))
    found, wanted = discriminant(groups, shrinkage).distances(rows), dense(groups, shrinkage, rows)
    assert float(((found - wanted) / wanted).abs().max()) < tolerance(shape[2] ** 2 / shrinkage)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_shrinkage_is_that_of_ledoit_and_wolf(shape: tuple[int, int, int]) -> None:
    groups = drawn(shape)
    within = torch.cat([group - group.mean(0) for group in groups])
    wanted = ledoit_wolf_shrinkage(within.numpy(), assume_centered=True)
    assert discriminant(groups).shrinkage == pytest.approx(wanted, rel=tolerance(within.numel()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_posteriors_are_those_of_scikit_learn(shape: tuple[int, int, int]) -> None:
    groups = drawn(shape)
    found = discriminant(groups)
    rows = torch.cat(drawn(shape, seed=1))
    labels = np.arange(shape[0]).repeat(shape[1])
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=found.shrinkage).fit(torch.cat(groups).numpy(), labels)
    posteriors = torch.softmax(-found.distances(rows) / 2, 1).numpy()
    assert np.abs(posteriors - peer.predict_proba(rows.numpy())).max() < 1e-6  # its lstsq solves to 1e-8 or so
    assert (posteriors.argmax(1) == peer.predict(rows.numpy())).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_distances_do_not_depend_on_units_origin_or_rotation(shape: tuple[int, int, int]) -> None:
    groups, rows = drawn(shape), torch.cat(drawn(shape, seed=1))
    draw = seeded(2)
    turn = torch.linalg.qr(torch.randn(shape[2], shape[2], generator=draw, dtype=torch.float64)).Q
    shift = torch.randn(shape[2], generator=draw, dtype=torch.float64)

    def moved(values: Tensor) -> Tensor:
        return 1e3 * values @ turn + shift

    wanted = discriminant(groups).distances(rows)
    found = discriminant([moved(group) for group in groups]).distances(moved(rows))
    assert float(((found - wanted) / wanted).abs().max()) < tolerance(shape[2] ** 2 / discriminant(groups).shrinkage)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, rows = drawn(SHAPES["tall"]), torch.cat(drawn(SHAPES["tall"], seed=1))
    wanted = discriminant(groups).distances(rows)
    monkeypatch.setattr("eigenzoo.linalg.discriminant.BLOCK", 70)
    found = discriminant(groups).distances(rows)
    assert float(((found - wanted) / wanted).abs().max()) < tolerance(SHAPES["tall"][2] ** 2)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e20])
def test_examples_without_spread_are_refused(value: float) -> None:
    equal = torch.full((3, 4), value, dtype=torch.float64)
    with pytest.raises(ValueError, match="no group has two examples that differ"):
        discriminant([equal, equal + 1])


def test_a_direction_without_spread_in_the_examples_is_not_free() -> None:
    """Rows that leave the plane of the examples are farther from every mean."""
    draw = seeded(0)
    flat = [torch.cat([torch.randn(50, 2, generator=draw).double(), torch.zeros(50, 1).double()], 1) for _ in range(2)]
    found = discriminant(flat, 0.0)
    inside, outside = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert float(found.distances(outside).min()) > 1e3 * float(found.distances(inside).max())
    assert bool(torch.isfinite(found.distances(outside)).all())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_blend_is_the_nearest_point_of_the_simplex(shape: tuple[int, int, int]) -> None:
    """Karush, Kuhn and Tucker: moving weight to any group lowers the distance for none, and changes nothing for those in use."""
    found = discriminant(drawn(shape))
    mean = torch.cat(drawn(shape, seed=1)).mean(0, keepdim=True)
    weights = found.blend(mean)
    offsets = found.means_GD - found._whitened(mean)
    slopes = offsets @ (weights @ offsets)
    scale = float(offsets.square().sum())
    assert float(weights.sum()) == pytest.approx(1, abs=tolerance(shape[0]))
    assert float(weights.min()) >= 0
    assert float(slopes.min()) >= float(weights @ slopes) - tolerance(shape[2] ** 2, scale=scale)
    assert float(((slopes - weights @ slopes) * weights).abs().max()) < tolerance(shape[2] ** 2, scale=scale)


def test_a_blend_of_means_is_found_again() -> None:
    groups = drawn((4, 20, 9))
    wanted = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64)
    found = discriminant(groups)
    mixed = (wanted @ torch.stack([group.mean(0) for group in groups]))[None]
    # The answer is the quotient of two sums, so its error is that of the means over the least singular value, about 1.
    assert float((found.blend(mixed) - wanted).abs().max()) < 1e-10
    assert float((found.blend(groups[1]) - torch.tensor([0.0, 1, 0, 0])).abs().max()) < 1e-10
    assert torch.equal(discriminant([groups[0]]).blend(groups[1]), torch.ones(1).double())
