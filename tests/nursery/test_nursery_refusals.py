from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from eigenzoo.errors import FormatError, MismatchError, OutputError, UsageError
from eigenzoo.nursery import accuracy, make, metric
from eigenzoo.nursery.making import make_zoo

Hasty = Callable[..., Any]
Planner = Callable[..., Any]
TASK = "5-against-5:0,1,2,3,4"


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("digits-mlp", {}, "no zoo of kind 'digits-mlp'. The kinds are digits-vit, digits-lora, digits-cnn"),
        ("digits-vit", {"num_models": 127}, "digits-vit: 127 models are not possible.*126 ways.*1 to 126"),
        ("digits-cnn", {"num_models": 0}, "digits-cnn: 0 models are not possible"),
        ("digits-cnn", {"seed": -1}, "seed -1. A seed is a whole number"),
        ("digits-lora", {"train_head": True}, "digits-lora: no such option: train_head. Its adapters hold LoRA"),
        ("digits-cnn", {"train_head": True}, "digits-cnn: no such option: train_head. It trains all weights"),
        ("digits-vit", {"own_init": True}, "digits-vit: no such option: own_init. Its models are fine-tunes"),
        ("digits-vit", {"permuted": True}, "digits-vit: no such option: permuted.*only digits-cnn"),
        ("digits-lora", {"permuted": True}, "digits-lora: no such option: permuted.*only digits-cnn"),
        (
            "digits-cnn",
            {"same_task": True, "num_models": 127},
            "127 models are not possible. A zoo has 126 seeds.*1 to 126",
        ),
        ("digits-cnn", {"same_task": True, "random_labels": True}, "same_task and random_labels exclude each other"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_training(
    tmp_path: Path, kind: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        make(kind, tmp_path / "zoo", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_path_is_kept(tmp_path: Path) -> None:
    (tmp_path / "zoo").write_text("mine")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        make("digits-cnn", tmp_path / "zoo")
    with pytest.raises(OutputError, match="is not a folder"):
        make("digits-cnn", tmp_path / "zoo", force=True)
    assert (tmp_path / "zoo").read_text() == "mine"


def test_force_does_not_delete_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        OutputError, match=r"has no record \(\.eigenzoo-output\.json\) of the files that eigenzoo wrote"
    ):
        make("digits-cnn", tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_force_replaces_a_zoo_and_progress_is_told(tmp_path: Path, hasty_plan: Planner) -> None:
    told: list[tuple[str, int, int]] = []
    make_zoo(hasty_plan("digits-cnn", steps=3), tmp_path / "zoo", False, None)
    recipe = make_zoo(
        hasty_plan("digits-cnn", steps=3, num_models=2, seed=9), tmp_path / "zoo", True, lambda *step: told.append(step)
    )
    assert {path.stem for path in (tmp_path / "zoo").iterdir()} == {"zoo", ".eigenzoo-output", *recipe.models}
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]
    assert told == [("models", 0, 2), ("models", 1, 2), ("models", 2, 2)]


def test_a_zoo_that_is_interrupted_leaves_nothing(tmp_path: Path, hasty_plan: Planner) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done == total:
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt("stopped by hand")

    with pytest.raises(KeyboardInterrupt, match="stopped by hand"):
        make_zoo(hasty_plan("digits-cnn", steps=3), tmp_path / "zoo", False, interrupt)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (lambda: make("digits-cnn", tmp_path / "zoo"), lambda: accuracy(tmp_path)):
        with pytest.raises(
            UsageError, match=r"not installed: peft. In eigenzoo's checkout run: pip install .* '\.\[nursery\]'"
        ):
            call()


def test_importing_the_package_imports_no_heavy_library() -> None:
    script = "import sys, eigenzoo.nursery; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "'eigenzoo.nursery'" in loaded
    assert not any(f"'{library}'" in loaded for library in ("sklearn", "transformers", "peft"))


def test_a_model_without_a_task_needs_one(hasty: Hasty, tmp_path: Path) -> None:
    zoo = hasty("digits-cnn")
    path = zoo.model(next(iter(zoo.recipe.models)))
    save_file(load_file(path), tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match=r"the file's metadata has no task.*Pass task="):
        accuracy(tmp_path / "bare.safetensors")
    assert accuracy(tmp_path / "bare.safetensors", task=TASK) > 0
    with pytest.raises(UsageError, match="'evens' is not a task"):
        accuracy(path, task="evens")


@pytest.mark.slow
def test_an_adapter_without_its_parent_needs_one(hasty: Hasty, tmp_path: Path) -> None:
    zoo = hasty("digits-lora")
    alone = shutil.copytree(zoo.folder / next(iter(zoo.recipe.models)), tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"parent '../_base' does not exist.*Pass base=.*nursery.metric\(zoo\)"):
        accuracy(alone)


def test_a_metric_is_bound_to_a_zoo_only(hasty: Hasty, tmp_path: Path) -> None:
    zoo = hasty("digits-lora")
    for folder in (tmp_path, tmp_path / "nothing", zoo.folder / "_base"):
        with pytest.raises(UsageError, match=r"this is not a zoo of the nursery.*zoo.json"):
            metric(folder)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="0 safetensors files instead of one model"):
        accuracy(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(FormatError, match="not a safetensors file"):
        accuracy(tmp_path, task=TASK)


@pytest.mark.parametrize("kind", ["digits-vit", "digits-lora", "digits-cnn"])
def test_a_model_with_a_weight_missing_is_not_filled_at_random(hasty: Hasty, tmp_path: Path, kind: str) -> None:
    zoo = hasty(kind)
    source = zoo.model(next(iter(zoo.recipe.models)))
    copy = tmp_path / source.name
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    file = next(copy.glob("*.safetensors")) if copy.is_dir() else copy
    weights = load_file(file)
    del weights[sorted(weights)[3]]
    save_file(dict(weights), file, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"this model is incomplete|missing or too many|not the weights of"):
        accuracy(copy, task=TASK, base=zoo.folder / "_base" if kind == "digits-lora" else None)


def test_recipes_name_no_path_of_this_machine(hasty: Hasty) -> None:
    for kind in ("digits-vit", "digits-lora", "digits-cnn"):
        zoo = hasty(kind)
        for path in zoo.folder.rglob("*"):
            if path.suffix in (".json", ".md"):
                assert str(zoo.folder.parent) not in path.read_text(), path
        assert set(json.loads((zoo.folder / "zoo.json").read_text())["versions"]) >= {"torch", "transformers", "peft"}
