"""Sketches of a moment against its dense float64 eigendecomposition: what is held, and what is said of what is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builders import seeded
from eigenzoo.errors import RankError
from eigenzoo.linalg import sketch
from eigenzoo.linalg.angles import subspace_gap
from eigenzoo.linalg.side import SideMoment
from eigenzoo.linalg.sketch import Krylov, num_columns
from tolerance import tolerance

SIZE, COLUMNS, RANK = 160, 24, 8
NUMBERS = torch.arange(1, SIZE + 1, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(SIZE, dtype=torch.float64),
    "slow": NUMBERS**-0.5,
    "decaying": NUMBERS**-2,
    "exponential": torch.exp(-NUMBERS / 3),
    "planted": torch.where(NUMBERS <= RANK, 100 - NUMBERS, torch.rand(SIZE, generator=seeded(3), dtype=torch.float64)),
    "low rank": torch.where(NUMBERS <= 5, NUMBERS, 0.0),
    "one": (NUMBERS <= 1).double(),
}


@pytest.fixture(params=SPECTRA)
def values(request):
    return (SPECTRA[request.param] / SPECTRA[request.param].sum()).sort(descending=True).values


def moment_of(values_S: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A dense moment of these eigenvalues."""
    size = values_S.numel()
    vectors = torch.linalg.qr(torch.randn(size, size, generator=seeded(seed + 100), dtype=torch.float64))[0]
    return (vectors * values_S) @ vectors.T


def sketched(
    moment_SS: torch.Tensor, columns: int = COLUMNS, *, passes: int = 2, seed: int = 0, dtype=torch.float64
) -> SideMoment:
    krylov = Krylov(moment_SS.shape[0], columns, passes=passes, seed=seed, dtype=dtype)
    for _ in range(passes):
        krylov.take((moment_SS.to(dtype) @ krylov.block().to(dtype)).double())
    return krylov.moment(float(moment_SS.diagonal().sum()))


def captured(moment_SS: torch.Tensor, basis_SK: torch.Tensor) -> float:
    return float((basis_SK * (moment_SS @ basis_SK)).sum())


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_moment_lies_between_two_that_are_known(values, passes):
    moment_SS = moment_of(values)
    found = sketched(moment_SS, passes=passes)
    bound = tolerance(SIZE)
    assert found.size == SIZE
    assert found.trace == pytest.approx(1.0, abs=bound)
    assert float(torch.linalg.eigvalsh(moment_SS - found.matrix_SS)[0]) >= -bound
    held = found.eigenvectors().values_K
    assert bool((held <= values[: held.numel()] + bound).all())
    upper = found.outside.upper_P
    assert upper.numel() == passes * COLUMNS
    assert bool((values[: upper.numel()] <= upper + bound).all())


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_no_directions_hold_more_than_is_stated(values, passes):
    optimum = values.cumsum(0)
    for seed in range(25):
        moment_SS = moment_of(values, seed)
        found = sketched(moment_SS, passes=passes, seed=seed).eigenvectors()
        for rank in (1, RANK, COLUMNS):
            best = float(optimum[rank - 1])
            held = captured(moment_SS, found.basis(rank))
            # What is held lies in S above what it is in the sketch, and below the best there is.
            assert float(found.values_K[:rank].sum()) - tolerance(SIZE) <= held <= best + tolerance(SIZE)
            assert found.most(rank) >= best - tolerance(SIZE)


