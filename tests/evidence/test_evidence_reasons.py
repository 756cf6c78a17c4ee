"""Why a verdict is what it is: the sentence names the condition that decides, with the figure and the limit of the rule."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from evidence_zoos import families, layers, noise, normal, planted
from torch import Tensor

import eigenzoo as ez
from builders import write_stacks
from eigenzoo.evidence.verdict import Measures, why_mean, why_not_shared, why_shared

SHARED = Measures(
    rank=8, share=0.4, over_chance=12.0, p_chance=1e-9, ratio=1.8, p_cloud=1e-6, effective=5.25, num_models=60
)
"""Figures that meet every condition."""


def test_leading_directions_are_said_with_their_limits() -> None:
    text = why_shared(SHARED)
    assert "the top 8 directions explain 1.8 times as much of held-out models as average directions do" in text
    assert "(needed: at least 1.1; p = 1e-06, needed: below 0.001)" in text
    assert "5.25 effective directions (needed: at most 30, half of the 60 models)" in text
    text = why_shared(replace(SHARED, effective=0.461))
    assert "The models spread over a single effective direction (needed: at most 30, half of the 60 models)" in text


def test_directions_that_explain_enough_are_said_with_their_limits() -> None:
    text = why_shared(replace(SHARED, ratio=1.0, effective=45.0))
    assert "explain 40.0 % of the variance of held-out models about their own mean, 12 times chance" in text
    assert "(needed: at least 5 % and 2 times chance; p = 1e-09, needed: below 0.001)" in text
    assert "45 effective directions (needed: at most 60, one per model)" in text


@pytest.mark.parametrize(
    ("changed", "said", "unsaid"),
    [
        (
            {"p_chance": 0.3, "p_cloud": 0.2},
            ["Unrelated models reach as much (p = 0.2, needed: below 0.001"],
            ["average"],
        ),
        (
            {"effective": 140.0},
            ["12 times chance. But the models spread over 140 effective directions (needed: at most 60"],
            [],
        ),
        ({"effective": inf}, ["But the models spread over directions of which none leads"], ["inf"]),
        (
            {"share": 0.031, "over_chance": 6.0, "effective": 140.0},
            [
                "explain 3.10 %",
                "6 times chance, but at least 5 % is needed",
                "140 effective directions (needed: at most 30, half of the 60",
            ],
            ["2 times", "1.1 is"],
        ),
        (
            {"over_chance": 1.5, "ratio": 1.05},
            ["but at least 2 times chance is needed", "1.05 times", "but at least 1.1 is needed"],
            ["5 % is"],
        ),
        (
            {"p_chance": 0.02, "ratio": 1.02},
            ["unrelated models reach that share too (p = 0.02)", "at least 1.1 is needed"],
            ["even cloud"],
        ),
        ({"share": 0.01, "p_cloud": 0.5}, ["at least 5 % is needed", "an even cloud reaches that too (p = 0.5)"], []),
    ],
)
def test_each_missed_condition_is_said_and_no_other(
    changed: dict[str, float], said: list[str], unsaid: list[str]
) -> None:
    measures = replace(SHARED, **changed)
    assert not measures.distinct
    assert not measures.material
    text = why_not_shared(measures)
    for part in said:
        assert part in text
    for part in unsaid:
        assert part not in text


def test_the_mean_is_said_with_its_limit() -> None:
    assert (
        why_mean(0.3, shared=True) == "Two models share 30.0 % of a model's energy on average (needed: at least 5 %)."
    )
    assert why_mean(0.02, shared=False).endswith("2.00 % of a model's energy on average (needed: at least 5 %).")
    assert "less than 4 standard deviations from zero" in why_mean(0.3, shared=False)


def cloud(seed: int) -> Tensor:
    """Models that vary in 108 directions alike, of which none leads."""
    directions_DK = torch.linalg.qr(normal(400, 60, seed=seed + 1))[0]
    shared_ND = 2 * normal(30, 60, seed=seed) @ directions_DK.T
    return shared_ND.view(30, 20, 20) + 0.3 * noise(30, (20, 20), seed=seed)


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (lambda seed: planted(30, 1, 0.3, seed=seed), "shared-subspace", "times as much of held-out models as average"),
        (cloud, "no-shared-structure", "times chance. But the models spread over"),
        (lambda seed: noise(26, seed=seed), "no-shared-structure", "Unrelated models reach as much"),
        (lambda seed: families((14, 12), seed=seed), "shared-lineage", "With whole lineages held out and all models"),
        (
            lambda seed: noise(26, seed=seed) + 3 * normal(1, 16, 18, seed=seed + 9),
            "shared-mean",
            "on average (needed: at least 5 %",
        ),
    ],
    ids=["planted", "cloud", "noise", "families", "mean"],
)
def test_the_verdict_of_a_zoo_names_its_reason(tmp_path: Path, make: object, code: str, said: str) -> None:
    found = ez.evidence(write_stacks(tmp_path, layers(make)), cache=False)
    assert found.verdict.code == code
    assert said in found.verdict.text
    measures, test = found.summary.measures, found.summary.directions
    assert measures is not None
    assert (measures.distinct or measures.material) is test.shared
    assert measures.held is test.held or test.shared
    if test.shared:
        assert (measures.rank, measures.ratio, measures.p_value) == (test.rank, test.ratio, test.p_value)
        assert measures.effective == test.effective
