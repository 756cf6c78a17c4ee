"""Zoos at the edge: a handful of models, copies, layers in which nothing or hardly anything varies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_zoos import MODULES, assert_alike, find, noise, normal, planted
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, write_adapter, write_model, write_stacks


def stated(found: ez.Evidence) -> dict[str, Any]:
    """The document, once it is known to be JSON and its shares to be shares."""
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    for layer in document["layers"].values():
        held = layer["heldout"]
        for curve in (held["in_sample"], held["captured"], held["null"], held["leave_one_out"]["captured"]):
            assert all(-1e-9 <= share <= 1 + 1e-9 for share in curve)
            assert curve == sorted(curve)
        assert len(held["rank"]) == len(held["captured"]) == len(held["in_sample"]) == len(held["null"])
    return document


@pytest.mark.parametrize("kind", ["weight", "update"])
@pytest.mark.parametrize("num_models", [2, 3, 4, 5, *(pytest.param(num, marks=pytest.mark.slow) for num in (6, 7))])
def test_a_handful_of_models_is_looked_at_as_far_as_it_goes(tmp_path: Path, num_models: int, kind: str) -> None:
    for seed in range(3):
        if kind == "weight":
            stack = noise(num_models, (20, 30), seed)
            paths = write_stacks(tmp_path / str(seed), {"w": stack, "b": noise(num_models, (3,), seed + 1)})
        else:
            paths = [
                write_adapter(tmp_path / str(seed) / f"m{place}", random_factors(MODULES, 3, 10 * seed + place))
                for place in range(num_models)
            ]
        found = ez.evidence(paths, seed=seed)
        document = stated(found)
        assert found.verdict.code == "no-shared-structure"
        layer = next(iter(document["layers"].values()))
        assert len(layer["explained_variance_ratio"]) == num_models - 1
        assert sum(layer["explained_variance_ratio"]) == pytest.approx(1.0, rel=1e-9)
        assert (layer["heldout"]["rank"] == []) == (num_models < 4)
        assert (layer["split_half"] is None) == (num_models < 4)
        assert (document["growth"] is None) == (num_models < 5)
        if num_models < 4:
            assert f"{num_models} models are too few to hold any out" in found.verdict.text
            assert {control["name"] for control in document["controls"]} >= {"chance", "mean", "lineage"}
            assert "unseen" not in {control["name"] for control in document["controls"]}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pattern", [[0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 2], [0, 1, 2, 3, 0]])
def test_copies_among_a_handful_are_a_lineage_and_no_subspace(tmp_path: Path, pattern: list[int], seed: int) -> None:
    """Some folds hold nothing but copies of one model: they have no directions, and nothing is divided by their round-off."""
    found = find(tmp_path, {"w": noise(4, (12, 10), 7)[pattern]}, seed=seed)
    stated(found)
    assert found.verdict.code in ("shared-lineage", "no-shared-structure")
    assert len(found.lineage.duplicates) == len(pattern) - len(set(pattern))
    assert set(map(len, found.lineage.groups)) == {pattern.count(place) for place in set(pattern)} - {1}


@pytest.mark.parametrize("num_models", [2, 3, 5, 9])
@pytest.mark.parametrize("center", ["models", "none"])
def test_copies_of_one_model_are_said_to_be_copies(tmp_path: Path, num_models: int, center: str) -> None:
    stacks = {"w": normal(1, 6, 5, seed=1).expand(num_models, 6, 5), "b": torch.ones(num_models, 4).double()}
    found = find(tmp_path, stacks, center=center)
    document = stated(found)
    assert found.verdict.code == "shared-mean"
    assert found.verdict.decided_by == "variance"
    assert (
        found.verdict.text
        == f"The {num_models} models are copies of one model: no analysed layer differs between them."
    )
    assert found.verdict.layers["no-variance"] == 2
    assert set(found.verdict.values.values()) == {0.0}
    assert [len(group) for group in found.lineage.groups] == [num_models]
    assert len(found.lineage.duplicates) == num_models - 1
    assert document["controls"] == []
    assert document["growth"] is None
    assert document["map"] == {f"m{place}": [0.0] * 3 for place in range(num_models)}


def test_a_layer_that_is_equal_in_all_models_counts_for_nothing(tmp_path: Path) -> None:
    stack = noise(12, seed=3)
    alone = stated(find(tmp_path / "alone", {"w": stack}))
    both = stated(find(tmp_path / "both", {"w": stack, "still": 9 * normal(1, 99, 99, seed=1).expand(12, 99, 99)}))
    still = both["layers"]["still"]
    assert (still["verdict"], still["decided_by"]) == ("no-variance", "variance")
    assert still["variance"] == 0
    assert still["mean_energy"] == pytest.approx(1.0, rel=1e-12)
    for curve in (
        still["explained_variance_ratio"],
        *(still["null"][key] for key in ("norm_matched", "low", "high", "iid")),
    ):
        assert curve == [0.0] * 11
    assert still["rank"] == {"auto": 0, "var90": 0}
    assert still["split_half"] is still["secondary"] is None
    # Sums over layers have one more term that is zero, and products one more block.
    for part in ("growth", "map"):
        assert_alike(both[part], alone[part])
    assert_alike(both["layers"]["w"], alone["layers"]["w"])
    assert_alike(both["lineage"]["cosines"], alone["lineage"]["cosines"])
    assert_alike({**both["summary"], "energy": 0.0}, {**alone["summary"], "energy": 0.0})
    assert_alike(both["verdict"]["values"], alone["verdict"]["values"])
    assert (
        "Tested alone, 1 of 1 layers with variance have this verdict, with 100.0 % of their values. "
        "1 more layer without variance does not count." in both["verdict"]["text"]
    )


def test_a_merged_model_among_those_it_was_merged_from_is_one_more_model(tmp_path: Path) -> None:
    """The models' own mean, rounded to float32: what is left of it about the mean is round-off."""
    stack = noise(16, seed=4).float()
    paths = write_stacks(tmp_path / "zoo", {"w": stack})
    before = stated(ez.evidence(paths))
    merged = write_model(tmp_path / "zoo" / "merged", {"w": stack.double().mean(0).float()})
    found = ez.evidence([*paths, merged])
    document = stated(found)
    assert found.verdict.code == "no-shared-structure"
    assert found.lineage.duplicates == ()
    places = [document["layers"]["w"]["heldout"]["leave_one_out"]["captured"] for document in (before, document)]
    # The mean of all lies within their span, and is captured: of the energy it is the 1/17 of one model that has none.
    assert places[1][:3] == pytest.approx(places[0][:3], rel=0.2)


