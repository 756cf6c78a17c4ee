"""Exponents against the package `powerlaw`, and thresholds that can be moved."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from evidence_zoos import noise

from eigenzoo.evidence.suitability import (
    MIN_TAIL,
    NUM_HALVES,
    Suitability,
    Thresholds,
    power_law,
    suitability,
)
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.subspace.moments.layer_moments import from_raw_gram
from tolerance import tolerance

powerlaw = pytest.importorskip("powerlaw", reason="the package that exponents are compared with")


def fit(values: np.ndarray) -> tuple[float, float]:
    """α and x_min by the package, which prints and warns as it goes."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        # Its own bounds, 1 to 3, would fall back to another method beyond them.
        found = powerlaw.Fit(values, verbose=False, parameter_ranges={"alpha": [1.0, 1000.0]})
        return float(found.power_law.alpha), float(found.power_law.xmin)


def wishart(draw: np.random.Generator, size: int, others: int) -> np.ndarray:
    return np.linalg.svd(draw.standard_normal((size, others)), compute_uv=False) ** 2


SPECTRA: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "a power law": lambda draw: 0.1 * (draw.pareto(2.3, 120) + 1),
    "a steep one": lambda draw: 5 * (draw.pareto(6.0, 60) + 1),
    "of noise": lambda draw: wishart(draw, 40, 90),
    "of heavy tails": lambda draw: np.linalg.svd(draw.standard_t(2.5, (50, 80)), compute_uv=False) ** 2,
    "log-normal": lambda draw: np.exp(2 * draw.standard_normal(80)),
    "few values": lambda draw: draw.pareto(1.5, 6) + 1,
    "very small values": lambda draw: 1e-12 * (draw.pareto(2.0, 50) + 1),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_exponents_are_those_of_the_package(name: str) -> None:
    compared = 0
    for seed in range(6):
        values = np.sort(SPECTRA[name](np.random.default_rng(seed)))[::-1].copy()
        exponent, xmin, num_tail = power_law(torch.from_numpy(values))
        expected, start = fit(values)
        if (values >= start * (1 - 1e-12)).sum() < MIN_TAIL:
            assert num_tail >= MIN_TAIL  # the package also fits two or three values
            continue
        compared += 1
        # Sums of logarithms, over their distance from the smallest: it is a hundredth in steep spectra.
        assert exponent == pytest.approx(expected, rel=tolerance(len(values), scale=100))
        assert xmin == pytest.approx(start, rel=tolerance(1))
        assert num_tail == (values >= start * (1 - 1e-12)).sum()
    assert compared >= 4


def test_the_exponent_of_a_long_power_law_is_its_own() -> None:
    """Quantiles of density ∝ λ^(−α), evenly spaced: the estimate tends to α."""
    levels = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for exponent in (1.5, 2.5, 4.0):
        found, _, _ = power_law(levels ** (-1 / (exponent - 1)))
        # The last quantile cuts the tail off, and with it a part of the mean logarithm.
        assert found == pytest.approx(exponent, rel=0.01)


@pytest.mark.parametrize("values", [[], [1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0, 0.0], [2.0] * 9])
def test_spectra_without_a_tail_have_no_exponent(values: list[float]) -> None:
    assert power_law(torch.tensor(values, dtype=torch.float64)) == (None, None, 0)


def test_exponents_of_halves_are_those_of_their_weights() -> None:
    rows_ND = noise(24, (300,), 3, spread=1.0)
    moments = from_raw_gram(rows_ND @ rows_ND.T, 300)
    found = suitability(moments, eigenpairs(moments.centered_NN)[0], seed=5)
    values = np.linalg.svd((rows_ND - rows_ND.mean(0)).numpy(), compute_uv=False)[:-1] ** 2
    assert (found.exponent, found.xmin) == pytest.approx(fit(values), rel=1e-9)
    draw, expected = torch.Generator().manual_seed(5), []
    for _ in range(NUM_HALVES // 2):
        for half in torch.randperm(24, generator=draw).tensor_split(2):
            part = rows_ND[half].numpy()
            expected.append(fit(np.linalg.svd(part - part.mean(0), compute_uv=False)[:-1] ** 2)[0])
    assert found.exponents == pytest.approx(expected, rel=1e-9)
    assert found.mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert found.spread == pytest.approx(np.std(expected), rel=1e-9)


LAYER = Suitability(3.0, 1.0, 20, (2.5, 3.5, 3.0, 7.0))
"""Mean 4, standard deviation √(13/4 − …) = 1.77, three of four in [2, 6], q = 0.75 / 2.77 = 0.27."""


@pytest.mark.parametrize(
    ("thresholds", "suited"),
    [
        ({}, False),  # the spread
        ({"spread": 2.0}, True),
        ({"spread": 2.0, "low": 4.1}, False),
        ({"spread": 2.0, "high": 3.9}, False),
        ({"spread": 2.0, "share": 0.8}, False),
        ({"spread": 2.0, "share": 0.75}, True),
        ({"spread": 2.0, "q": 0.28}, False),
        ({"spread": 2.0, "q": 0.27}, True),
        ({"spread": 2.0, "high": 7.0, "share": 1.0, "q": 0.36}, True),
        ({"spread": 1.76}, False),
        ({"spread": 1.78}, True),
    ],
)
def test_every_threshold_can_be_moved(thresholds: dict[str, float], suited: bool) -> None:
    assert LAYER.is_suited(Thresholds(**thresholds)) is suited


def test_a_layer_without_exponents_is_never_suited() -> None:
    nothing = Suitability(None, None, 0, ())
    assert (nothing.mean, nothing.spread) == (None, None)
    assert nothing.share(Thresholds()) == nothing.q(Thresholds()) == 0
    assert not nothing.is_suited(Thresholds(low=-1e9, high=1e9, spread=1e9, share=0, q=0))
