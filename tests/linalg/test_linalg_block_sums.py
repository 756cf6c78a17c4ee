"""Sums over runs of values: against dense float64 references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eigenzoo.linalg.block_sums import add_block, center_rows, empty_sums, exact_mean, num_extended, sample
from eigenzoo.linalg.kernels import PRODUCT_COLUMNS
from tolerance import tolerance

NUM_MODELS, INPUTS = 21, 8


def extended(dtype: torch.dtype, num_values: int, mean: float) -> Tensor:
    """Rows with a mean, and whatever lay in the memory of the others."""
    draw = torch.Generator().manual_seed(3)
    values = torch.randn(num_extended(NUM_MODELS), num_values, generator=draw, dtype=torch.float64) + mean
    return values.to(dtype)


@pytest.mark.parametrize("mean", [0.0, 0.3, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_centred_rows_and_the_mean_make_the_models_again(dtype: torch.dtype, mean: float) -> None:
    rows_ED = extended(dtype, 5000, mean)
    before_ND = rows_ED[:NUM_MODELS].to(torch.float64, copy=True)
    center_rows(rows_ED, NUM_MODELS, INPUTS)
    again_ND = rows_ED[:NUM_MODELS].double() + rows_ED[NUM_MODELS].double()
    assert float((again_ND - before_ND).abs().max()) <= torch.finfo(dtype).eps * 8
    # Right to what the rows lost when it was subtracted, however large it is.
    error = float((exact_mean(rows_ED, NUM_MODELS) - before_ND.mean(0)).abs().max())
    assert error <= torch.finfo(dtype).eps * 2 + tolerance(1, scale=mean)


def test_a_large_mean_is_stored_as_the_nearest_number() -> None:
    rows_ED = extended(torch.float32, 5000, 30.0)
    expected_D = rows_ED[:NUM_MODELS].double().mean(0)
    center_rows(rows_ED, NUM_MODELS, INPUTS)
    unit = 2.0**-19  # of numbers from 16 to 32
    assert float((rows_ED[NUM_MODELS].double() - expected_D).abs().max()) > 2 * unit
    assert float((exact_mean(rows_ED, NUM_MODELS, torch.float32).double() - expected_D).abs().max()) <= 0.55 * unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_those_of_the_whole(dtype: torch.dtype) -> None:
    rows_ED = extended(dtype, 2 * PRODUCT_COLUMNS + 40 * INPUTS, 2.0)
    values_ND = rows_ED[:NUM_MODELS].to(torch.float64, copy=True)
    sums = empty_sums(NUM_MODELS, INPUTS, columns=True, sides=True)
    add_block(sums, rows_ED, INPUTS)
    centered_ND = values_ND - values_ND.mean(0)
    variances_D = centered_ND[sample(NUM_MODELS)].square().sum(0)
    assert sums.columns_NI is not None
    assert sums.inputs_II is not None
    for found, expected in (
        (sums.gram_NN, centered_ND @ centered_ND.T),
        (sums.cross_N, centered_ND @ values_ND.mean(0)),
        (sums.energy, values_ND.mean(0).square().sum()),
        (sums.sums_N, values_ND.sum(1)),
        (sums.squares, variances_D.square().sum()),
        (sums.columns_NI, centered_ND.view(NUM_MODELS, -1, INPUTS).sum(1)),
        (sums.inputs_II, centered_ND.view(-1, INPUTS).T @ centered_ND.view(-1, INPUTS)),
    ):
        error = float((torch.as_tensor(found, dtype=torch.float64) - expected).abs().max())
        # Sums that cancel have the round-off of what is summed.
        scale = max(float(values_ND.square().sum(1).max()), float(expected.abs().max()))
        assert error <= tolerance(10, dtype=dtype, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cut_between_products_changes_no_bit(dtype: torch.dtype) -> None:
    """The same products in the same order, of the same rows in memory: how far apart rows lie may choose another kernel."""
    num_values = 2 * PRODUCT_COLUMNS + 40 * INPUTS
    whole, cut = empty_sums(NUM_MODELS, INPUTS), empty_sums(NUM_MODELS, INPUTS)
    add_block(whole, extended(dtype, num_values, 2.0), INPUTS)
    for start, stop in ((0, PRODUCT_COLUMNS), (PRODUCT_COLUMNS, num_values)):
        add_block(cut, extended(dtype, num_values, 2.0)[:, start:stop], INPUTS)
    assert torch.equal(whole.gram_EE, cut.gram_EE)
    assert whole.squares == cut.squares