def test_a_layer_of_one_value_or_of_fewer_values_than_models_is_measured(tmp_path: Path) -> None:
    document = stated(find(tmp_path, {"scale": noise(9, (1,), 1), "few": noise(9, (2, 2), 2), "w": noise(9, seed=3)}))
    for name, size in (("scale", 1), ("few", 4)):
        layer = document["layers"][name]
        assert sum(layer["explained_variance_ratio"][:size]) == pytest.approx(1.0, rel=1e-9)
        assert layer["explained_variance_ratio"][size:] == [0.0] * (8 - size)
        assert layer["heldout"]["rank"][-1] == size
        assert layer["heldout"]["captured"][-1] == pytest.approx(1.0, rel=1e-9)
        assert layer["heldout"]["null"][-1] == pytest.approx(1.0, rel=1e-9)
        assert layer["verdict"] == "no-shared-structure", "k = D holds everything, by chance too"
    assert document["verdict"]["code"] == "no-shared-structure"


STRANGE = {
    "one model far larger": lambda: torch.cat([1e6 * noise(1, seed=1), noise(8, seed=2)]),
    "one model of zeros": lambda: torch.cat([torch.zeros(1, 16, 18), noise(8, seed=2)]),
    "all but one equal": lambda: torch.cat([noise(1, seed=1), normal(1, 16, 18, seed=2).expand(8, 16, 18)]),
    "orthogonal, of one norm": lambda: torch.eye(9, 288).view(9, 16, 18),
    "opposite pairs around zero": lambda: torch.cat([noise(4, seed=1), -noise(4, seed=1), torch.zeros(1, 16, 18)]),
    "exactly one direction": lambda: planted(9, 1, 1.0, seed=1) - noise(9, seed=1),
    "pairs of copies": lambda: noise(6, seed=1).repeat(2, 1, 1),
    "very small": lambda: 1e-30 * noise(9, seed=1),
    "very large": lambda: 1e30 * noise(9, seed=1),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_zoos_have_finite_figures(tmp_path: Path, name: str) -> None:
    stack: Tensor = STRANGE[name]()
    found = find(tmp_path, {"w": stack.double(), "b": noise(len(stack), (7,), 5)})
    stated(found)
    if name.startswith("very"):
        assert found.verdict.code == "no-shared-structure"
    if name == "exactly one direction":
        assert found.layers["w"].code == "shared-subspace"


def test_updates_that_are_zero_are_models_too(tmp_path: Path) -> None:
    """An adapter before its first step has B = 0: no update, and an A like any other."""
    paths = []
    for place in range(8):
        factors = random_factors(MODULES, 3, place)
        if place < 3:
            factors = {module: (0 * b_OR, a_RI) for module, (b_OR, a_RI) in factors.items()}
        paths.append(write_adapter(tmp_path / f"m{place}", factors))
    found = ez.evidence(paths)
    stated(found)
    assert found.lineage.duplicates == (("m0", "m1"), ("m0", "m2"))
    # Copies in function, and so one group, though their A's are their own.
    assert found.lineage.groups == (("m0", "m1", "m2"),)


def test_one_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ez.UsageError, match=r"one model\. Evidence compares models"):
        find(tmp_path, {"w": noise(1)})
