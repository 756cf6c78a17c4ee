"""Null spectra against Monte Carlo on the weights, and how often noise passes for a finding."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import pytest
import torch
from torch import Tensor

from builders import seeded
from eigenzoo.linalg.gram import center_gram
from eigenzoo.linalg.nulls import axis_null, norm_matched_spectra
from eigenzoo.linalg.rank import choose_rank
from eigenzoo.linalg.spectrum import eigenpairs
from tolerance import tolerance


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For matrices of twenty rows a second thread costs more than it brings, ten times more beside a busy process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NORMS = {
    "even": lambda count: torch.ones(count, dtype=torch.float64),
    "uneven": lambda count: torch.logspace(-0.5, 0.5, count, dtype=torch.float64),
    "one giant": lambda count: torch.cat([torch.full((1,), 10.0), torch.ones(count - 1)]).double(),
}
# From six models on: of fewer, with one much larger than the rest, energies about the mean do not tell the norms apart.
SIZES = [(6, 200), (20, 800), (30, 100), (20, 10), (12, 3), (25, 25)]


def centered_noise(norms_N: Tensor, num_values: int, draw: torch.Generator) -> Tensor:
    """Centred Gram of unrelated models of exactly these norms, made of weights."""
    rows_ND = torch.randn(norms_N.numel(), num_values, generator=draw, dtype=torch.float64)
    rows_ND = rows_ND / rows_ND.square().sum(1, keepdim=True).sqrt() * norms_N[:, None]
    return center_gram(rows_ND @ rows_ND.T)


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize(("num_models", "num_values"), SIZES)
def test_norm_matched_spectra_are_those_of_unrelated_weights(num_models, num_values, norms):
    norms_N = NORMS[norms](num_models)
    draw, spectra, nulls = seeded(0), [], []
    for seed in range(100):
        gram_NN = centered_noise(norms_N, num_values, draw)
        values_N = torch.linalg.eigvalsh(gram_NN).flip(0)
        spectra.append(values_N / values_N.sum())
        nulls.append(norm_matched_spectra(gram_NN.diagonal(), num_values, draws=2, seed=seed).mean(0))
    found, expected = torch.stack(nulls), torch.stack(spectra)
    # Five standard errors of the difference of both means; a hundredth of the largest share besides, since the models'
    # energies about their mean tell their norms only to within the noise of that mean.
    error_N = (found.var(0) / 100 + expected.var(0) / 100).sqrt()
    assert torch.all(
        (found.mean(0) - expected.mean(0)).abs() <= 5 * error_N + 0.01 * expected.mean(0)[0] + tolerance(num_models)
    )
    assert found.sum(1).tolist() == pytest.approx([1.0] * 100, abs=tolerance(num_models))


def test_the_null_of_many_values_is_the_analytic_one():
    energies_N = torch.linspace(1, 5, 8, dtype=torch.float64)
    draw = seeded(3)
    # Raw energies e give centred ones of e (1 − 2/N) + Σe/N² in as many dimensions as make directions orthogonal.
    centered_N = energies_N * (1 - 2 / 8) + energies_N.sum() / 64
    found = norm_matched_spectra(centered_N, 10**9, draws=4, seed=int(torch.randint(99, (1,), generator=draw)))
    values = torch.linalg.eigvalsh(center_gram(torch.diag(energies_N))).flip(0)
    # Cosines of unrelated directions in a billion dimensions are 3e-5.
    assert float((found - values / values.sum()).abs().max()) < 1e-3
    assert float(found[:, -1].max()) <= tolerance(8)


def test_no_energy_has_no_null():
    assert float(norm_matched_spectra(torch.zeros(5), 100).abs().max()) == 0


def test_draws_are_seeded():
    energies_N = torch.ones(5, dtype=torch.float64)
    assert torch.equal(norm_matched_spectra(energies_N, 50, seed=1), norm_matched_spectra(energies_N, 50, seed=1))
    assert not torch.equal(norm_matched_spectra(energies_N, 50, seed=1), norm_matched_spectra(energies_N, 50, seed=2))


@pytest.mark.slow
def test_noise_passes_for_a_finding_once_in_twenty():
    alarms = dict.fromkeys([(size, norms) for size in SIZES for norms in NORMS], 0)
    trials = 100
    draw = seeded(4)
    for (num_models, num_values), norms in alarms:
        norms_N = NORMS[norms](num_models)
        for seed in range(trials):
            rows_ND = torch.randn(num_models, num_values, generator=draw, dtype=torch.float64) * norms_N[:, None]
            gram_NN = center_gram(rows_ND @ rows_ND.T)
            null = norm_matched_spectra(gram_NN.diagonal(), num_values, draws=20, seed=seed)
            choice = choose_rank("auto", eigenpairs(gram_NN)[0], float(gram_NN.diagonal().sum()), null)
            alarms[(num_models, num_values), norms] += choice.rank > 0
    # Over all of them the promised one in twenty, within two standard errors; in each of the 18 settings by itself what a
    # binomial of one in twenty passes once in ten thousand.
    total = trials * len(alarms)
    assert sum(alarms.values()) / total <= 0.05 + 2 * sqrt(0.05 * 0.95 / total)
    assert max(alarms.values()) <= 14, alarms


@pytest.mark.parametrize("strength", [3.0, 10.0])
@pytest.mark.parametrize(("num_models", "num_values"), [(20, 800), (40, 200), (30, 40)])
def test_planted_directions_are_counted(num_models, num_values, strength):
    for seed in range(10):
        draw = seeded(seed)
        rows_ND = torch.randn(num_models, num_values, generator=draw, dtype=torch.float64)
        weights = torch.linalg.qr(torch.randn(num_models, 5, generator=draw, dtype=torch.float64))[0]
        directions = torch.linalg.qr(torch.randn(num_values, 5, generator=draw, dtype=torch.float64))[0]
        # Each direction's singular value over the largest of the noise, √N + √D.
        rows_ND += strength * (sqrt(num_models) + sqrt(num_values)) * weights @ directions.T
        gram_NN = center_gram(rows_ND @ rows_ND.T)
        null = norm_matched_spectra(gram_NN.diagonal(), num_values, seed=seed)
        assert choose_rank("auto", eigenpairs(gram_NN)[0], float(gram_NN.diagonal().sum()), null).rank == 5


@pytest.mark.parametrize(("num_models", "outputs", "inputs"), [(10, 12, 20), (30, 20, 6), (8, 24, 3)])
def test_axis_null_is_the_spectrum_of_noise(num_models, outputs, inputs):
    draw = seeded(5)
    spectra = []
    for _ in range(60):
        stack_NOI = torch.randn(num_models, outputs, inputs, generator=draw, dtype=torch.float64)
        values = torch.linalg.svdvals((stack_NOI - stack_NOI.mean(0)).transpose(0, 1).flatten(1)).square()
        spectra.append(torch.nn.functional.pad(values, (0, outputs - values.numel())) / values.sum())
    expected = torch.stack(spectra).mean(0)
    energies_N = torch.full((num_models,), float(outputs * inputs))
    null = axis_null(outputs, energies_N, inputs, centered=True, draws=60)
    # Five standard errors of the difference of both means.
    error_O = ((null.var(0) + torch.stack(spectra).var(0)) / 60).sqrt()
    assert torch.all((null.mean(0) - expected).abs() <= 5 * error_O + tolerance(outputs))


def test_noise_on_the_sides_passes_for_a_finding_once_in_twenty():
    draw, alarms, trials = seeded(6), [], 60
    for num_models, outputs, inputs in [(10, 12, 20), (4, 12, 20), (30, 20, 6), (3, 24, 3), (8, 40, 1)]:
        for norms in ("even", "uneven"):
            norms_N = NORMS[norms](num_models)
            for seed in range(trials):
                stack_NOI = (
                    torch.randn(num_models, outputs, inputs, generator=draw, dtype=torch.float64)
                    * norms_N[:, None, None]
                )
                unfolded = (stack_NOI - stack_NOI.mean(0)).transpose(0, 1).flatten(1)
                moment_OO = unfolded @ unfolded.T
                null = axis_null(outputs, stack_NOI.flatten(1).square().sum(1), inputs, centered=True, seed=seed)
                choice = choose_rank("auto", eigenpairs(moment_OO)[0], float(moment_OO.diagonal().sum()), null)
                alarms.append(choice.rank > 0)
    assert sum(alarms) / len(alarms) <= 0.05 + 2 * sqrt(0.05 * 0.95 / len(alarms))
