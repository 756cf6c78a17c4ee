"""The command `merge`: options that nothing would use, mistakes that users make, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import eigenzoo as ez
from builders import random_factors, write_adapter, write_model
from eigenzoo.errors import DataError, UsageError
from eigenzoo.merge.choosing import METHODS, choose

MODULES = {"a.q_proj": (12, 10), "b.q_proj": (12, 10)}
NAMES = ("m0", "m1", "m2")

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Three adapters, a base that folders skip, and a recipe."""
    for place, name in enumerate(NAMES):
        write_adapter(tmp_path / "zoo" / name, random_factors(MODULES, 2, place))
    write_model(tmp_path / "zoo" / "_base", {f"{module}.weight": torch.zeros(size) for module, size in MODULES.items()})
    (tmp_path / "zoo" / "zoo.json").write_text("{}")
    models = [f"_base+{tmp_path}/zoo/{name}" for name in NAMES]
    lines = ["merge_method: linear", "models:", *(f"- {{model: {each}, parameters: {{weight: 1}}}}" for each in models)]
    (tmp_path / "recipe.yml").write_text("\n".join(lines))
    return tmp_path / "zoo"


@pytest.fixture
def bundle(zoo: Path) -> Path:
    return ez.fit(zoo, axes=("outputs", "inputs"), rank=4).save(zoo.parent / "bundle")


def refused(call: Call, *words: object) -> str:
    code, out, err = call("merge", *words, "--quiet")
    assert code == 2, (code, out, err)
    assert "Traceback" not in err
    return " ".join(err.split())


@pytest.mark.parametrize(
    "option",
    [
        ("--method", "ties"),
        ("--weights", "1,1,1"),
        ("--scale", "2"),
        ("--space", "rows"),
        ("--keep", "0.3"),
        ("--semantics", "peft"),
        ("--base", "x"),
        ("--missing", "zero"),
        ("--metric", "m:f"),
        ("--parent", "x"),
        ("--grams", "x"),
        ("--picture", "x.png"),
    ],
)
def test_a_recipe_says_these_things_itself(zoo: Path, call: Call, option: tuple[str, str]) -> None:
    err = refused(call, "--recipe", zoo.parent / "recipe.yml", "--check", *option)
    assert f"{option[0]} beside --recipe" in err
    assert f"Leave out {option[0]}" in err


@pytest.mark.parametrize(
    "option",
    [
        ("--rank", "2"),
        ("--budget", "1MB"),
        ("--dtype", "float16"),
        ("--base", "x"),
        ("--parent", "x"),
        ("--heads", "first"),
        ("--missing", "zero"),
        ("--metric", "m:f"),
        ("--grams", "x"),
        ("--picture", "x.png"),
    ],
)
def test_models_of_a_bundle_have_no_use_for_these(bundle: Path, call: Call, option: tuple[str, str]) -> None:
    assert f"{option[0]} for models of a bundle" in refused(call, bundle, "m0", "m1", "--check", *option)


def test_options_that_the_chosen_way_does_not_use_are_refused(zoo: Path, call: Call) -> None:
    for option in ("--metric-arg", "--parent"):
        assert f"{option} without --metric" in refused(call, zoo, "--check", option, "x")
    for option, value in (("--weights", "1,1,1"), ("--scale", "2")):
        assert f"{option} beside --metric" in refused(call, zoo, "--check", "--metric", "m:f", option, value)
    err = refused(call, zoo, "--check", "--method", "mean", "--space", "rows")
    assert "method mean: space 'rows'" in err
    assert "ties" in err
    with pytest.raises(UsageError, match=r"method tsv: space 'full'.*It has no choice of a space"):
        ez.merge(zoo, "tsv", space="full")
    with pytest.raises(UsageError, match=r"method mean: moments of inputs.*Only regmean uses them"):
        ez.merge(zoo, "mean", grams={"m0": {}})
    space = ez.fit(zoo, axes=("outputs", "inputs"), rank=4)
    with pytest.raises(UsageError, match="rank '2' for models of a bundle"):
        ez.merge((space, ["m0", "m1"]), rank=2)
    with pytest.raises(UsageError, match="'m0' is named twice"):
        ez.merge((space, ["m0", "m0"]))


