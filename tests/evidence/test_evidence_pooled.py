"""All layers together: weighted averages of the layers' own figures, and whole lineages held out, from the document alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evidence_zoos import (
    ROUND_OFF,
    Measured,
    dimensions,
    families,
    find,
    hold_out,
    layers,
    measure,
    noise,
    planted,
    up_to,
    without,
)
from torch import Tensor

from eigenzoo.display import in_percent
from eigenzoo.evidence.lineage import as_lineages
from eigenzoo.evidence.verdict import p_text
from eigenzoo.linalg.gram import center_gram, scale_models
from eigenzoo.linalg.heldout import make_grouped_folds
from tolerance import tolerance


@pytest.fixture(scope="module", params=["weight", "update"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(tmp_path_factory.mktemp("zoo"), request.param, 3)


def average(layers: Mapping[str, Any], figure: Any) -> float:
    """Weighted by the number of values."""
    known = [(layer["num_values"], figure(layer)) for layer in layers.values() if layer["variance"] > 0]
    return sum(weight * value for weight, value in known) / sum(weight for weight, _ in known)


def at_or_below(curve: Mapping[str, Any], part: str, rank: int) -> float:
    places = [place for place, known in enumerate(curve["rank"]) if known <= rank]
    return curve[part][places[-1]] if places else 0.0


def test_pooled_figures_are_averages_over_layers_by_their_number_of_values(zoo: Measured) -> None:
    document, summary = zoo.document, zoo.document["summary"]
    found = document["layers"]
    assert summary["rank"] == max((layer["heldout"]["rank"] for layer in found.values()), key=lambda ranks: ranks[-1])
    for place, rank in enumerate(summary["rank"]):
        for part in ("in_sample", "captured", "null"):
            expected = average(found, lambda layer: at_or_below(layer["heldout"], part, rank))  # noqa: B023
            assert summary[part][place] == pytest.approx(expected, rel=1e-12)
    assert summary["mean_energy"] == pytest.approx(average(found, lambda layer: layer["mean_energy"]), rel=1e-12)
    assert summary["mean_heldout"] == pytest.approx(average(found, lambda layer: layer["mean"]["heldout"]), rel=1e-12)
    assert summary["mean_null"] == pytest.approx(average(found, lambda layer: layer["mean"]["null"]), rel=1e-12)
    for part in ("energy", "variance"):
        assert summary[part] == pytest.approx(sum(layer[part] for layer in found.values()), rel=1e-12)


def test_the_controls_quote_the_figures_of_the_document(zoo: Measured) -> None:
    document = zoo.document
    controls = {control["name"]: control for control in document["controls"]}
    summary, found = document["summary"], document["layers"]
    shown = max(rank for rank in summary["rank"] if rank <= 16)
    place = summary["rank"].index(shown)
    expected = {
        "chance": (
            average(found, lambda layer: layer["explained_variance_ratio"][0]),
            average(found, lambda layer: layer["null"]["norm_matched"][0]),
        ),
        "mean": (summary["mean_heldout"], summary["mean_null"]),
        "unseen": (summary["captured"][place], summary["null"][place]),
        "universality": (
            average(found, lambda layer: layer["split_half"]["cosines"][0]),
            average(found, lambda layer: layer["split_half"]["null_cosines"][0]),
        ),
        "growth": (document["growth"]["var90_rank"][-1], document["growth"]["var90_rank"][0]),
    }
    for name, (value, control) in expected.items():
        assert controls[name]["value"] == pytest.approx(value, rel=1e-12), name
        assert controls[name]["control_value"] == pytest.approx(control, rel=1e-12), name
    assert f"top {shown} directions" in controls["unseen"]["sentence"]
    assert all(control["sentence"].endswith(".") for control in controls.values())


@pytest.mark.parametrize("kind", ["noise", "planted", "families"])
def test_the_figures_of_the_verdicts_text_are_in_the_document(tmp_path: Path, kind: str) -> None:
    make = {
        "noise": lambda seed: noise(40, seed=seed),
        "planted": lambda seed: planted(40, 4, 0.3, seed=seed),
        "families": lambda seed: families((10, 10, 10), seed=seed),
    }[kind]
    found = find(tmp_path, layers(make))
    document = found.to_dict()
    test, across = document["summary"]["test"], document["summary"]["test_across"]
    assert (across is not None) == (kind == "families")
    quoted = across or test
    directions = "direction explains" if quoted["rank"] == 1 else f"{quoted['rank']} directions explain"
    figures = (f"{in_percent(quoted['share'])} of the variance", f"{quoted['over_chance']:.3g} times chance")
    if test["distinct"]:
        figures = (f"{quoted['ratio']:.3g} times as much", f"{quoted['effective']:.3g} effective directions")
    for figure in (f"the top {directions}", *figures):
        assert figure in document["verdict"]["text"]
    assert (test["distinct"] or test["material"]) == (kind != "noise")
    # The ratio beside the control means little without its p-value: in noise it exceeds one too.
    unseen = next(control["sentence"] for control in document["controls"] if control["name"] == "unseen")
    assert f"explain{'s' * (test['rank'] == 1)} {test['ratio']:.3g} times as much" in unseen
    assert f"(p {p_text(test['p_cloud'])})" in unseen


def test_controls_name_the_ranks_that_they_are_measured_at(tmp_path: Path) -> None:
    same = find(tmp_path / "same", layers(lambda seed: planted(40, 3, 0.3, seed=seed)))
    mixed = find(tmp_path / "mixed", {"a": planted(40, 3, 0.3), "b": noise(40, seed=1)})
    for found, auto, halves, kept in ((same, "3", "3", "2"), (mixed, "0 to 3", "1 to 3", "1 to 2")):
        said = {control["name"]: control["sentence"] for control in found.to_dict()["controls"]}
        assert f" {auto} directions exceed the null in each layer" in said["chance"]
        assert ("on average" in said["chance"]) == ("to" in auto)
        assert f"Subspaces of rank {halves} from disjoint halves" in said["universality"]
        assert f"The next directions, after the top {kept}, explain" in said["secondary"]


def contrasts(rows_ND: Tensor, folds: list[Tensor], rank: int) -> float:
    """Share of the held-out residuals about their own weighted mean, at one norm, in the top directions of the fitted ones."""
    level_N = scale_models(center_gram(rows_ND @ rows_ND.T))[1]

    def residuals(places: list[int]) -> np.ndarray:
        weights = level_N[places].square()
        return ((rows_ND[places] - weights @ rows_ND[places] / weights.sum()) * level_N[places][:, None]).numpy()

    captured = energy = 0.0
    for held in folds:
        _, values, vectors_KD = np.linalg.svd(residuals(without(len(rows_ND), held)), full_matrices=False)
        vectors_KD = vectors_KD[values**2 > ROUND_OFF * values[0] ** 2][:rank]
        away = residuals(held.tolist())
        captured, energy = captured + float(((away @ vectors_KD.T) ** 2).sum()), energy + float((away**2).sum())
    return captured / energy


SIZES = (14, 12, 4, 2)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor]]:
    """Four families and two models on their own, in layers of unlike size."""
    stacks = {
        "block.0.weight": torch.cat([families(SIZES, seed=1), noise(2, seed=2)]),
        "block.1.weight": torch.cat([families(SIZES, shape=(9, 8), seed=3), noise(2, (9, 8), seed=4)]),
    }
    return find(tmp_path_factory.mktemp("grouped"), stacks), stacks


def test_whole_lineages_are_held_out_as_on_the_weights(grouped: tuple[Any, dict[str, Tensor]]) -> None:
    evidence, stacks = grouped
    document = evidence.to_dict()
    groups = document["lineage"]["groups"]
    assert [len(group) for group in groups] == list(SIZES)
    across = document["lineage"]["across"]
    assert across["num_lineages"] == len(SIZES) + 2
    folds = make_grouped_folds(as_lineages(evidence.names, groups), 10)
    assert sorted(map(len, folds)) == [1, 1, 2, 4, 12, 14]
    assert across["rank"] == [1, 2, 4, 8, 16, 19][: len(across["rank"])]
    sizes = {name: stack[0].numel() for name, stack in stacks.items()}
    total = sum(sizes.values())
    for place, rank in enumerate(across["rank"]):
        expected = sum(sizes[name] / total * contrasts(stack.flatten(1), folds, rank) for name, stack in stacks.items())
        assert across["captured"][place] == pytest.approx(expected, abs=1e-8)
        null = sum(
            sizes[name] / total * min(1.0, rank / dimensions(stack.flatten(1))) for name, stack in stacks.items()
        )
        assert across["null"][place] == pytest.approx(null, rel=1e-12)
    mean = 0.0
    for name, stack in stacks.items():
        rows_ND = stack.flatten(1)
        pairs = [rows_ND[held] @ rows_ND[without(len(rows_ND), held)].T for held in folds]
        common = sum(float(inner.sum()) for inner in pairs) / sum(inner.numel() for inner in pairs)
        mean += sizes[name] / total * common / float(rows_ND.square().sum(1).mean())
    assert across["mean"] == pytest.approx(mean, abs=tolerance(999))


def test_large_groups_are_looked_at_alone(grouped: tuple[Any, dict[str, Tensor]]) -> None:
    """What is found inside a group is what a zoo of that group alone shows."""
    evidence, stacks = grouped
    within = evidence.to_dict()["lineage"]["within"]
    assert [group["num_models"] for group in within] == [14, 12]
    start = 0
    for size, group in zip(SIZES, within, strict=False):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tensor_split(5)
        for place, rank in enumerate(group["rank"]):
            captured = total = 0.0
            for stack in stacks.values():
                rows_ND = stack.flatten(1)[start : start + size]
                found = [hold_out(rows_ND, without(size, held), held) for held in order]
                share = sum(up_to(fold[2], rank) for fold in found) / sum(fold[3] for fold in found)
                captured, total = captured + rows_ND.shape[1] * share, total + rows_ND.shape[1]
            assert group["captured"][place] == pytest.approx(captured / total, abs=1e-9)
        start += size


def test_a_group_has_the_verdict_of_a_zoo_of_its_own(grouped: tuple[Any, dict[str, Tensor]], tmp_path: Path) -> None:
    evidence, stacks = grouped
    start = 0
    for size, group in zip(SIZES, evidence.to_dict()["lineage"]["within"], strict=False):
        alone = find(tmp_path / str(size), {name: stack[start : start + size] for name, stack in stacks.items()})
        assert alone.verdict.code == group["verdict"] == "shared-mean"
        common = average(alone.to_dict()["layers"], lambda layer: layer["mean"]["common"])
        assert group["mean"] == pytest.approx(common, rel=1e-9)
        start += size


def test_figures_of_lineages_and_of_random_folds_are_quoted_at_one_rank(grouped: tuple[Any, dict[str, Tensor]]) -> None:
    """Folds of whole lineages are larger and span less, so that the ranks of the two are not the same."""
    evidence, _ = grouped
    document, contrasted = evidence.to_dict(), evidence.summary.contrasts
    across = document["lineage"]["across"]
    both = [rank for rank in contrasted.rank if rank in across["rank"] and rank <= 16]
    assert contrasted.rank[len(across["rank"]) - 1] != across["rank"][-1], "equal ranks would prove nothing"
    control = next(control for control in document["controls"] if control["name"] == "lineage")
    assert control["value"] == contrasted.captured[contrasted.rank.index(both[-1])]
    assert control["control_value"] == across["captured"][across["rank"].index(both[-1])]
    assert f"top {both[-1]} directions" in control["sentence"]
    assert f"top {both[-1]} directions" in evidence.verdict.text


def test_a_layer_counts_by_its_values_and_not_by_its_energy(tmp_path: Path) -> None:
    """A bias with a million times the energy is no louder than its few numbers."""
    stacks = {**layers(lambda seed: planted(24, 3, 0.5, seed=seed), 2), "bias": 1000 * noise(24, (12,), seed=1)}
    found = find(tmp_path, stacks)
    assert found.layers["bias"].code == "no-shared-structure"
    assert found.verdict.code == "shared-subspace"
    assert found.verdict.values["no-shared-structure"] == pytest.approx(12 / (12 + 2 * 288), rel=1e-12)
    assert sum(found.verdict.values.values()) == pytest.approx(1.0, rel=1e-12)
    assert found.verdict.layers["shared-subspace"] == 2
