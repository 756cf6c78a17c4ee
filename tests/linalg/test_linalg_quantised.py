"""Blockwise codes: values, levels and round trips, against a plain loop and the definition of the levels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import seeded
from eigenzoo.linalg import quantised
from eigenzoo.linalg.quantised import BLOCK, CODINGS, NF4_LEVELS, dequantise, quantise


def loop(values: torch.Tensor, coding: str) -> torch.Tensor:
    """The nearest value that a block's scale and the levels give, one value after the other."""
    levels = list(NF4_LEVELS) if coding == "nf4" else [code / 127 for code in range(-127, 128)]
    found = []
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].float()
        scale = float(block.abs().max().bfloat16())
        found += [
            min((scale * level for level in levels), key=lambda near: abs(near - value)) for value in block.tolist()
        ]
    return torch.tensor(found)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("num_values", [0, 1, 63, 64, 65, 200])
def test_codes_stand_for_the_nearest_values(coding, num_values):
    values = torch.randn(num_values, generator=seeded(num_values)) * 1e-3
    codes, scales = quantise(values, coding)
    assert codes.nbytes == quantised.num_codes(num_values, coding)
    assert scales.numel() == quantised.num_blocks(num_values)
    torch.testing.assert_close(dequantise(codes, scales, coding, num_values), loop(values, coding), rtol=1e-6, atol=0)


def test_the_levels_are_quantiles_of_a_normal_distribution():
    """Of the mean of two probabilities just below 1, as QLoRA's appendix defines them: eight above zero and seven below."""
    last = 1 - (1 / (2 * 15) + 1 / (2 * 16)) / 2
    above = torch.special.ndtri(torch.linspace(last, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(last, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    torch.testing.assert_close(torch.tensor(NF4_LEVELS, dtype=torch.float64), levels / levels.max(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("coding", "most"), [("int8", 5e-5), ("nf4", 1.1e-2)])
def test_what_normal_values_lose_is_what_the_docstring_says(coding, most):
    values = torch.randn(64_000, generator=seeded(1))
    lost = (
        dequantise(*quantise(values, coding), coding, values.numel()) - values
    ).square().sum() / values.square().sum()
    assert most / 3 < float(lost) < most


@pytest.mark.parametrize("coding", CODINGS)
def test_zeros_stay_zeros_and_what_is_not_finite_shows_in_the_scale(coding):
    assert not dequantise(*quantise(torch.zeros(70), coding), coding, 70).any()
    for value in (float("nan"), float("inf"), 1e300):
        values = torch.ones(70, dtype=torch.float64)
        values[66] = value
        assert torch.isfinite(quantise(values, coding)[1]).tolist() == [True, False]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.sampled_from(CODINGS))
@settings(max_examples=60, deadline=None)
def test_orthonormal_directions_stay_independent(size, num_kept, seed, coding):
    """However few values they have: their Gram's eigenvalues stay far from zero, so that a reader can orthonormalise them."""
    num_kept = min(size, num_kept)
    basis = torch.linalg.qr(torch.randn(size, num_kept, dtype=torch.float64, generator=seeded(seed)))[0]
    stored = dequantise(*quantise(basis.reshape(-1), coding), coding, basis.numel()).double().view_as(basis)
    assert float(torch.linalg.eigvalsh(stored.T @ stored)[0]) > 0.3
