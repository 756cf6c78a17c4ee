"""The moment of one side, held as a factor, against the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builders import seeded
from eigenzoo.linalg.angles import subspace_gap
from eigenzoo.linalg.side import SideMoment
from tolerance import angle_tolerance, tolerance


@pytest.mark.parametrize("span", [0, 3, 6])
@pytest.mark.parametrize(("size", "columns"), [(20, 6), (9, 8), (5, 1)])
def test_a_factor_has_the_eigenpairs_of_its_moment(size, columns, span):
    draw = seeded(span)
    stretch = torch.logspace(0, -span, columns, dtype=torch.float64)
    factor_SP = torch.linalg.qr(torch.randn(size, columns, generator=draw, dtype=torch.float64))[0] * stretch
    rotation = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=torch.float64))[0]
    side, dense = SideMoment(factor_SP=factor_SP @ rotation), SideMoment(factor_SP @ factor_SP.T)
    assert side.size == dense.size == size
    assert side.trace == pytest.approx(dense.trace, rel=tolerance(size))
    assert float((side.matrix_SS - dense.matrix_SS).abs().max()) <= tolerance(size)
    found = side.eigenvectors()
    values_K, vectors_SK = found.values_K, found.basis(columns)
    assert values_K.shape == (columns,)
    assert np.abs(values_K.numpy() - stretch.square().numpy()).max() <= tolerance(size)
    assert float((vectors_SK.T @ vectors_SK - torch.eye(columns)).abs().max()) <= tolerance(size)
    for rank in range(1, columns + 1) if span else [columns]:
        # The gap to the next eigenvalue, or to zero: round-off turns directions by its share of it.
        gap = float(stretch[rank - 1] ** 2 - (stretch[rank] ** 2 if rank < columns else 0.0))
        expected = torch.linalg.qr(factor_SP[:, :rank])[0]
        for moment in (side, dense):
            assert subspace_gap(moment.eigenvectors().basis(rank).T, expected.T) <= angle_tolerance(size, gap)


@pytest.mark.parametrize(
    "side", [SideMoment(torch.zeros(4, 4).double()), SideMoment(factor_SP=torch.zeros(4, 2).double())]
)
def test_a_side_without_energy_has_no_directions(side):
    found = side.eigenvectors()
    assert side.trace == 0
    assert found.values_K.shape == (0,)
    assert found.basis(0).shape == (4, 0)


def test_columns_that_depend_on_each_other_are_left_out():
    column = torch.randn(8, 1, generator=seeded(1), dtype=torch.float64)
    found = SideMoment(factor_SP=torch.cat([column, 2 * column, -column], 1)).eigenvectors()
    assert found.values_K.tolist() == pytest.approx([6 * float(column.square().sum())], rel=tolerance(8))
    assert subspace_gap(found.basis(1).T, column.T / column.norm()) <= tolerance(8)
