"""The rule of the verdict: every threshold decides, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evidence_zoos import find, layers, noise, normal, planted

from eigenzoo.evidence import verdict as rule
from eigenzoo.evidence.layer_evidence import findings
from eigenzoo.evidence.summary import Pooled, shown_indices
from eigenzoo.evidence.unseen import MeanShare
from eigenzoo.evidence.verdict import Directions, Findings, Weighed, directions, judge, judge_zoo
from eigenzoo.linalg.heldout import make_folds
from eigenzoo.subspace.moments.layer_moments import from_raw_gram

NOTHING = MeanShare(0.0, 0.0, 0.0, 0.0, 0.0)
MEAN = replace(NOTHING, common=0.3, deviations=9.0)
SHARED = Directions(True, True, False, 4, 1e-9, 2.0)


def weighed(rows: torch.Tensor) -> Weighed:
    rows_ND = rows.flatten(1)
    _, found = findings(from_raw_gram(rows_ND @ rows_ND.T, rows_ND.shape[1]), rows_ND.shape[1], None, 0)
    assert found is not None
    return found


@pytest.mark.parametrize("factor", [0.99, 1.01])
@pytest.mark.parametrize("name", ["SIGNIFICANCE", "DISTINCT", "FEW"])
def test_what_is_distinct_is_decided_by_its_three_thresholds(monkeypatch, name: str, factor: float) -> None:
    """One strong direction: the ratio and the p-value of its best rank, and how many directions the cloud has."""
    layer = weighed(planted(40, 1, 0.1))
    found = directions([layer])
    assert found.distinct
    assert found.effective is not None
    # With sixteen directions looked at nothing is tried but the first.
    monkeypatch.setattr(rule, "TESTED_RANK", 1)
    alone = directions([layer])
    assert alone.distinct
    edge = {"SIGNIFICANCE": alone.p_value, "DISTINCT": alone.ratio, "FEW": found.effective / 40}[name]
    monkeypatch.setattr(rule, name, edge * factor)
    # A p-value must be below, a ratio above, a number of directions not above its threshold.
    assert directions([layer]).distinct is ((factor > 1) == (name != "DISTINCT"))


@pytest.mark.parametrize("factor", [0.99, 1.01])
@pytest.mark.parametrize("name", ["MATERIAL_SHARE", "MATERIAL_RATIO", "FEWER_THAN_MODELS"])
def test_what_is_material_is_decided_by_its_thresholds(monkeypatch, name: str, factor: float) -> None:
    """Eight even directions, at the rank that holds all of them."""
    layer = weighed(planted(40, 8, 0.5))
    monkeypatch.setattr(rule, "DISTINCT", 1e9)
    sums = layer.sums
    places = [place for place, rank in enumerate(sums.rank) if rank <= rule.TESTED_RANK]
    assert directions([layer]).material
    largest = {
        "MATERIAL_SHARE": max(sums.contrast[place] / sums.contrast_energy for place in places),
        "MATERIAL_RATIO": max(sums.over_chance[place] for place in places),
        "FEWER_THAN_MODELS": directions([layer]).effective / 40,
    }[name]
    monkeypatch.setattr(rule, name, largest * factor)
    found = directions([layer])
    assert found.material is found.shared is ((factor < 1) == (name != "FEWER_THAN_MODELS"))


@pytest.mark.parametrize(
    ("common", "deviations", "shared"),
    [(0.051, 4.1, True), (0.049, 4.1, False), (0.051, 3.9, False), (-0.5, -9.0, False), (0.05, 4.0, True)],
)
def test_a_mean_counts_from_its_share_and_its_deviations_on(common: float, deviations: float, shared: bool) -> None:
    mean = replace(NOTHING, common=common, deviations=deviations)
    assert Findings(rule.NOWHERE, mean).mean_is_shared is shared


@pytest.mark.parametrize(
    ("dealt", "across", "code", "decided_by"),
    [
        ((SHARED, MEAN), None, "shared-subspace", "unseen"),
        ((SHARED, MEAN), (SHARED, NOTHING), "shared-subspace", "unseen"),
        ((SHARED, NOTHING), (rule.NOWHERE, MEAN), "shared-lineage", "lineage"),
        ((rule.NOWHERE, MEAN), None, "shared-mean", "mean"),
        ((rule.NOWHERE, MEAN), (rule.NOWHERE, MEAN), "shared-mean", "mean"),
        ((rule.NOWHERE, MEAN), (rule.NOWHERE, NOTHING), "shared-lineage", "lineage"),
        ((rule.NOWHERE, NOTHING), (SHARED, MEAN), "no-shared-structure", "unseen"),
        ((rule.NOWHERE, NOTHING), None, "no-shared-structure", "unseen"),
    ],
)
def test_a_layer_is_judged_in_order(dealt, across, code: str, decided_by: str) -> None:
    held_out = None if across is None else Findings(*across)
    assert judge(Findings(*dealt), held_out) == (code, decided_by)


N, M, L, S, STILL = "no-shared-structure", "shared-mean", "shared-lineage", "shared-subspace", "no-variance"


@pytest.mark.parametrize(
    ("codes", "together", "code", "decided_by"),
    [
        ({N: 10, S: 11}, None, S, "unseen"),
        ({N: 11, S: 10}, None, N, "unseen"),
        ({N: 10, S: 10}, None, N, "unseen"),  # on equal weights the more sceptical
        ({M: 10, L: 10, S: 10}, None, M, "mean"),
        ({L: 10, S: 10}, None, L, "lineage"),
        ({N: 10, S: 1, STILL: 99}, None, N, "unseen"),
        ({N: 10}, (S, "unseen"), S, "unseen"),
        ({M: 10}, (L, "lineage"), L, "lineage"),
        ({L: 10, N: 9}, (S, "unseen"), L, "lineage"),
        ({STILL: 5}, None, M, "variance"),
        ({STILL: 5}, (S, "unseen"), M, "variance"),
    ],
)
def test_a_zoo_has_the_verdict_of_most_of_its_values(codes, together, code: str, decided_by: str) -> None:
    found = judge_zoo({f"{name}{place}": (name, size) for place, (name, size) in enumerate(codes.items())}, together)
    assert found[:2] == (code, decided_by)
    assert found[2] == {each: int(each in codes) for each in (N, M, L, S, STILL)}
    varying = sum(size for name, size in codes.items() if name != STILL)
    expected = {each: codes.get(each, 0) / varying if varying else 0.0 for each in (N, M, L, S)}
    assert found[3] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("dealt", "across", "places"),
    [
        ((1, 2, 4, 8, 16, 19), (1, 2, 4, 8, 11), (3, 3)),
        ((1, 2, 3), (1, 2, 4), (1, 1)),
        ((1, 2, 4, 8, 16, 32, 40), (1, 2, 4, 8, 16, 32, 35), (4, 4)),
        ((2, 4), (1, 2), (0, 1)),
        ((), (1, 2), None),
        ((1, 2), (), None),
        ((1, 2), None, None),
    ],
)
def test_sentences_compare_at_the_largest_rank_of_both_up_to_sixteen(dealt, across, places) -> None:
    pooled = [None if ranks is None else Pooled(ranks, ranks, ranks, ranks) for ranks in (dealt, across)]
    assert shown_indices(*pooled) == places


def test_weights_that_vary_unevenly_or_together_are_no_subspace(tmp_path: Path) -> None:
    """Some entries vary more than others, and the entries of a kernel together: that is no direction that models share."""
    uneven = noise(32, (24, 24), 1) * torch.exp(normal(24, 24, seed=2) / 2)
    kernels = noise(32, (64, 1), 3) + 0.7 * noise(32, (64, 9), 4)
    found = find(tmp_path, {"uneven": uneven, "kernels": kernels})
    assert {layer.code for layer in found.layers.values()} == {"no-shared-structure"}
    for layer in found.layers.values():
        assert layer.unseen is not None
        top = layer.unseen.rank.index(16)
        assert layer.unseen.captured[top] > 1.1 * 16 / layer.layer.num_values, "an even cloud would prove nothing"


def test_folds_of_copies_test_nothing(tmp_path: Path) -> None:
    """Every fold holds copies of one model: of their contrasts round-off is left, and it decides nothing."""
    pattern = [0] * 9
    for number, fold in enumerate(make_folds(9, 4, seed=0)):
        for place in fold.tolist():
            pattern[place] = number
    found = find(tmp_path, layers(lambda seed: noise(4, (30, 20), seed)[pattern]))
    assert all(layer.dealt.directions == rule.NOWHERE for layer in found.layers.values())
    assert found.verdict.code in ("shared-lineage", "no-shared-structure")
