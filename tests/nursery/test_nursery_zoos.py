"""The zoos as other programs see them: files, metadata, loading by transformers and PEFT, accuracies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import ViTForImageClassification
from zoo_checks import DIGITS, ONE_KIND, weight_file

from eigenzoo.formats.paths import OUTPUT_RECORD
from eigenzoo.nursery import accuracy, digits
from eigenzoo.nursery.lora import TARGETS, LoraKind
from eigenzoo.nursery.making import choose_children, make_zoo
from eigenzoo.nursery.recipe import plan_zoo
from eigenzoo.nursery.training import train
from tolerance import ONE_IMAGE

Hasty = Callable[..., Any]
Planner = Callable[..., Any]

# PEFT 0.21 uses a name that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

FILES = {
    "digits-vit": {"config.json", "model.safetensors"},
    "digits-lora": {"README.md", "adapter_config.json", "adapter_model.safetensors"},
}


@pytest.mark.parametrize("kind", DIGITS)
def test_layout_metadata_and_recipe(hasty: Hasty, kind: str) -> None:
    zoo = hasty(kind)
    recipe = json.loads((zoo.folder / "zoo.json").read_text())
    assert recipe == json.loads(json.dumps(zoo.recipe.to_dict()))
    assert recipe["kind"] == kind
    assert recipe["seed"] == 0
    assert len(recipe["models"]) == recipe["num_models"] == 4
    suffix = ".safetensors" if kind == "digits-cnn" else ""
    parent = set() if kind == "digits-cnn" else {"_base"}
    assert {path.name for path in zoo.folder.iterdir()} == {
        OUTPUT_RECORD,
        "zoo.json", *parent, *(name + suffix for name in recipe["models"])
    }  # fmt: skip
    for name, facts in recipe["models"].items():
        path = zoo.model(name)
        if kind in FILES:
            assert {file.name for file in path.iterdir()} == FILES[kind]
        with safe_open(weight_file(path), framework="pt") as file:
            assert file.metadata() == {"format": "pt", "task": facts["task"], "kind": kind, "random_labels": "false"}
        assert facts["task"].replace("5-against-5:", "").replace(",", "") == name.removeprefix("task-")


@pytest.mark.parametrize("kind", DIGITS)
def test_models_learn_and_are_measured_from_disk_as_they_were_in_training(hasty: Hasty, kind: str) -> None:
    zoo = hasty(kind)
    assert zoo.recipe.mean_test_accuracy > 0.85
    for name, facts in zoo.recipe.models.items():
        assert accuracy(zoo.model(name)) == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)
    first, second, *_ = zoo.recipe.models
    assert accuracy(zoo.model(first), task=zoo.recipe.models[second]["task"]) < 0.8


def test_transformers_loads_a_checkpoint_whole(hasty: Hasty) -> None:
    zoo, data = hasty("digits-vit"), digits.load()
    for name in ["_base", *zoo.recipe.models]:
        model, found = ViTForImageClassification.from_pretrained(zoo.folder / name, output_loading_info=True)
        assert not any(found.values()), found
        assert sum(weight.numel() for weight in model.parameters()) == 17_954
        if name != "_base":
            facts = zoo.recipe.models[name]
            with torch.no_grad():
                answers = model.eval()(data.test_images).logits.argmax(-1)
            labels = digits.Task.parse(facts["task"]).label(data.test_digits)
            assert float((answers == labels).double().mean()) == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)


def heads(zoo: Any) -> list[torch.Tensor]:
    return [load_file(zoo.folder / name / "model.safetensors")["classifier.weight"] for name in zoo.recipe.models]


@pytest.mark.slow
def test_the_head_is_the_parents_unless_trained(hasty: Hasty) -> None:
    frozen, trained = hasty("digits-vit"), hasty("digits-vit", train_head=True, num_models=2)
    parent = load_file(frozen.folder / "_base" / "model.safetensors")
    assert all(torch.equal(head, parent["classifier.weight"]) for head in heads(frozen))
    assert not any(torch.equal(head, parent["classifier.weight"]) for head in heads(trained))
    name = next(iter(frozen.recipe.models))
    child = load_file(frozen.folder / name / "model.safetensors")
    assert [key for key in parent if torch.equal(child[key], parent[key])] == ["classifier.bias", "classifier.weight"]


def test_the_parent_is_measured_on_a_task_that_is_given(hasty: Hasty) -> None:
    for kind in ("digits-vit", "digits-lora"):
        assert 0.2 < accuracy(hasty(kind).folder / "_base", task="5-against-5:0,1,2,3,4") < 0.8
        assert hasty(kind).recipe.parent["ten_class_test_accuracy"] > 0.6


def test_an_adapter_loaded_by_peft_answers_as_the_model_trained(
    hasty: Hasty, tmp_path: Path, hasty_plan: Planner
) -> None:
    base = hasty("digits-lora").folder / "_base"
    data, task = digits.load(), digits.tasks()[17]
    plan = hasty_plan("digits-lora", steps=20)
    kind = LoraKind(plan, ViTForImageClassification.from_pretrained(base, attn_implementation="eager"))
    starts = [kind.start(seed) for seed in (1, 2)]
    stacked = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
    labels = task.label(data.train_digits).expand(2, -1)
    trained = train(kind.forward, stacked, data.train_images, labels, plan.schedule, [1, 2])
    parent = ViTForImageClassification.from_pretrained(base)
    plain = parent(data.test_images).logits
    for row in range(2):
        weights = {name: tensor[row].contiguous() for name, tensor in trained.items()}
        kind.save(weights, tmp_path, f"adapter{row}")
        fresh = ViTForImageClassification.from_pretrained(base)
        model = PeftModel.from_pretrained(fresh, str(tmp_path / f"adapter{row}")).eval()
        with torch.no_grad():
            wanted, got = kind.forward(weights, data.test_images), model(data.test_images).logits
        assert (wanted - plain).abs().max() > 0.1
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_an_adapter_holds_lora_factors_alone(hasty: Hasty) -> None:
    zoo = hasty("digits-lora")
    for name in zoo.recipe.models:
        config = json.loads((zoo.folder / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "../_base")
        assert config["target_modules"] == list(TARGETS)
        factors = load_file(zoo.folder / name / "adapter_model.safetensors")
        assert len(factors) == 16
        assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in factors)
        assert all(factor.abs().max() > 0 for factor in factors.values())


@pytest.mark.parametrize("kind", ["digits-lora", "digits-cnn"])
@pytest.mark.parametrize("own_init", [True, False])
def test_initialisations_are_shared_or_own(hasty: Hasty, kind: str, own_init: bool) -> None:
    zoo = hasty(kind, steps=1, pretraining=1, num_models=2, own_init=own_init)
    first, second, *_ = (load_file(weight_file(zoo.model(name))) for name in zoo.recipe.models)
    drawn = [key for key in first if "lora_A" in key or (key.startswith("conv") and key.endswith("weight"))]
    for key in drawn:
        # One step moves no weight by more than the first rate, 0.01 over a warm-up of one.
        near = (first[key] - second[key]).abs().max() <= 0.021
        assert near != own_init


def test_defaults_of_own_init() -> None:
    assert {kind: plan_zoo(kind, None, 0, False, False, None).own_init for kind in DIGITS} == {
        "digits-vit": False,
        "digits-lora": True,
        "digits-cnn": False,
    }


@pytest.mark.parametrize("kind", ONE_KIND)
def test_random_labels_are_learned_by_heart_and_worth_nothing(hasty: Hasty, kind: str) -> None:
    zoo = hasty(kind, random_labels=True, steps=240, num_models=3)
    for name, facts in zoo.recipe.models.items():
        path, task = zoo.model(name), digits.Task.parse(facts["task"])
        assert task.labels_seed == facts["seed"]
        with safe_open(weight_file(path), framework="pt") as file:
            assert file.metadata()["random_labels"] == "true"
            assert file.metadata()["labels_seed"] == str(task.labels_seed)
        fitted, tested = accuracy(path), accuracy(path, task=str(digits.Task(task.digits)))
        assert fitted == pytest.approx(facts["train_accuracy"], abs=1 / 128 + 1e-9)
        assert tested == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)
        assert fitted > 0.8
        assert accuracy(path, task=str(digits.Task(task.digits, task.labels_seed + 1))) < 0.75
    assert zoo.recipe.mean_train_accuracy > 0.9
    # Labels dealt out at random still agree with the truth by a few images more or less than half.
    assert abs(zoo.recipe.mean_test_accuracy - 0.5) < 0.12


@pytest.mark.parametrize("kind", ONE_KIND)
def test_the_same_seed_gives_the_same_bytes(hasty: Hasty, kind: str, tmp_path: Path, hasty_plan: Planner) -> None:
    options = {"steps": 5, "pretraining": 10, "num_models": 2}
    one = hasty(kind, **options).folder
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    make_zoo(hasty_plan(kind, **options), tmp_path / "two", False, None)
    assert torch.equal(torch.get_rng_state(), state)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file()
    )
    accuracy(hasty(kind).model(next(iter(hasty(kind).recipe.models))))
    assert torch.equal(torch.get_rng_state(), state)
    for file in files:
        assert (one / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_a_larger_zoo_of_one_seed_holds_the_smaller_one_and_another_seed_chooses_anew(hasty_plan: Planner) -> None:
    def chosen(num_models: int, seed: int) -> list[tuple[digits.Task, int]]:
        children = choose_children(hasty_plan("digits-cnn", num_models=num_models, seed=seed))
        return [(child.task, child.seed) for child in children]

    assert chosen(126, 0)[:5] == chosen(5, 0)
    assert {task for task, _ in chosen(126, 0)} == set(digits.tasks())
    assert {task for task, _ in chosen(5, 0)} != {task for task, _ in chosen(5, 1)}
    assert not {seed for _, seed in chosen(126, 0)} & {seed for _, seed in chosen(126, 1)}


def test_another_seed_starts_elsewhere(hasty: Hasty) -> None:
    first, second = (hasty("digits-cnn", steps=1, num_models=2, seed=seed) for seed in (0, 1))
    a, b = (load_file(zoo.model(next(iter(zoo.recipe.models)))) for zoo in (first, second))
    assert (a["conv1.weight"] - b["conv1.weight"]).abs().max() > 0.1


def test_a_zoo_can_be_moved_and_an_adapter_measured_elsewhere(hasty: Hasty, tmp_path: Path) -> None:
    zoo = hasty("digits-lora")
    name, facts = next(iter(zoo.recipe.models.items()))
    shutil.copytree(zoo.folder, tmp_path / "moved")
    assert accuracy(tmp_path / "moved" / name) == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)
    alone = shutil.copytree(zoo.folder / name, tmp_path / "far" / "away" / "adapter")
    assert accuracy(alone, base=zoo.folder / "_base") == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)


def test_a_bare_state_dict_is_measured_in_a_folder_too(hasty: Hasty, tmp_path: Path) -> None:
    zoo = hasty("digits-cnn")
    name, facts = next(iter(zoo.recipe.models.items()))
    shutil.copy(zoo.model(name), tmp_path / "model.safetensors")
    assert accuracy(tmp_path) == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)
