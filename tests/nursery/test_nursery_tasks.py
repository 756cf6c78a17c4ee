"""`digits-tasks`: tasks that one network can do at once, each with its own frozen head."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zoo_checks import weight_file

import eigenzoo as ez
from eigenzoo.errors import FormatError, UsageError
from eigenzoo.merge.choosing import choose
from eigenzoo.nursery import accuracy, arranged, digits, metric, tasks_metric
from eigenzoo.nursery.recipe import plan_zoo
from tolerance import ONE_IMAGE

Hasty = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(params=[False, True], ids=["adapters", "fine-tunes"])
def zoo(hasty: Hasty, request: pytest.FixtureRequest) -> Any:
    return hasty("digits-tasks", num_models=3, full=request.param)


def test_a_task_moves_six_patches_and_loses_nothing() -> None:
    task, images = arranged.Task(5), digits.load().test_images
    assert int((task.order != torch.arange(16)).sum()) == arranged.NUM_MOVED
    moved = arranged.arrange(images, task.order)
    assert not torch.equal(moved, images)
    assert torch.equal(arranged.arrange(moved, task.order.argsort()), images)
    assert torch.equal(arranged.arrange(images, torch.arange(16)), images)
    # The first patch of the arranged image is the patch that stands first in the order, pixel by pixel.
    row, column = divmod(int(task.order[0]), 4)
    assert torch.equal(moved[:, :, :2, :2], images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2])


def test_models_are_measured_from_disk_as_they_were_in_training(zoo: Any) -> None:
    measure = metric(zoo.folder)
    for name, facts in zoo.recipe.models.items():
        assert facts["task"] == f"arranged:{int(name.removeprefix('task-'))}"
        assert measure(zoo.model(name)) == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)
        assert accuracy(zoo.model(name)) == measure(zoo.model(name))


def test_heads_are_frozen_and_lie_beside_the_parent(zoo: Any) -> None:
    """All models have the parent's head of zeros, or none: the tasks' heads are in one file."""
    for name in zoo.recipe.models:
        heads = [values for key, values in load_file(weight_file(zoo.model(name))).items() if "classifier" in key]
        assert not any(bool(values.any()) for values in heads)
    found = arranged.read_heads(zoo.folder / "_base")
    assert sorted(task.name for task in arranged.tasks_of(found)) == sorted(zoo.recipe.models)
    assert all(bool(values.any()) for values in found.values())


def test_every_task_is_asked_of_a_merged_model(zoo: Any, tmp_path: Path) -> None:
    measure = tasks_metric(zoo.folder)
    names = sorted(zoo.recipe.models)
    of_one = measure(zoo.model(names[0]), "test")
    assert sorted(of_one) == names
    assert of_one[names[0]] == pytest.approx(zoo.recipe.models[names[0]]["test_accuracy"], abs=ONE_IMAGE)
    assert max(of_one[name] for name in names[1:]) < of_one[names[0]]
    base = zoo.folder / "_base" if zoo.recipe.plan.full else None
    models = [zoo.model(name) for name in names]
    merged = ez.merge(models, base=base).save(tmp_path / "merged")
    scores = pickle.loads(pickle.dumps(measure))(merged, "validation")
    assert sorted(scores) == names
    assert min(scores.values()) > 0.3  # chance is 0.1


def test_parts_of_the_data_are_disjoint() -> None:
    data = arranged.ArrangedData(digits.load())
    task = arranged.Task(1)
    parts = [data.training_set(task)[0], data.part("validation")[0], data.part("test")[0]]
    assert [len(part) for part in parts] == [1047, 250, 500]
    assert torch.equal(torch.cat(parts[:2]), digits.load().train_images)


def test_a_joint_model_learns_all_tasks(hasty: Hasty, hasty_plan: Callable[..., Any]) -> None:
    zoo = hasty("digits-tasks", num_models=3, full=False)
    plan = hasty_plan("digits-tasks", num_models=3)
    from transformers import ViTForImageClassification

    parent = ViTForImageClassification.from_pretrained(zoo.folder / "_base")
    heads = arranged.read_heads(zoo.folder / "_base")
    before = arranged.accuracies(parent.eval(), heads, arranged.tasks_of(heads), "test")
    kind, weights = arranged.train_joint(plan, parent.eval(), heads, arranged.tasks_of(heads))
    images, labels = arranged.ArrangedData(digits.load()).part("test")
    for task in arranged.tasks_of(heads):
        with torch.no_grad():
            answers = kind.forward({**weights, **kind.frozen(task)}, images).argmax(-1)
        assert float((answers == labels).double().mean()) > before[task.name]


def test_what_is_not_possible_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"digits-lora: no such option: full\. Only digits-tasks has both"):
        plan_zoo("digits-lora", None, 0, False, False, None, full=True)
    with pytest.raises(UsageError, match=r"'arranged:x' is not a task\. A task is written like 'arranged:7'"):
        arranged.Task.parse("arranged:x")
    with pytest.raises(FormatError, match=r"has no heads.json"):
        arranged.read_heads(tmp_path)
    (tmp_path / "heads.json").write_text(json.dumps({"task-001.weight": [[1.0]]}))
    with pytest.raises(FormatError, match=r"head 'task-001.weight' has shape \[1, 1\]"):
        arranged.read_heads(tmp_path)
    with pytest.raises(UsageError, match="this is not a zoo of the nursery"):
        tasks_metric(tmp_path)


def test_merging_networks_of_own_starts_does_not_pay(hasty: Hasty) -> None:
    """Trained from starts of their own, on tasks of their own: their mean is no better than chance at any of them."""
    zoo = hasty("digits-cnn", own_init=True)
    tasks = {name: facts["task"] for name, facts in zoo.recipe.models.items()}

    def measure(path: Path, part: str) -> dict[str, float]:
        return {name: accuracy(path, task=task) for name, task in tasks.items()}

    chosen = choose(ez.open_zoo(zoo.folder), measure, methods=["mean", "karcher"])
    assert chosen.verdict == "merging-does-not-pay"
    assert "merging does not pay: merged" in chosen.text
    assert chosen.controls["own"].mean > 0.8
    assert chosen.controls["merged"].mean < 0.65
