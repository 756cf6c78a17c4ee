"""The algebra of factors against dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import Factors, random_factors, regauge, seeded
from eigenzoo.errors import DataError
from eigenzoo.linalg.lora import (
    TRUNCATION,
    energy,
    inner_products,
    output_factor,
    singular_values,
    stack_factors,
    truncated,
)
from tolerance import tolerance

OUTPUTS, INPUTS = 9, 13
RANKS = (1, 4, 2, 8, 4)


def updates(ranks: tuple[int, ...] = RANKS, seed: int = 0) -> list[Factors]:
    return [
        random_factors({"m": (OUTPUTS, INPUTS)}, rank, seed + number, torch.float64)["m"]
        for number, rank in enumerate(ranks)
    ]


def dense(factors: list[Factors]) -> Tensor:
    return torch.stack([b_OR @ a_RI for b_OR, a_RI in factors]).flatten(1)


def bound(*stacks: Tensor) -> float:
    return tolerance(OUTPUTS * INPUTS, scale=float(max(stack.square().max() for stack in stacks)) * max(RANKS))


def test_inner_products_of_mixed_ranks_equal_the_dense_ones():
    left, right = updates(), updates((3, 1, 6), seed=10)
    found = inner_products(left, right)
    assert float((found - dense(left) @ dense(right).T).abs().max()) <= bound(dense(left), dense(right))
    assert [energy(factors) for factors in left] == pytest.approx(
        dense(left).square().sum(1).tolist(), abs=bound(dense(left))
    )


def test_inner_products_do_not_depend_on_the_gauge():
    left = updates()
    turned = [regauge({"m": factors}, seed)["m"] for seed, factors in enumerate(left)]
    # regauge scales rows by up to three either way, so that products of factors grow by up to 81.
    assert float((inner_products(turned, turned) - inner_products(left, left)).abs().max()) <= 81 * bound(dense(left))


def test_stacked_factors_know_their_owners():
    left = updates()
    b_OP, a_PI, owner_P = stack_factors(left)
    assert owner_P.bincount().tolist() == list(RANKS)
    for number, (b_OR, a_RI) in enumerate(left):
        assert torch.equal(b_OP[:, owner_P == number], b_OR)
        assert torch.equal(a_PI[owner_P == number], a_RI)


@pytest.mark.parametrize("case", ["full", "zero rows of A", "zero B"])
def test_output_and_input_factors_give_the_moments(case):
    b_OR, a_RI = updates((4,))[0]
    if case == "zero rows of A":
        a_RI[2:] = 0
    if case == "zero B":
        b_OR.zero_()
    update = b_OR @ a_RI
    left, right = output_factor((b_OR, a_RI)), output_factor((a_RI.T, b_OR.T))
    size = bound(update.flatten()[None] + 1)
    assert float((left @ left.T - update @ update.T).abs().max()) <= size
    assert float((right @ right.T - update.T @ update).abs().max()) <= size


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncated_gives_the_product_by_balanced_factors_of_least_rank(rank):
    b_OR, a_RI = updates((rank,))[0]
    # Each direction twice: stacked factors of a sum are wider than its rank.
    wide_b, wide_a = torch.cat([b_OR, 2 * b_OR], 1), torch.cat([a_RI, -a_RI], 0)
    (left, right), left_out = truncated(wide_b, wide_a)
    assert left.shape[1] == rank
    assert left_out <= tolerance(OUTPUTS * INPUTS)
    product = wide_b @ wide_a
    assert float((left @ right - product).abs().max()) <= tolerance(
        INPUTS, scale=float(b_OR.abs().max() * a_RI.abs().max()) * rank
    )
    assert float((left.T @ left - right @ right.T).abs().max()) <= bound(product)


@pytest.mark.parametrize("max_rank", [1, 2, 5])
def test_truncated_to_a_rank_is_the_best_of_that_rank(max_rank):
    b_OR, a_RI = updates((6,))[0]
    (left, right), left_out = truncated(b_OR, a_RI, max_rank)
    squares = np.linalg.svd((b_OR @ a_RI).numpy(), compute_uv=False) ** 2
    assert left.shape[1] == right.shape[0] == max_rank
    assert left_out == pytest.approx(squares[max_rank:].sum() / squares.sum(), abs=tolerance(OUTPUTS))
    lost = float((b_OR @ a_RI - left @ right).square().sum())
    assert lost == pytest.approx(squares[max_rank:].sum(), abs=bound(b_OR @ a_RI))


def test_truncated_leaves_out_no_more_than_it_may():
    values = torch.logspace(0, -8, 9, dtype=torch.float64)
    left_basis = torch.linalg.qr(torch.randn(OUTPUTS, 9, generator=seeded(1), dtype=torch.float64))[0]
    right_basis = torch.linalg.qr(torch.randn(INPUTS, 9, generator=seeded(2), dtype=torch.float64))[0]
    (left, right), left_out = truncated(left_basis * values, right_basis.T)
    squares = values.square()
    least = next(rank for rank in range(1, 10) if float(squares[rank:].sum()) <= TRUNCATION * float(squares.sum()))
    assert left.shape[1] == least
    assert left_out <= TRUNCATION
    assert float(((left_basis * values) @ right_basis.T - left @ right).square().sum()) <= TRUNCATION * float(
        squares.sum()
    )


def test_a_zero_product_is_one_zero_direction():
    (left, right), left_out = truncated(
        torch.zeros(OUTPUTS, 3, dtype=torch.float64), torch.zeros(3, INPUTS, dtype=torch.float64)
    )
    assert left.shape == (OUTPUTS, 1)
    assert right.shape == (1, INPUTS)
    assert float((left @ right).abs().max()) == left_out == 0


@pytest.mark.parametrize("rank", [1, 4, 9, 12])
def test_singular_values_are_those_of_the_product(rank):
    """Ranks up to and beyond a side, and a factor with unused rows."""
    b_OR, a_RI = updates((rank,))[0]
    unused = a_RI.clone()
    unused[rank // 2 :] = 0
    for factors in ((b_OR, a_RI), (b_OR, unused)):
        expected = np.linalg.svd((factors[0] @ factors[1]).numpy(), compute_uv=False)
        found = singular_values(factors).numpy()
        count = min(len(found), len(expected))
        assert np.abs(found[:count] - expected[:count]).max() <= tolerance(INPUTS * rank, scale=expected[0])
        assert np.abs(expected[count:]).max(initial=0) <= tolerance(INPUTS * rank, scale=expected[0])
        assert np.abs(found[count:]).max(initial=0) <= tolerance(INPUTS * rank, scale=expected[0])


@pytest.mark.parametrize("size", [1e100, 1e160, math.inf, math.nan])
def test_a_product_whose_energy_overflows_is_refused(size: float) -> None:
    factors = random_factors({"m": (7, 6)}, 3, 0)["m"]
    with pytest.raises(DataError, match="NaN or Inf, or their product overflows"):
        truncated(*(factor.double() * size for factor in factors))
