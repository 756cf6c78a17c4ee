"""Verdicts on zoos of which it is known what they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from evidence_zoos import SHAPE, families, find, layers, noise, normal, planted
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, seeded, write_adapter, write_stacks
from eigenzoo.evidence.unseen import capture
from eigenzoo.linalg.gram import center_gram
from eigenzoo.subspace.moments.layer_moments import from_raw_gram

NUM_MODELS = 32


def with_mean(seed: int) -> Tensor:
    return noise(NUM_MODELS, seed=seed) + 3 * normal(1, *SHAPE, seed=seed + 1)


def uneven(seed: int) -> Tensor:
    return noise(NUM_MODELS, seed=seed, spread=1.2)


def strongly_planted(seed: int) -> Tensor:
    return planted(40, 8, 1.5, seed=seed)


def two_families(seed: int) -> Tensor:
    return families((14, 12), seed=seed)


def drawn_shares(norms_N: Tensor, num_values: int, times: int) -> np.ndarray:
    """Held-out shares of as many zoos of unrelated models of these norms: (times, ranks)."""
    shares = []
    for seed in range(times):
        rows_ND = normal(len(norms_N), num_values, seed=seed + 300) * norms_N[:, None]
        sums = capture(from_raw_gram(rows_ND @ rows_ND.T, num_values), None, 0)
        assert sums is not None
        shares.append(np.array(sums.captured) / sums.energy)
    return np.array(shares)


def test_a_shared_mean_is_no_subspace(tmp_path: Path) -> None:
    found = find(tmp_path, layers(with_mean))
    assert found.verdict.code == "shared-mean"
    assert found.verdict.decided_by == "mean"
    assert found.verdict.text.startswith("Shared mean, without a subspace beyond it. The mean alone removes ")
    # The mean has nine times the energy of a model's noise: nine tenths, less what the mean of 26 models adds.
    assert found.summary.mean_heldout == pytest.approx(0.9 - 0.1 / 26, abs=0.02)
    spread = drawn_shares(torch.ones(NUM_MODELS).double(), SHAPE[0] * SHAPE[1], 30).std(0)
    for layer in found.layers.values():
        assert layer.code == "shared-mean"
        assert layer.mean.deviations > 100
        assert layer.chance.auto == 0
        assert layer.unseen is not None
        away = np.array(layer.unseen.captured) - np.array(layer.unseen.null)
        assert np.abs(away / spread).max() < 4, "held-out shares beyond chance, in standard deviations of it"
    assert "3 of 3 layers" in found.verdict.text


def test_planted_directions_are_found_and_counted(tmp_path: Path) -> None:
    found = find(tmp_path, layers(strongly_planted))
    assert found.verdict.code == "shared-subspace"
    assert found.verdict.decided_by == "unseen"
    assert found.lineage.groups == ()
    assert found.verdict.text.startswith("Shared subspace: the top 16 directions of each layer explain ")
    for layer in found.layers.values():
        assert layer.code == "shared-subspace"
        assert layer.chance.auto == 8
        assert layer.halves is not None
        assert layer.halves.rank == 8
        assert min(layer.halves.cosines) > 0.9
        assert max(layer.halves.null_high) < 0.5
        assert layer.unseen is not None
        eight = layer.unseen.rank.index(8)
        # Eight times 1.5 of the noise are 12 of 13 parts of the variance; found from 32 models, nearly all of it.
        assert 0.88 < layer.unseen.captured[eight] < 12.3 / 13.3
        assert layer.secondary is not None
        assert layer.secondary.ratio < 1, "nothing is shared outside the eight"


def test_a_few_weak_directions_are_distinct_and_too_little_to_store_models_in(tmp_path: Path) -> None:
    found = find(tmp_path, layers(lambda seed: planted(60, 1, 0.03, (24, 24), seed=seed)))
    assert found.verdict.code == "shared-subspace"
    assert found.summary.directions.distinct
    assert not found.summary.directions.material
    assert found.verdict.text.count("This is more than chance, but too little to store models in.") == 1
    assert {layer.chance.auto for layer in found.layers.values()} == {1}


def test_two_families_are_a_lineage_and_no_subspace(tmp_path: Path) -> None:
    found = find(tmp_path, layers(two_families))
    assert found.verdict.code == "shared-lineage"
    assert found.verdict.decided_by == "lineage"
    expected = [{f"m{place}" for place in range(14)}, {f"m{place}" for place in range(14, 26)}]
    assert [set(group) for group in found.lineage.groups] == expected
    assert (
        "(2 groups, the largest with 14 of the 26 models). Models of different origin do not share it"
        in found.verdict.text
    )
    assert found.summary.directions.shared
    assert found.summary.across_directions is not None
    assert not found.summary.across_directions.shared
    # Inside either family nothing is shared: what held-out models hold there is chance.
    within = found.to_dict()["lineage"]["within"]
    assert [group["num_models"] for group in within] == [14, 12]
    for group in within:
        assert group["captured"] == pytest.approx(group["null"], rel=0.3, abs=0.01)


def test_what_is_shared_across_lineages_is_a_subspace(tmp_path: Path) -> None:
    """Four families whose members all vary along the same directions."""
    found = find(tmp_path, layers(lambda seed: families((10,) * 4, seed=seed) + strongly_planted(seed)))
    assert [len(group) for group in found.lineage.groups] == [10] * 4
    assert found.verdict.code == "shared-subspace"
    assert found.summary.across_directions is not None
    assert found.summary.across_directions.shared


def test_uneven_norms_fool_the_iid_null_and_not_the_verdict(tmp_path: Path) -> None:
    found = find(tmp_path, layers(uneven))
    assert found.verdict.code == "no-shared-structure"
    for layer in found.layers.values():
        first = layer.chance.explained_variance_ratio[0]
        assert first > 2 * layer.chance.iid[0]
        assert layer.chance.low[0] <= first <= layer.chance.high[0]
        assert layer.chance.auto == 0
        assert layer.chance.permuted is not None
        assert layer.chance.permuted[0] == pytest.approx(layer.chance.norm_matched[0], rel=0.05)
    control = next(control for control in found.to_dict()["controls"] if control["name"] == "chance")
    assert "(a null with equal norms, which uneven norms mislead, gives " in control["sentence"]


def test_noise_is_no_structure(tmp_path: Path) -> None:
    found = find(tmp_path, layers(lambda seed: noise(NUM_MODELS, seed=seed)))
    assert found.verdict.code == "no-shared-structure"
    assert found.verdict.layers == {
        "no-shared-structure": 3, "shared-mean": 0, "shared-lineage": 0, "shared-subspace": 0, "no-variance": 0,
    }  # fmt: skip
    assert found.lineage.groups == ()
    assert found.growth is not None
    assert found.growth.captured == pytest.approx(found.growth.null, rel=0.3)
    assert all(layer.dealt.directions.p_value > 1e-4 for layer in found.layers.values())


def test_many_weak_signs_are_one_strong_one(tmp_path: Path) -> None:
    """Directions that hardly any layer shows alone, in twenty-four layers."""
    found = find(tmp_path, layers(lambda seed: planted(24, 2, 0.03, (12, 12), seed=seed), 24))
    assert found.verdict.layers["no-shared-structure"] > found.verdict.layers["shared-subspace"]
    assert found.verdict.code == "shared-subspace"
    assert found.summary.directions.p_value < 1e-8


def test_adapters_with_random_factors_share_nothing(tmp_path: Path) -> None:
    shapes = {"block.0.q": (24, 20), "block.0.v": (16, 20)}
    paths = [write_adapter(tmp_path / f"m{place}", random_factors(shapes, 4, place)) for place in range(24)]
    found = ez.evidence(paths)
    assert found.verdict.code == "no-shared-structure"
    for layer in found.layers.values():
        assert layer.chance.spectrum_matched is not None
        # Two updates of rank four in 480 dimensions have no larger inner products than two dense ones of their norms.
        assert layer.chance.spectrum_matched == pytest.approx(layer.chance.norm_matched, rel=0.2, abs=0.002)
        assert layer.chance.low[0] * 0.95 <= layer.chance.explained_variance_ratio[0] <= layer.chance.high[0] * 1.05


ARCHETYPES: dict[str, tuple[Callable[[int], Tensor], str]] = {
    "mean": (with_mean, "shared-mean"),
    "planted": (strongly_planted, "shared-subspace"),
    "families": (two_families, "shared-lineage"),
    "uneven": (uneven, "no-shared-structure"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "families" else pytest.mark.slow) for name in ARCHETYPES]
)
def test_neither_the_order_of_models_nor_the_seed_changes_the_verdict(tmp_path: Path, name: str) -> None:
    make, code = ARCHETYPES[name]
    paths = write_stacks(tmp_path / "zoo", layers(make, 2))
    groups = set()
    for seed in range(3):
        order = torch.randperm(len(paths), generator=seeded(seed)).tolist() if seed else range(len(paths))
        found = ez.evidence([paths[place] for place in order], seed=seed)
        assert found.verdict.code == code
        assert {layer.code for layer in found.layers.values()} == {code}
        groups.add(frozenset(frozenset(group) for group in found.lineage.groups))
    assert len(groups) == 1


@pytest.mark.parametrize("spread", [0.0, 1.2], ids=["even", "very uneven"])
@pytest.mark.parametrize(("num_models", "num_values"), [(12, 200), (25, 60), (32, 288)])
@pytest.mark.slow
def test_the_null_of_held_out_shares_is_that_of_unrelated_zoos(num_models: int, num_values: int, spread: float) -> None:
    """Drawn sixty times with the norms kept: the mean held-out curve is the stated one."""
    norms_N = torch.exp(spread * normal(num_models, seed=1))
    drawn = drawn_shares(norms_N, num_values, 60)
    nulls = []
    for seed in range(20):
        rows_ND = normal(num_models, num_values, seed=seed + 900) * norms_N[:, None]
        sums = capture(from_raw_gram(center_gram(rows_ND @ rows_ND.T), num_values), None, 0)
        assert sums is not None
        nulls.append(np.array(sums.null) / sums.energy)
    # Five standard errors of the draws' mean, and that the norms are known only from energies about a noisy mean: the larger
    # of a hundredth and a twentieth of the share.
    error = 5 * drawn.std(0) / np.sqrt(60) + np.maximum(0.01, 0.05 * drawn.mean(0)) * (spread > 0) + 0.002
    assert (np.abs(np.mean(nulls, 0) - drawn.mean(0)) <= error).all(), (np.mean(nulls, 0), drawn.mean(0), error)
