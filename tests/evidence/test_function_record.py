"""`ez.evaluate`: the record, its sentence, and real checkpoints and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from function_zoos import RANKS, SHAPES, dense, reference, write_zoo
from safetensors.torch import load_file

import eigenzoo as ez
from builders import (
    write_model,
)
from eigenzoo.evidence.function import FunctionEvidence
from eigenzoo.evidence.variants import alone_ranks_of
from tolerance import ONE_IMAGE

KEYS = {
    "metric",
    "num_models",
    "heldout",
    "num_fitted",
    "ranks",
    "secondary_rank",
    "models",
    "mean",
    "spread",
    "sentence",
    "same_bytes_rank",
}
VARIANTS = {"original", "parent", "mean", "head_only", "rebuilt", "random_basis", "secondary", "alone"}


def distances(paths: list[Path]) -> Callable[[Path], float]:
    """The metric ‖X − X_original‖² of the model of the same name."""
    originals = {path.name: load_file(path / "model.safetensors") for path in paths}

    def squared_distance(path: Path) -> float:
        own = load_file(path / "model.safetensors")
        return sum(float((own[name] - value).square().sum()) for name, value in originals[path.name].items())

    return squared_distance


def test_the_record_is_json_with_these_keys_and_its_averages_are_averages(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    found = ez.evaluate(ez.fit(paths[:6], 4), distances(paths), paths[6:10])
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(record) == KEYS
    assert record["metric"] == "squared_distance"
    assert record["ranks"] == [1, 2, 4]
    for measured in (record["mean"], record["spread"], *record["models"].values()):
        assert set(measured) == VARIANTS
        assert set(measured["rebuilt"]) == {"1", "2", "4"}
        assert set(measured["random_basis"]) == {"4"}
    for pick in (lambda one: one["mean"], lambda one: one["rebuilt"]["2"], lambda one: one["secondary"]):
        figures = torch.tensor([pick(one) for one in record["models"].values()], dtype=torch.float64)
        assert pick(record["mean"]) == pytest.approx(float(figures.mean()), rel=1e-12)
        assert pick(record["spread"]) == pytest.approx(float(figures.std()) / 2, rel=1e-12)
    single = ez.evaluate(ez.fit(paths[:6], 4), distances(paths), paths[6:7])
    assert single.spread.original is None
    assert single.spread.rebuilt == {1: None, 2: None, 4: None}


def test_distances_are_the_energies_outside(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    found = ez.evaluate(ez.fit(paths[:6], 4), distances(paths), paths[6:8])
    for place in (6, 7):
        measured = found.models[f"m{place}"]
        outside = dict.fromkeys((0, 1, 2, 4), 0.0)
        for layer in SHAPES:
            stack = dense(paths, layer, "weight")
            from_to = reference(stack[:6], stack[place], RANKS["models"], False)
            for rank in outside:
                outside[rank] += float((stack[place] - from_to(0, rank)).square().sum())
        assert measured.original == 0
        assert measured.mean == pytest.approx(outside[0], rel=1e-5)
        assert measured.rebuilt == pytest.approx({rank: outside[rank] for rank in (1, 2, 4)}, rel=1e-5)


def described(tmp_path: Path, figures: Mapping[str, Any]) -> FunctionEvidence:
    """The record of a metric that gives each variant the figure it is told, one per held-out model."""
    paths, _ = write_zoo(tmp_path, "weight")
    parent = write_model(tmp_path / "_parent", {name: torch.ones(shape) for name, shape in SHAPES.items()})
    space = ez.fit(paths[:5], 1)
    ranks, _ = alone_ranks_of(space, space.open(paths[5:8]))
    order = ["original", "parent", "mean", "rebuilt", "random", *["alone"] * len(ranks)]
    figures = {"alone": figures["rebuilt"], **figures}
    told = iter([figures[variant][place] for place in range(3) for variant in order])
    return ez.evaluate(space, lambda path: next(told), paths[5:8], parent=parent)


def test_the_sentence_of_a_subspace_that_carries_the_function(tmp_path: Path) -> None:
    figures = {"original": [0.9, 0.96, 0.99], "parent": [0.5, 0.6, 0.4], "mean": [0.5, 0.4, 0.45]}
    found = described(tmp_path, {**figures, "rebuilt": [0.85, 0.94, 0.91], "random": [0.52, 0.48, 0.5]})
    assert found.sentence == (
        "On 3 models held out of a fit to 5, the average of <lambda> is 0.95 for the originals, 0.9 rebuilt at rank 1, 0.45 with "
        "the mean alone, 0.5 with a random basis and 0.5 with the parent alone. Rebuilt models recover 90 % of the gap "
        "between the mean alone and the originals. Each model cut alone to rank 4, which takes no more bytes than this bundle, "
        "has 0.9. Neither is clearly nearer to the originals."
    )


def test_the_sentence_says_whether_cutting_alone_is_better(tmp_path: Path) -> None:
    figures = {"original": [0.9, 0.96, 0.99], "parent": [0.5, 0.6, 0.4], "mean": [0.5, 0.4, 0.45]}
    figures |= {"rebuilt": [0.7, 0.74, 0.75], "random": [0.52, 0.48, 0.5]}
    found = described(tmp_path / "better", {**figures, "alone": [0.9, 0.95, 0.98]})
    assert found.sentence.endswith(" has 0.943. So cutting each model alone is better.")
    found = described(tmp_path / "worse", {**figures, "alone": [0.5, 0.56, 0.55]})
    assert found.sentence.endswith(" has 0.537. Rebuilt models are nearer to the originals.")


def test_a_metric_of_which_less_is_better_is_understood(tmp_path: Path) -> None:
    figures = {"original": [0.1, 0.04, 0.01], "parent": [0.5, 0.6, 0.4], "mean": [0.5, 0.6, 0.55]}
    found = described(tmp_path, {**figures, "rebuilt": [0.15, 0.06, 0.09], "random": [0.52, 0.48, 0.5]})
    assert found.sentence.startswith("On 3 models")
    assert "recover 90 %" in found.sentence


def test_the_sentence_begins_with_the_controls_that_are_not_beaten(tmp_path: Path) -> None:
    """Here the mean is as good as anything; that it is a little better than the originals turns nothing round."""
    figures = {"original": [0.9, 0.96, 0.99], "parent": [0.9, 0.9, 0.99], "mean": [0.91, 0.96, 0.99]}
    found = described(tmp_path, {**figures, "rebuilt": [0.9, 0.94, 0.98], "random": [0.52, 0.48, 0.5]})
    assert found.sentence.startswith(
        "Rebuilt models are not clearly better than the mean alone or the parent alone (by two standard errors). On 3 models"
    )
    assert "The mean alone leaves no gap to recover." in found.sentence


def test_a_difference_within_its_noise_is_none(tmp_path: Path) -> None:
    figures = {"original": [0.9, 0.96, 0.99], "parent": [0.5, 0.6, 0.4], "mean": [0.5, 0.4, 0.45]}
    found = described(tmp_path, {**figures, "rebuilt": [0.85, 0.94, 0.91], "random": [0.1, 0.95, 0.9]})
    assert found.sentence.startswith(
        "Rebuilt models are not clearly better than a random basis (by two standard errors). On 3 models"
    )


PEFT_AND_TRANSFORMERS = "ignore:.*is_gradient_checkpointing.*:FutureWarning"


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Zoos of the nursery, made once."""
    pytest.importorskip("sklearn")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from eigenzoo import nursery

    made: dict[str, Path] = {}

    def make(kind: str, num_models: int) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("real") / kind
            nursery.make(kind, made[kind], num_models=num_models)
        return made[kind]

    return make


