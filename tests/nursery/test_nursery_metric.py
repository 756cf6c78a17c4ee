"""The nursery's metric on models that eigenzoo rebuilt into folders far from their zoo."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zoo_checks import DIGITS, weight_file

import eigenzoo as ez
from eigenzoo.errors import UsageError
from eigenzoo.nursery import accuracy, metric
from tolerance import ONE_IMAGE

Hasty = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("kind", DIGITS)
def test_a_rebuilt_model_is_measured_wherever_it_lies(hasty: Hasty, kind: str, tmp_path: Path) -> None:
    zoo = hasty(kind)
    # Of four models three directions are all there are: what is rebuilt is the model.
    space, measure = ez.fit(zoo.folder, rank=3), metric(zoo.folder)
    assert sorted(space.names) == sorted(zoo.recipe.models)
    of_the_mean = []
    for name, facts in zoo.recipe.models.items():
        whole = space.rebuild(name).save(tmp_path / "whole" / name)
        mean = space.rebuild(name, mean_only=True).save(tmp_path / "mean" / name)
        assert measure(zoo.model(name)) == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)
        assert measure(whole) == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)
        of_the_mean.append(measure(mean))
        if kind != "digits-lora":
            assert accuracy(whole) == measure(whole)
            assert accuracy(weight_file(whole)) == measure(whole)
    assert sum(of_the_mean) / len(of_the_mean) < zoo.recipe.mean_test_accuracy - 0.1


def test_an_adapter_rebuilt_far_from_its_zoo_needs_the_metric_and_one_beside_it_does_not(
    hasty: Hasty, tmp_path: Path
) -> None:
    zoo = hasty("digits-lora")
    name = next(iter(zoo.recipe.models))
    folder = shutil.copytree(zoo.folder, tmp_path / "zoo")
    rebuilt = ez.fit(folder, rank=2).rebuild(name)
    far, near = rebuilt.save(tmp_path / "far" / "away"), rebuilt.save(folder / "_rebuilt")
    with pytest.raises(
        UsageError,
        match=r"'../_base' does not exist.*nursery\.metric\(zoo\).*--metric eigenzoo\.nursery:metric --metric-arg ZOO",
    ):
        accuracy(far)
    assert accuracy(near) == metric(folder)(far) == accuracy(far, base=folder / "_base")


def test_a_metric_outlives_the_working_folder_and_a_pickle(
    hasty: Hasty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = hasty("digits-lora")
    name = next(iter(zoo.recipe.models))
    far = ez.fit(zoo.folder, rank=2).rebuild(name).save(tmp_path / "far")
    monkeypatch.chdir(zoo.folder.parent)
    measure = metric(zoo.folder.name)
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(measure))("far") == measure(far) == metric(zoo.folder)(far)