@example([0.8838093336562427, 1.0, 0.0, 1.0, 0.9970567208715919, 0.03125, 1.0], 3, 2, 0)
@example([1.0, 1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.998046875, 1.0], 3, 3, 0)
@settings(max_examples=40)
@given(
    st.lists(st.floats(0, 1) | st.floats(0, 1e-6) | st.just(1.0), min_size=1, max_size=60),
    st.integers(1, 30),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_no_directions_hold_more_than_is_stated_whatever_the_spectrum(spectrum, columns, passes, seed):
    values = torch.tensor(spectrum, dtype=torch.float64).sort(descending=True).values
    found = sketched(moment_of(values), columns, passes=passes, seed=seed).eigenvectors()
    # Ŝ is a sum over the K directions of the sketch. Round-off of a product moves each term by as much, and sums of eigenvalues by
    # no more than all terms together (the trace norm).
    moved = max(found.values_K.numel(), 1) * tolerance(values.numel(), scale=float(values[0]))
    for rank in range(found.values_K.numel() + 1):
        assert found.most(rank) >= float(values[:rank].sum()) - moved


@pytest.mark.parametrize(("name", "share"), [("decaying", 1e-3), ("exponential", 1e-3), ("planted", 1e-3)])
def test_what_is_stated_is_close_where_eigenvalues_fall(name, share):
    values = (SPECTRA[name] / SPECTRA[name].sum()).sort(descending=True).values
    moment_SS = moment_of(values)
    for seed in range(10):
        found = sketched(moment_SS, seed=seed).eigenvectors()
        assert found.most(RANK) - captured(moment_SS, found.basis(RANK)) <= share


def test_what_is_stated_is_not_all_there_is_where_they_do_not():
    # The best 8 of 160 equal directions hold a twentieth; what is outside of the sketch, seven tenths, bounds nothing.
    moment_SS = moment_of(SPECTRA["flat"] / SIZE)
    for seed in range(10):
        found = sketched(moment_SS, seed=seed)
        assert found.outside.energy == pytest.approx(1 - 2 * COLUMNS / SIZE, rel=1e-9)
        assert found.eigenvectors().most(RANK) <= 0.3


def test_probes_know_the_norm_of_what_is_outside(values):
    # Never below, over seeds; above by SHORTFALL^-¼ = 1.95, and by what S moves from the test columns' directions to the others.
    moment_SS = moment_of(values)
    for seed in range(40):
        found = sketched(moment_SS, seed=seed)
        rest = torch.linalg.eigvalsh(moment_SS - found.matrix_SS)
        norm = float(rest.pow(4).sum()) ** 0.25
        assert found.outside.fourth >= norm - tolerance(SIZE)
        assert min(found.outside.fourth, found.outside.energy) <= 8 * norm + tolerance(SIZE)


def test_the_shortfall_is_as_rare_as_is_said():
    level = sketch.SHORTFALL
    assert (level * 2.718281828459045 ** (1 - level)) ** (sketch.PROBES / 2) <= sketch.CHANCE


def test_low_rank_is_exact():
    values = torch.where(NUMBERS <= 5, 6 - NUMBERS, 0.0)
    moment_SS = moment_of(values)
    directions = torch.linalg.eigh(moment_SS)[1].flip(1)[:, :5]
    for passes in (1, 2, 3):
        found = sketched(moment_SS, passes=passes)
        assert found.outside.energy <= tolerance(SIZE, scale=15)
        vectors = found.eigenvectors()
        assert vectors.values_K.tolist() == pytest.approx([5, 4, 3, 2, 1], abs=tolerance(SIZE, scale=5))
        assert vectors.most(5) == pytest.approx(15, abs=tolerance(SIZE, scale=15))
        assert subspace_gap(vectors.basis(5).T, directions.T) <= tolerance(SIZE, scale=5)
        # Fewer directions than columns: that is all there are, and no error.
        assert vectors.basis(COLUMNS).shape == (SIZE, 5)


@pytest.mark.parametrize("ratio", [0.1, 0.01])
def test_planted_directions_are_found_to_the_ratio_of_eigenvalues(ratio):
    values = torch.where(NUMBERS <= RANK, 1.0, ratio).double()
    moment_SS = moment_of(values)
    planted = torch.linalg.eigh(moment_SS)[1].flip(1)[:, :RANK]
    for seed in range(10):
        found = sketched(moment_SS, seed=seed).eigenvectors().basis(RANK)
        # Each read divides tangents by the ratio once more, and Ŝ is S·Q: three factors after two reads, against one asked for.
        assert subspace_gap(planted.T, found.T) <= ratio**2


def test_no_energy_has_no_directions():
    found = sketched(torch.zeros(SIZE, SIZE, dtype=torch.float64))
    vectors = found.eigenvectors()
    assert (found.trace, found.outside.energy, found.outside.fourth) == (0.0, 0.0, 0.0)
    assert vectors.values_K.shape == (0,)
    assert vectors.basis(0).shape == (SIZE, 0)
    assert vectors.most(3) == 0.0


def test_one_more_read_never_loses(values):
    moment_SS = moment_of(values)
    for seed in range(5):
        outside = [sketched(moment_SS, passes=passes, seed=seed).outside.energy for passes in (1, 2, 3)]
        assert outside[1] <= outside[0] + tolerance(SIZE)
        assert outside[2] <= outside[1] + tolerance(SIZE)


def test_the_expected_energy_outside_is_that_of_halko_martinsson_and_tropp(values):
    # Theorem 10.5, for every k at once; the mean of 60 draws has a spread of a few percent where the bound is nearly met.
    moment_SS = moment_of(values)
    mean = sum(sketched(moment_SS, passes=1, seed=seed).outside.energy for seed in range(60)) / 60
    for rank in range(COLUMNS - 1):
        tail = float(values[rank:].sum())
        assert mean <= 1.03 * (1 + rank / (COLUMNS - rank - 1)) * tail + tolerance(SIZE)


def test_a_rank_above_the_sketch_is_refused():
    found = sketched(moment_of(SPECTRA["slow"]), 10).eigenvectors()
    assert found.basis(20).shape == (SIZE, 20)
    with pytest.raises(RankError, match=r"rank 21, but the sketch has only 20 directions.*Sketch again for rank 21"):
        found.basis(21)
    with pytest.raises(RankError, match="solver 'exact'"):
        found.check_rank(21)


def test_a_moment_that_is_no_sketch_says_what_it_holds():
    moment_SS = moment_of(SPECTRA["slow"])
    found = SideMoment(moment_SS).eigenvectors()
    found.check_rank(SIZE + 1)
    assert found.most(RANK) == pytest.approx(float(SPECTRA["slow"][:RANK].sum()), rel=tolerance(SIZE))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_do_not_matter(values, scale):
    moment_SS = moment_of(values)
    one, other = sketched(moment_SS), sketched(scale * moment_SS)
    # Of equal eigenvalues any directions will do, and another kernel finds others. What probes see of what is outside of them
    # has a spread of 0.8 % over seeds: five times that, twice.
    for rank in (1, RANK, COLUMNS):
        held, expected = (moment.eigenvectors().values_K[:rank] for moment in (other, one))
        assert (held / scale).tolist() == pytest.approx(expected.tolist(), abs=tolerance(SIZE))
        most, expected_most = (moment.eigenvectors().most(rank) for moment in (other, one))
        assert most / scale == pytest.approx(expected_most, rel=0.08)


def test_products_in_float32_hold_what_those_in_float64_hold(values):
    moment_SS = moment_of(values)
    # A product's round-off, once per test column, is the least that can be asked of what is summed over all of them.
    bound = tolerance(2 * COLUMNS, dtype=torch.float32)
    for seed in range(5):
        exact = sketched(moment_SS, seed=seed).eigenvectors()
        found = sketched(moment_SS, seed=seed, dtype=torch.float32).eigenvectors()
        for rank in (1, 5, RANK):
            basis = found.basis(rank)
            kept = basis.shape[1]
            assert float((basis.T @ basis - torch.eye(kept)).abs().max()) <= tolerance(SIZE)
            assert captured(moment_SS, basis) >= captured(moment_SS, exact.basis(rank)) - bound
            assert found.most(rank) >= float(values[:rank].sum()) - bound


def test_noise_of_float32_products_is_no_direction(values):
    moment_SS = moment_of(values)
    for seed in range(5):
        found = sketched(moment_SS, seed=seed, dtype=torch.float32)
        above = -float(torch.linalg.eigvalsh(moment_SS - found.matrix_SS)[0])
        assert above <= tolerance(1, dtype=torch.float32)


def test_test_columns_are_orthonormal_where_nothing_new_is_left(values):
    krylov, blocks = Krylov(SIZE, COLUMNS, passes=3), []
    for _ in range(3):
        blocks.append(krylov.block()[:, :COLUMNS])
        krylov.take(moment_of(values) @ krylov.block())
    tests_SP = torch.cat(blocks, 1)
    assert float((tests_SP.T @ tests_SP - torch.eye(3 * COLUMNS)).abs().max()) <= tolerance(SIZE)


def test_one_seed_gives_one_sketch_and_another_another():
    moment_SS = moment_of(SPECTRA["slow"])
    first, again, other = (sketched(moment_SS, seed=seed).factor_SP for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_a_short_side_is_held_as_far_as_its_columns_go(size):
    values = torch.arange(size, 0, -1, dtype=torch.float64)
    found = sketched(moment_of(values), num_columns(3))
    assert found.trace == pytest.approx(float(values.sum()), rel=tolerance(size))
    held = found.eigenvectors()
    for rank in range(held.values_K.numel() + 1):
        assert held.most(rank) >= float(values[:rank].sum()) - tolerance(size, scale=size)
