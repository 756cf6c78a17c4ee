"""Spectra and Grams against numpy, scikit-learn and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from builders import seeded
from eigenzoo.linalg.gram import center_gram, shift_gram, split_gram, squared_distances
from eigenzoo.linalg.spectrum import effective_rank, eigenpairs, explained_variance_ratio
from tolerance import tolerance

SHAPES = [(8, 50), (12, 5), (3, 3), (2, 40), (1, 10)]


def rows(num_models: int, num_values: int, seed: int = 0) -> Tensor:
    return torch.randn(num_models, num_values, generator=seeded(seed), dtype=torch.float64) + 2


@pytest.mark.parametrize("shape", SHAPES)
def test_centering_a_gram_is_centering_its_rows(shape):
    rows_ND = rows(*shape)
    centered_ND = rows_ND - rows_ND.mean(0)
    found = center_gram(rows_ND @ rows_ND.T)
    assert float((found - centered_ND @ centered_ND.T).abs().max()) <= tolerance(
        shape[1], scale=float(rows_ND.square().max())
    )
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_shift_gram_moves_the_origin_and_split_gram_undoes_it(shape):
    rows_ND, offset_D = rows(*shape), rows(1, shape[1], seed=1)[0]
    gram_NN = rows_ND @ rows_ND.T
    moved_ND = rows_ND + offset_D
    bound = tolerance(shape[1], scale=float(moved_ND.square().max()))
    shifted = shift_gram(gram_NN, rows_ND @ offset_D, float(offset_D @ offset_D))
    assert float((shifted - moved_ND @ moved_ND.T).abs().max()) <= bound
    centered_NN, cross_N, energy = split_gram(gram_NN)
    mean_D = rows_ND.mean(0)
    assert float((cross_N - (rows_ND - mean_D) @ mean_D).abs().max()) <= bound
    assert abs(energy - float(mean_D @ mean_D)) <= bound
    assert float((shift_gram(centered_NN, cross_N, energy) - gram_NN).abs().max()) <= bound


def test_squared_distances_are_those_of_the_rows_whatever_the_origin():
    rows_ND = rows(6, 20)
    expected = torch.cdist(rows_ND, rows_ND).square()
    bound = tolerance(20, scale=float(rows_ND.square().max()))
    for origin in (0.0, 1.0):
        moved_ND = rows_ND + origin
        assert float((squared_distances(moved_ND @ moved_ND.T) - expected).abs().max()) <= bound
    assert float(squared_distances(torch.eye(len(expected), dtype=expected.dtype)).diagonal().abs().max()) == 0


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_explained_variance_ratios_are_those_of_scikit_learn(shape):
    rows_ND = rows(*shape)
    found = explained_variance_ratio(center_gram(rows_ND @ rows_ND.T))
    expected = PCA(svd_solver="full").fit(rows_ND.numpy()).explained_variance_ratio_
    # The offset of 2 in every entry passes through the Gram, and its energy is what round-off is a share of.
    bound = tolerance(shape[1], scale=float(rows_ND.square().sum() / (rows_ND - rows_ND.mean(0)).square().sum()))
    count = min(len(found), len(expected))
    assert np.abs(found[:count].numpy() - expected[:count]).max() <= bound
    assert float(found[count:].abs().sum()) <= bound


def test_ratios_have_the_total_as_denominator():
    values = torch.tensor([5.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    rotation = torch.linalg.qr(rows(4, 4))[0]
    ratio_N = explained_variance_ratio(rotation @ torch.diag(values) @ rotation.T)
    assert ratio_N.tolist() == pytest.approx([0.5, 0.3, 0.1, 0.1], abs=tolerance(4))
    assert float(ratio_N[:2].sum()) == pytest.approx(0.8, abs=tolerance(4))


def test_a_moment_without_variance_has_no_ratios_and_no_directions():
    zero_NN = torch.zeros(4, 4, dtype=torch.float64)
    assert explained_variance_ratio(zero_NN).tolist() == [0.0] * 4
    values_K, vectors_NK = eigenpairs(zero_NN)
    assert values_K.shape == (0,)
    assert vectors_NK.shape == (4, 0)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_eigenpairs_leave_out_what_is_round_off(rank):
    low_ND = rows(8, rank, seed=2) @ rows(rank, 60, seed=3)
    gram_NN = low_ND @ low_ND.T
    values_K, vectors_NK = eigenpairs(gram_NN)
    assert values_K.shape == (rank,)
    assert torch.all(values_K[:-1] >= values_K[1:])
    rebuilt = (vectors_NK * values_K) @ vectors_NK.T
    assert float((rebuilt - gram_NN).abs().max()) <= tolerance(60, scale=float(gram_NN.abs().max()))
    squares = np.linalg.svd(low_ND.numpy(), compute_uv=False)[:rank] ** 2
    assert np.abs(values_K.numpy() - squares).max() <= tolerance(60, scale=squares[0])


@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [
        ([1.0], 1.0),
        ([0.25] * 4, 4.0),
        ([0.5, 0.5, 0.0, 0.0], 2.0),
        ([2.0, 2.0, 2.0], 3.0),
        ([0.9, 0.1], math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))),
        ([0.0, 0.0], 0.0),
        ([], 0.0),
    ],
)
def test_effective_rank_in_closed_form(spectrum, expected):
    assert effective_rank(torch.tensor(spectrum, dtype=torch.float64)) == pytest.approx(expected, abs=tolerance(4))


def test_effective_rank_of_a_geometric_spectrum():
    # Shares (1 − q) qⁱ have entropy −log(1 − q) − q log(q) / (1 − q); the cut at 200 leaves 2^-200 of them.
    q = 0.5
    entropy = -math.log(1 - q) - q / (1 - q) * math.log(q)
    assert effective_rank(q ** torch.arange(200, dtype=torch.float64)) == pytest.approx(
        math.exp(entropy), abs=tolerance(200)
    )