def test_numbers_of_models_are_counted_before_any_work(zoo: Path) -> None:
    for method in ("ties", "dare_linear", "breadcrumbs"):
        with pytest.raises(UsageError, match=f"method {method}: keep has 2 values for 3 models"):
            ez.merge(zoo, method, keep=(0.3, 0.5))
    with pytest.raises(UsageError, match=r"the weights are 1.*one number per model"):
        ez.merge(zoo, "linear", weights=1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the weights are '1,1,1'"):
        ez.merge(zoo, "linear", weights="1,1,1")  # type: ignore[arg-type]


def test_wrong_forms_of_a_metric_are_explained(zoo: Path) -> None:
    opened = ez.open_zoo(zoo)
    with pytest.raises(
        UsageError, match=r"cannot be called with a path and a part.*def .*\(path, part\).*--metric-arg"
    ):
        choose(opened, lambda path: 1.0, methods=["mean"])  # type: ignore[arg-type,misc]

    def broken(path: Path, part: str) -> float:
        raise KeyError("labels")

    with pytest.raises(UsageError, match="the metric failed with KeyError: 'labels'"):
        choose(opened, broken, methods=["mean"])

    def leaving(path: Path, part: str) -> float:
        raise SystemExit(3)

    with pytest.raises(UsageError, match="the metric failed with SystemExit"):
        choose(opened, leaving, methods=["mean"])
    with pytest.raises(DataError, match="the metric returned all: None"):
        choose(opened, lambda path, part: None, methods=["mean"])  # type: ignore[arg-type,return-value]


def test_one_merge_is_tried_once_and_ties_go_to_the_size_of_the_mean(zoo: Path) -> None:
    opened = ez.open_zoo(zoo)
    chosen = choose(opened, lambda path, part: 1.0, methods=["mean", "task_arithmetic", "linear"])
    assert {each.method for each in chosen.tried} == {"task_arithmetic"}
    assert chosen.best.scale == pytest.approx(1 / 3)
    assert any(each.weights for each in chosen.tried)
    only = choose(opened, lambda path, part: 1.0, methods=["mean"])
    assert (only.best.method, only.best.scale) == ("mean", pytest.approx(1.0))
    assert "mean" not in METHODS


def test_an_option_goes_to_the_methods_that_have_it(zoo: Path) -> None:
    opened = ez.open_zoo(zoo)
    chosen = choose(opened, lambda path, part: 1.0, methods=["mean", "ties"], keep=0.5, space="rows")
    assert {each.method for each in chosen.tried} == {"mean", "ties"}
    with pytest.raises(UsageError, match="none of the methods mean, tsv has the option 'keep'"):
        choose(opened, lambda path, part: 1.0, methods=["mean", "tsv"], keep=0.5)


def test_what_was_not_measured_is_said(zoo: Path) -> None:
    opened = ez.open_zoo(zoo)
    chosen = choose(opened, lambda path, part: {"m0": 1.0, "other": 2.0}, methods=["mean"])
    assert any("the base was not measured" in note and "--parent" in note for note in chosen.notes)
    assert any("no model is called 'other'" in note for note in chosen.notes)
    assert chosen.to_dict()["notes"] == list(chosen.notes)
    whole = choose(opened, lambda path, part: dict.fromkeys(NAMES, 1.0), methods=["mean"], parent=zoo / "_base")
    assert whole.notes == ()
    with pytest.raises(UsageError, match=r"is an adapter.*the model without an update"):
        choose(opened, lambda path, part: 1.0, methods=["mean"], parent=zoo / "m1")


def test_what_is_no_model_of_adapters_is_explained(zoo: Path, bundle: Path, call: Call) -> None:
    assert f"eigenzoo merge {bundle} NAME NAME" in refused(call, bundle, "-o", zoo.parent / "x")
    err = refused(call, bundle, "zoo/m0", "m1", "--check")
    assert "Write m0" in err
    assert "mean 'zoo" not in err
    assert "--weights 1,1" in refused(
        call, zoo / "m0", zoo / "m1", "--method", "linear", "--check", "--weights", "1", "1"
    )
    assert "is named twice" in refused(call, zoo / "m0", zoo / "m1", f"{zoo / 'm0'}/", "--check")
    assert "Adapters are read without it" in refused(call, zoo, "--base", zoo / "_base", "--check")
    err = refused(call, *sorted(zoo.iterdir()), "--check")
    assert f"name the folder {zoo}" in err
    err = refused(call, zoo / "_base", zoo / "m0", "--check")
    assert f"name the folder {zoo}" in err
    assert "begin its folder" not in err
    err = refused(call, zoo, "--method", "regmean", "--grams", zoo.parent / "nowhere", "--check")
    assert "nowhere: there is no such folder" in err
    assert "x.jpg" in (err := refused(call, zoo, "--check", "--picture", "x.jpg"))
    assert ".png or .svg" in err


def test_a_recipe_of_plain_adapters_says_how_to_write_them(zoo: Path, call: Call) -> None:
    recipe = zoo.parent / "plain.yml"
    models = "".join(f"- {{model: {zoo / name}, parameters: {{weight: 1}}}}\n" for name in NAMES)
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {zoo / '_base'}\nmodels:\n{models}")
    err = refused(call, "--recipe", recipe, "--check")
    assert f"model: {zoo / '_base'}+{zoo / 'm0'}" in err
    assert "view" not in err


def test_figures_are_explained(zoo: Path, bundle: Path, call: Call) -> None:
    code, text, _ = call("merge", zoo, "--check", "--rank", "0.9", "--quiet")
    text = " ".join(text.split())
    assert code == 0
    assert "% of its energy" in text
    assert "a plain mean of 3 unrelated models of one size keeps 33.3 %" in text
    code, text, _ = call("merge", bundle, "m0", "m1", "--check", "--quiet")
    text = " ".join(text.split())
    assert code == 0
    assert "rebuilt models" in text
    assert "interference: not measured" in text
    code, text, _ = call("merge", zoo, "--check", "--rank", "1", "--json")
    document = json.loads(text)
    layers = document["layers"].values()
    assert all(0 < layer["spectral"] < 1 for layer in layers)
    assert max(layer["spectral"] for layer in layers) >= document["loss"]["spectral"] > 0


def test_a_metric_that_prints_does_not_print_into_the_document(
    zoo: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (zoo.parent / "printing_metric.py").write_text("def score(path, part):\n    print('noise')\n    return 1.0\n")
    monkeypatch.syspath_prepend(zoo.parent)
    code, text, err = call("merge", zoo, "--check", "--metric", "printing_metric:score", "--method", "mean", "--json")
    assert code == 0, err
    assert json.loads(text)["chosen"]["best"]["method"] == "mean"
    assert "noise" in err
