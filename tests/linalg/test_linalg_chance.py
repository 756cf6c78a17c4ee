"""What chance gives, against drawing it: entries that are really shuffled, factors and subspaces that are really random."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from builders import seeded
from eigenzoo.linalg.angles import principal_cosines, random_cosines
from eigenzoo.linalg.gram import center_gram, project_out, scale_models, unit
from eigenzoo.linalg.nulls import (
    FLOAT32_FROM,
    LARGEST_DRAW,
    edge_null,
    iid_spectra,
    norm_matched_spectra,
    permuted_spectra,
    spectrum_matched_spectra,
)
from tolerance import tolerance

DRAWS = 80


def shares(rows_ND: Tensor, *, centered: bool = True) -> Tensor:
    """Explained variance ratios from the weights."""
    rows_ND = rows_ND - rows_ND.mean(0) if centered else rows_ND
    values = torch.linalg.svdvals(rows_ND).square()
    return torch.nn.functional.pad(values, (0, len(rows_ND) - values.numel())) / values.sum()


def assert_one_law(found: Tensor, drawn: Tensor, slack: float = 0.0) -> None:
    """The means of two samples of rows agree within five standard errors of their difference, and `slack` of the first value."""
    error = (found.var(0) / len(found) + drawn.var(0) / len(drawn)).sqrt()
    gap = (found.mean(0) - drawn.mean(0)).abs()
    assert bool((gap <= 5 * error + slack * drawn.mean(0)[0] + tolerance(found.shape[1])).all()), (gap / error).max()


def many(draw_one: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([draw_one(seed) for seed in range(DRAWS)])


def with_sums(num_models: int, num_values: int, spread: float, seed: int = 0) -> Tensor:
    """Heavy-tailed entries whose sums are far from zero, in models of uneven norms, without a common mean."""
    draw = seeded(seed)
    rows_ND = torch.randn(num_models, num_values, generator=draw, dtype=torch.float64) ** 3
    rows_ND += 2 * torch.randn(num_models, 1, generator=draw, dtype=torch.float64)
    return rows_ND * torch.exp(spread * torch.randn(num_models, 1, generator=draw, dtype=torch.float64))


def shuffled(rows_ND: Tensor, seed: int) -> Tensor:
    draw = seeded(seed)
    return torch.stack([row_D[torch.randperm(row_D.numel(), generator=draw)] for row_D in rows_ND])


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_permuted_spectra_are_those_of_shuffled_entries(spread, seed):
    rows_ND = with_sums(14, 300, spread, seed)
    away_ND = rows_ND - rows_ND.mean(0)
    found = permuted_spectra(away_ND.square().sum(1), away_ND.sum(1), 300, draws=DRAWS)
    # The energies about the mean tell those of the models only to within the models' own inner products: 1/√300 of an energy.
    assert_one_law(found, many(lambda number: shares(shuffled(rows_ND, number))), slack=0.02)
    without = norm_matched_spectra(away_ND.square().sum(1), 300, draws=DRAWS)
    assert float(found.mean(0)[0]) > 1.05 * float(without.mean(0)[0]), "sums that do not matter would prove little"


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(("num_models", "num_values"), [(10, 300), (16, 8), (24, 30), (FLOAT32_FROM + 4, 300)])
def test_iid_spectra_are_those_of_noise(num_models, num_values, centered):
    def noise(seed: int) -> Tensor:
        rows_ND = torch.randn(num_models, num_values, generator=seeded(seed), dtype=torch.float64)
        return shares(rows_ND, centered=centered)

    found = iid_spectra(num_models, num_values, centered=centered, draws=DRAWS, seed=7)
    # Large spectra are taken in float32: of what is zero, round-off is left.
    dtype = torch.float32 if num_models > FLOAT32_FROM else torch.float64
    assert_one_law(found, many(noise), slack=tolerance(1, dtype=dtype))
    assert found.sum(1).tolist() == pytest.approx([1.0] * DRAWS, abs=tolerance(num_models))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(
    ("num_models", "rank", "shape"),
    [(12, 3, (20, 16)), (30, 2, (9, 7)), (LARGEST_DRAW // 16 + 6, 16, (24, 20))],
    ids=["few", "many in a small layer", "by the limit"],
)
def test_spectrum_matched_spectra_are_those_of_random_factors(num_models, rank, shape, centered):
    draw = seeded(3)
    singular_NR = torch.exp(torch.randn(num_models, rank, generator=draw, dtype=torch.float64)).sort(
        1, descending=True
    )[0]

    def random_updates(seed: int) -> Tensor:
        generator = seeded(100 + seed)
        sides = [torch.randn(num_models, size, rank, generator=generator, dtype=torch.float64) for size in shape]
        left_NOR, right_NIR = (torch.linalg.qr(side)[0] for side in sides)
        return shares(((left_NOR * singular_NR[:, None]) @ right_NIR.mT).flatten(1), centered=centered)

    found = spectrum_matched_spectra(singular_NR, shape, centered=centered, draws=DRAWS, seed=8)
    # The limit knows second moments alone: measured, its first share is right to two parts in a hundred.
    assert_one_law(found, many(random_updates), slack=0.02 if num_models * rank > LARGEST_DRAW else 0.0)


@pytest.mark.parametrize(("num_models", "num_values"), [(12, 150), (20, 61), (9, 5), (30, 30)])
def test_the_edge_of_unrelated_models_is_that_of_noise_at_one_norm(num_models, num_values):
    norms_N = torch.logspace(-0.5, 0.5, num_models, dtype=torch.float64)

    def cumulative(seed: int) -> Tensor:
        rows_ND = torch.randn(num_models, num_values, generator=seeded(seed), dtype=torch.float64) * norms_N[:, None]
        scaled_NN, level_N = scale_models(center_gram(rows_ND @ rows_ND.T))
        values_N = torch.linalg.eigvalsh(project_out(scaled_NN, unit(level_N))).flip(0).clamp_min(0)
        return (values_N / values_N.sum()).cumsum(0)

    drawn = many(cumulative)
    middle, spread = edge_null(num_models, num_values)
    # Twenty draws stand behind the null; between two of its numbers of dimensions it is interpolated.
    error = drawn.std(0) * (1 / 20 + 1 / DRAWS) ** 0.5
    assert bool(((middle - drawn.mean(0)).abs() <= 5 * error + 0.01 * drawn.mean(0)[0] + tolerance(num_models)).all())
    # A standard deviation of twenty draws is known to 16 %, four times that.
    assert spread[:3].tolist() == pytest.approx(drawn.std(0)[:3].tolist(), rel=0.65, abs=1e-12)


def test_the_edge_moves_steadily_with_the_number_of_dimensions():
    first = [float(edge_null(15, number)[0][0]) for number in (20.0, 20.5, 23.0, 40.0, 41.0, 300.0, 5000.0)]
    assert first == sorted(first, reverse=True)
    assert float(edge_null(15, 1e9)[0][0]) == pytest.approx(1 / 14, rel=0.01)


@pytest.mark.parametrize(("rank", "num_values"), [(1, 50), (4, 60), (8, 20), (8, 16), (7, 10), (5, 5), (3, 10_000)])
def test_random_cosines_are_those_of_random_subspaces(rank, num_values):
    def drawn(seed: int) -> Tensor:
        draw = seeded(seed)
        size = min(num_values, 500)
        sides = [torch.randn(size, rank, generator=draw, dtype=torch.float64) for _ in range(2)]
        first, second = (torch.linalg.qr(side)[0].T for side in sides)
        # Beyond 500 dimensions cosines fall with the root of their number.
        return principal_cosines(first, second) * (size / num_values) ** 0.5

    found = random_cosines(rank, num_values, draws=DRAWS, seed=9)
    assert_one_law(found, many(drawn), slack=0.01)
    assert int((found[0] == 1).sum()) == max(0, 2 * rank - num_values)
    assert bool((found[:, :-1] >= found[:, 1:]).all())


def test_chance_is_seeded():
    energies_N, sums_N = torch.ones(6).double(), torch.arange(6.0).double()
    for draw in (
        lambda seed: permuted_spectra(energies_N, sums_N, 99, seed=seed),
        lambda seed: iid_spectra(6, 99, seed=seed),
        lambda seed: spectrum_matched_spectra(energies_N[:, None], (9, 11), seed=seed),
        lambda seed: random_cosines(3, 99, seed=seed),
    ):
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))


def test_nothing_has_no_chance():
    zero_N = torch.zeros(5, dtype=torch.float64)
    assert float(permuted_spectra(zero_N, zero_N, 20).abs().max()) == 0
    assert float(spectrum_matched_spectra(zero_N[:, None], (4, 5)).abs().max()) == 0
    assert float(spectrum_matched_spectra(torch.zeros(600, 2), (4, 5)).abs().max()) == 0