@pytest.mark.filterwarnings(PEFT_AND_TRANSFORMERS)
@pytest.mark.slow
def test_real_checkpoints(real: Callable[..., Path]) -> None:
    """All heads are one frozen head, so the parent alone guesses; so does the mean of unlike tasks; the subspace does not."""
    from eigenzoo import nursery

    folder = real("digits-vit", 12)
    found = ez.evaluate(ez.fit(folder, 8), nursery.accuracy, parent=folder / "_base")
    assert (found.heldout, found.num_models, found.num_fitted) == (True, 3, 9)
    for name, measured in found.models.items():
        assert measured.original == nursery.accuracy(folder / name)
    mean = found.mean
    assert mean.head_only is None
    assert mean.original is not None
    assert mean.original > 0.9
    for control in (mean.parent, mean.mean, mean.random_basis[8]):
        assert control is not None
        assert control < 0.75
        assert (mean.rebuilt[8] or 0) > control + 0.1
    assert found.sentence.startswith("On 3 models held out of a fit to 9, the average of accuracy is ")


@pytest.mark.filterwarnings(PEFT_AND_TRANSFORMERS)
@pytest.mark.slow
def test_real_adapters(real: Callable[..., Path]) -> None:
    """Loaded by PEFT: rebuilt from all directions they answer as the originals do, and with a zero update as their parent."""
    from eigenzoo import nursery

    folder = real("digits-lora", 10)
    zoo = ez.open_zoo(folder)
    found = ez.evaluate(ez.fit(zoo, 9), nursery.metric(folder), zoo.select(names=zoo.names[:2]))
    assert found.metric == "accuracy"
    assert not found.heldout
    for name, measured in found.models.items():
        (task,) = (model.metadata["adapter_model.safetensors"]["task"] for model in zoo.models if model.name == name)
        assert measured.parent == nursery.accuracy(folder / "_base", task=task)
        assert measured.head_only is None
        assert measured.rebuilt[9] == pytest.approx(measured.original, abs=ONE_IMAGE)
        assert (measured.mean or 1) < 0.75
        assert (measured.original or 0) > 0.85
