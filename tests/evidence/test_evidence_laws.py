"""Laws over seeds: what may be changed about a zoo without changing what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_zoos import MODULES, assert_alike, families, find, noise, normal, planted, slack
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, regauge, write_adapter
from tolerance import tolerance

SEEDS = [2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1))]


def stacks_of(seed: int) -> dict[str, Tensor]:
    """A layer of each kind: directions, families, a mean, uneven norms."""
    return {
        "planted": planted(14, 2, 0.4, (9, 8), seed),
        "families": families((8, 6), shape=(7, 9), seed=seed),
        "mean": noise(14, (6, 8), seed + 1) + 2 * normal(1, 6, 8, seed=seed + 2),
        "uneven": noise(14, (8, 10), seed + 3, 0.8),
    }


def round_off(*zoos: Mapping[str, Tensor]) -> float:
    """Of sums over a layer's values, as much larger as the least eigenvalue is smaller that they are divided by."""
    rows = [stack.flatten(1) for stacks in zoos for stack in stacks.values()]
    return max(tolerance(rows_ND.shape[1], scale=slack(rows_ND)) for rows_ND in rows)


def shares(found: ez.Evidence, *but: str) -> dict[str, Any]:
    """Every figure that is a share or a verdict: energies and what is named are left out."""
    document = found.to_dict()
    gone = {"energy", "variance", "seconds", "map", "xmin", *but}

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: kept(each) for key, each in value.items() if key not in gone}
        return [kept(each) for each in value] if isinstance(value, list) else value

    return kept(document)


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_all_models_changes_no_share(tmp_path: Path, seed: int) -> None:
    stacks = stacks_of(seed)
    before = find(tmp_path / "as they are", stacks, seed=seed)
    for number, scale in enumerate((2.0**40, 2.0**-40, -0.1)):
        after = find(tmp_path / str(number), {name: scale * stack for name, stack in stacks.items()}, seed=seed)
        # LAPACK scales what it decomposes by its norm, so that even powers of two move the last bits of eigenvalues.
        assert_alike(shares(after), shares(before), round_off(stacks))


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_one_layer_changes_nothing_but_the_map(tmp_path: Path, seed: int) -> None:
    """Layers count by their number of values, and not by their energy."""
    stacks = stacks_of(seed)
    expected = shares(find(tmp_path / "as they are", stacks, seed=seed), "map_shares")
    found = shares(find(tmp_path / "louder", {**stacks, "mean": 2.0**20 * stacks["mean"]}, seed=seed), "map_shares")
    assert_alike(found, expected, 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_common_part_changes_nothing_but_the_mean_and_the_lineage(tmp_path: Path, seed: int) -> None:
    stacks = stacks_of(seed)
    moved = {name: stack + 8 * normal(1, *stack.shape[1:], seed=seed + 50) for name, stack in stacks.items()}
    documents = [find(tmp_path / str(number), each, seed=seed).to_dict() for number, each in enumerate((stacks, moved))]
    # A common part of 64 times the energy.
    bound = round_off(stacks, moved)
    assert documents[0]["lineage"]["groups"] != documents[1]["lineage"]["groups"], "the common part is one parent"
    parts = (
        "explained_variance_ratio",
        "effective_rank",
        "rank",
        "heldout",
        "split_half",
        "secondary",
        "suitability",
        "test",
        "null",
    )
    for name in stacks:
        first, second = (document["layers"][name] for document in documents)
        assert_alike({part: first[part] for part in parts}, {part: second[part] for part in parts}, bound)
        assert first["mean_energy"] < second["mean_energy"]
    assert_alike(documents[0]["growth"], documents[1]["growth"], bound)


@pytest.mark.parametrize("seed", SEEDS)
def test_turning_the_space_of_weights_changes_only_what_is_of_entries(tmp_path: Path, seed: int) -> None:
    """Sums and variances of entries stand behind the permuted null, chance and cosines; all else follows from inner products."""
    stacks = stacks_of(seed)
    turned = {}
    for name, stack in stacks.items():
        rotation = torch.linalg.qr(normal(stack[0].numel(), stack[0].numel(), seed=seed + 60))[0]
        turned[name] = (stack.flatten(1) @ rotation).view_as(stack)
    first, second = (
        find(tmp_path / str(number), each, seed=seed).to_dict() for number, each in enumerate((stacks, turned))
    )
    parts = ("explained_variance_ratio", "effective_rank", "rank", "mean_energy", "split_half", "suitability")
    bound = round_off(stacks, turned)
    for name in stacks:
        one, other = first["layers"][name], second["layers"][name]
        assert_alike({part: one[part] for part in parts}, {part: other[part] for part in parts}, bound)
        for part in ("rank", "in_sample", "captured", "leave_one_out"):
            assert_alike(one["heldout"][part], other["heldout"][part], bound)
        for part in ("norm_matched", "low", "high", "iid"):
            assert_alike(one["null"][part], other["null"][part], bound)
    for part in ("var90_rank", "in_sample", "captured"):
        assert_alike(first["growth"][part], second["growth"][part], bound)


@pytest.mark.parametrize("seed", SEEDS)
def test_other_factors_of_the_same_updates_change_nothing_but_the_lineage(tmp_path: Path, seed: int) -> None:
    """A → MA, B → BM⁻¹: the updates are the same, and only where they started can no longer be seen."""
    start = random_factors(MODULES, 3, 1000 + seed, torch.float64)
    updates = []
    for place in range(12):
        own = random_factors(MODULES, 3, 100 * seed + place, torch.float64)
        shared = {module: (b_OR, start[module][1]) for module, (b_OR, _) in own.items()}
        updates.append(shared if place < 5 else own)
    found = []
    for name in ("own", "turned"):
        paths = []
        for place, factors in enumerate(updates):
            changed = factors if name == "own" else regauge(factors, 7 * place + seed)
            paths.append(write_adapter(tmp_path / name / f"m{place}", changed, lora_alpha=2))
        found.append(ez.evidence(paths, seed=seed))
    own, turned = (each.to_dict() for each in found)
    assert own["lineage"]["groups"] == [[f"m{place}" for place in range(5)]]
    assert turned["lineage"]["groups"] != own["lineage"]["groups"]
    for name in MODULES:
        layers = [{**document["layers"][name], "test_across": None} for document in (own, turned)]
        if (
            layers[0]["verdict"] != layers[1]["verdict"]
        ):  # what was lineage can only be called shared once that is hidden
            assert layers[0]["verdict"] == "shared-lineage"
        for layer in layers:
            del layer["verdict"], layer["decided_by"]
        # Gauges of condition nine, twice; figures are divided by eigenvalues.
        assert_alike(*layers, 1e-8)
    assert_alike(own["growth"], turned["growth"], 1e-8)
    # With whole lineages held out, as the layers above.
    assert_alike(*({**document["summary"], "test_across": None} for document in (own, turned)), 1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_splitting_a_layer_by_its_rows_adds_up(tmp_path: Path, seed: int) -> None:
    """Energies, variances and the map are sums over layers, however the weights are cut."""
    stack = stacks_of(seed)["planted"]
    whole = find(tmp_path / "whole", {"w": stack}, seed=seed)
    parts = find(tmp_path / "parts", {"top": stack[:, :4], "bottom": stack[:, 4:]}, seed=seed)
    assert parts.summary.energy == pytest.approx(whole.summary.energy, rel=1e-12)
    assert parts.summary.variance == pytest.approx(whole.summary.variance, rel=1e-12)
    assert parts.map_shares == pytest.approx(whole.map_shares, rel=1e-9)
    first, second = (torch.tensor(found.map, dtype=torch.float64) for found in (whole, parts))
    assert float((first @ first.T - second @ second.T).abs().max()) <= 1e-8 * float((first @ first.T).abs().max())


@pytest.mark.parametrize("seed", SEEDS)
def test_shares_in_sample_are_never_below_those_of_unseen_models(tmp_path: Path, seed: int) -> None:
    found = find(tmp_path, stacks_of(seed), seed=seed)
    for layer in found.layers.values():
        assert layer.unseen is not None
        for inside, outside in zip(layer.unseen.in_sample, layer.unseen.captured, strict=True):
            assert outside <= inside + 1e-9
    assert found.growth is not None
    assert all(inside >= outside for inside, outside in zip(found.growth.in_sample, found.growth.captured, strict=True))
