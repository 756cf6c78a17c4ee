"""`ez.evaluate`: which models are measured, what the metric is given, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from function_zoos import SHAPES, Recorder, assert_close, dense, write_zoo, zoo_with_heads
from safetensors import safe_open
from safetensors.torch import save_file

import eigenzoo as ez
from builders import (
    edit_model,
    random_stack,
    write_model,
    write_stacks,
)
from eigenzoo.evidence.refit import hold_out
from eigenzoo.passes.workers import local_workers
from eigenzoo.subspace.fitting.options import FitOptions, recorded_options


def test_originals_are_measured_where_they_lie_and_all_else_is_gone_afterwards(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    before = {path: (path / "model.safetensors").read_bytes() for path in paths}
    metric = Recorder()
    found = ez.evaluate(ez.fit(paths[:5], 2), metric, paths[5:7])
    for path in paths[5:7]:
        assert metric.paths[int(found.models[path.name].original or 0)] == path
    assert {path.name for path in metric.paths} == {"m5", "m6"}
    assert [path for path in metric.paths if path.exists()] == paths[5:7]
    assert before == {path: (path / "model.safetensors").read_bytes() for path in paths}


def test_files_are_measured_as_files_with_their_own_metadata(tmp_path: Path) -> None:
    stack = random_stack(5, (4, 3), 0)
    for place in range(5):
        save_file({"w.weight": stack[place]}, tmp_path / f"m{place}.safetensors", {"format": "pt", "task": f"t{place}"})
    tasks = []

    def metric(path: Path) -> float:
        assert path.name == "m4.safetensors"
        with safe_open(path, "pt") as file:
            tasks.append(file.metadata()["task"])
        return 0.0

    ez.evaluate(
        ez.fit([tmp_path / f"m{place}.safetensors" for place in range(4)], 2), metric, tmp_path / "m4.safetensors"
    )
    assert set(tasks) == {"t4"}
    assert len(tasks) == 7, "six variants, and cut alone to rank 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, r"device 'gpu'\. Devices are cpu, cuda"),
        ({"max_memory": 1}, "1 bytes of memory"),
        ({"max_memory": 2**30, "workers": "open"}, r"max_memory 1,073,741,824 does not apply to open workers"),
    ],
)
def test_where_to_run_is_checked_beside_models_too(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space, metric = ez.fit(paths[:5], 2), Recorder()
    with local_workers(num=1) as workers, pytest.raises(ez.UsageError, match=message):
        ez.evaluate(space, metric, paths[5:7], **{**options, **({"workers": workers} if "workers" in options else {})})
    assert not metric.paths


def test_without_models_a_fifth_is_held_out_of_a_second_fit(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space, metric = ez.fit(paths, len(paths) - 1, dtype="float64"), Recorder()
    found = ez.evaluate(space, metric, seed=1)
    assert found.heldout
    assert (found.num_models, found.num_fitted) == (3, 12)
    assert found.ranks == (1, 2, 4, 8, 11)
    fitted = [path for path in paths if path.name not in found.models]
    for name, measured in found.models.items():
        assert metric.paths[int(measured.original or 0)] == (tmp_path / name).resolve()
        for layer in SHAPES:
            assert_close(metric.of(measured.mean)[layer], dense(fitted, layer, "weight").mean(0))
            assert torch.equal(metric.of(measured.original)[layer], dense([tmp_path / name], layer, "weight")[0])
    assert set(ez.evaluate(space, Recorder(), seed=2).models) != set(found.models)
    assert set(ez.evaluate(space, Recorder(), seed=1).models) == set(found.models)


REFITS: list[dict[str, Any]] = [
    {"rank": {"outputs": 3, "models": 6}},
    {"max_error": 0.2},
    {"budget": 30_000},
    {"rank": 0.8, "center": "none", "dtype": "float32"},
    {"rank": {"outputs": 2}, "solver": "sketch", "precision": "high"},
    {"rank": 3, "precision": "fast"},
    {"rank": 3, "coefficients_dtype": "bfloat16"},
]


def test_the_cases_change_every_option_once() -> None:
    """A new option of a fit needs a case here: else nothing shows that the second fit has it."""
    usual = {"rank": "auto", "center": "models", "dtype": "float32", "budget": None, "max_error": None, "seed": 0}
    usual |= {"solver": "exact", "precision": "default", "coefficients_dtype": "float32"}
    changed = {
        key for case in REFITS for key, value in {"dtype": "float64", "seed": 5, **case}.items() if value != usual[key]
    }
    names = {"rank": {"axes", "rules"}}
    assert set().union(*(names.get(key, {key}) for key in changed)) == {field.name for field in fields(FitOptions)}


@pytest.mark.parametrize("options", REFITS, ids=str)
@pytest.mark.parametrize("view", ["weight", "delta", "update"])
def test_the_second_fit_has_the_options_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str, options: dict[str, Any]
) -> None:
    paths, base = write_zoo(tmp_path, view)
    space = ez.fit(ez.open_zoo(paths[:10], base=base), **{"dtype": "float64", "seed": 5, **options})
    fitted: list[ez.Subspace] = []

    def noted(*given: Any, **named: Any) -> tuple[ez.Subspace, ez.Zoo]:
        held = hold_out(*given, **named)
        fitted.append(held[0])
        return held

    monkeypatch.setattr("eigenzoo.evidence.function.hold_out", noted)
    found = ez.evaluate(space, Recorder())
    assert found.heldout
    assert (found.num_models, found.num_fitted) == (2, 8)
    assert (found.mean.parent is None) == (view == "weight")
    of_second, of_first = (recorded_options(one.manifest.options) for one in (fitted[0], space))
    for field in fields(FitOptions):
        assert getattr(of_second, field.name) == getattr(of_first, field.name), field.name
    assert fitted[0].manifest.options == space.manifest.options
    assert (fitted[0].view, fitted[0].axes, fitted[0].manifest.center) == (view, space.axes, space.manifest.center)


@pytest.mark.parametrize(("center", "spanned"), [("models", 3), ("none", 4)])
def test_the_second_fit_has_as_many_directions_as_fewer_models_span(tmp_path: Path, center: str, spanned: int) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    found = ez.evaluate(ez.fit(paths[:6], 5, center=center), Recorder())
    assert (found.num_fitted, found.ranks[-1]) == (4, spanned)


def test_a_bundle_whose_models_are_gone_asks_for_others(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    ez.fit(paths[:5], 2).save(tmp_path / "bundle")
    shutil.rmtree(paths[2])
    with pytest.raises(ez.UsageError, match=r"old files are not found .*'m2': .*m2 is not there, though.*--models"):
        ez.evaluate(ez.load(tmp_path / "bundle"), Recorder())
    assert ez.evaluate(ez.load(tmp_path / "bundle"), Recorder(), paths[5:6]).heldout


def test_two_models_leave_none_to_hold_out(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    with pytest.raises(ez.UsageError, match="2 models are too few to hold any out"):
        ez.evaluate(ez.fit(paths[:2], 1), Recorder())


def test_models_of_the_fit_are_known_again_by_their_weights(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space = ez.fit(paths[:5], 2)
    shutil.copytree(paths[1], tmp_path / "copies" / "renamed")
    shutil.copytree(paths[6], tmp_path / "copies" / "m1")
    inside = ez.evaluate(space, Recorder(), tmp_path / "copies" / "renamed")
    assert not inside.heldout
    assert "not all held out" in inside.sentence
    assert not ez.evaluate(space, Recorder(), [paths[6], paths[0]]).heldout
    assert ez.evaluate(space, Recorder(), tmp_path / "copies" / "m1").heldout


def test_models_of_the_same_subspace_or_the_same_coefficients_alone_are_not_known(tmp_path: Path) -> None:
    """In an exactly low-rank zoo all residuals are nothing; and what no model varies in moves no coefficient."""
    paths = write_stacks(tmp_path, {"w.weight": random_stack(7, (6, 5), 0, rank=2), "same.weight": torch.ones(7, 3, 3)})
    space = ez.fit(paths[:5], 2)
    assert max(space.coefficients(name).residual for name in space.names) < 1e-9
    assert ez.evaluate(space, Recorder(), paths[5:]).heldout
    shutil.copytree(paths[0], tmp_path / "other")
    assert not ez.evaluate(space, Recorder(), tmp_path / "other").heldout
    edit_model(tmp_path / "other", same__weight=2 * torch.ones(3, 3))
    assert ez.evaluate(space, Recorder(), tmp_path / "other").heldout


def test_ranks_of_ones_own_are_at_most_all_and_include_all(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space = ez.fit(paths[:6], 4)
    assert ez.evaluate(space, Recorder(), paths[6:7], ranks=[3, 1, 3]).ranks == (1, 3, 4)
    assert ez.evaluate(space, Recorder(), paths[6:7], ranks=[99]).ranks == (4,)
    for wrong in (0, 2.0, True):
        with pytest.raises(ez.UsageError, match="whole numbers from 1"):
            ez.evaluate(space, Recorder(), paths[6:7], ranks=[wrong])  # type: ignore[list-item]


def test_a_subspace_of_rank_one_has_no_secondary_directions(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    found = ez.evaluate(ez.fit(paths[:5], 1), Recorder(), paths[5:6])
    assert found.secondary_rank is None
    assert found.models["m5"].secondary is None
    assert found.ranks == (1,)


def test_the_seed_decides_the_random_basis_alone(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space = ez.fit(paths[:5], 2)
    drawn = []
    for seed in (0, 0, 1):
        metric = Recorder()
        measured = ez.evaluate(space, metric, paths[5:6], seed=seed).models["m5"]
        drawn.append([metric.of(figure)["block.0.q"] for figure in (measured.random_basis[2], measured.rebuilt[2])])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert torch.equal(drawn[0][1], drawn[2][1])


def test_a_parent_beside_a_known_one_is_refused_unless_it_is_the_same(evaluated: Callable[..., Any]) -> None:
    paths, base, space, _, _ = evaluated("delta", "models")
    assert ez.evaluate(space, Recorder(), paths[-1], parent=base).mean.parent is not None
    with pytest.raises(ez.UsageError, match="The models' parent is the base"):
        ez.evaluate(space, Recorder(), paths[-1], parent=paths[0])
    paths, _, space, _, _ = evaluated("update", "models")
    with pytest.raises(ez.UsageError, match="the base model alone, with zero updates"):
        ez.evaluate(space, Recorder(), paths[-1], parent=paths[0])


def test_a_parent_of_another_architecture_is_refused(tmp_path: Path) -> None:
    paths = zoo_with_heads(tmp_path)
    space = ez.fit(paths[:5], 2)
    with pytest.raises(ez.MismatchError, match=r"'body.weight' of the parent _parent: shape \[6, 4\]"):
        ez.evaluate(
            space, Recorder(), paths[5:], parent=write_model(tmp_path / "_parent", {"body.weight": torch.ones(6, 4)})
        )
    with pytest.raises(ez.MismatchError, match="is absent"):
        ez.evaluate(
            space, Recorder(), paths[5:], parent=write_model(tmp_path / "_other", {"head.weight": torch.ones(3, 6)})
        )


def test_a_parent_without_the_head_has_a_body_for_head_only(tmp_path: Path) -> None:
    paths = zoo_with_heads(tmp_path)
    parent, metric = write_model(tmp_path / "_parent", {"body.weight": torch.ones(6, 5)}), Recorder()
    measured = ez.evaluate(ez.fit(paths[:5], 2), metric, paths[5:], parent=parent).models["m5"]
    assert measured.parent is None
    assert torch.equal(metric.of(measured.head_only)["body.weight"], torch.ones(6, 5, dtype=torch.float64))


def failing(call: int, value: Any) -> Callable[[Path], Any]:
    """A metric that returns 1, and in one of its calls returns or raises something else."""
    calls = []

    def metric(path: Path) -> Any:
        calls.append(path)
        if len(calls) != call:
            return 1.0
        if isinstance(value, BaseException):
            raise value
        return value

    return metric


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (float("nan"), ez.DataError, r"model 'm5', mean only: the metric returned nan"),
        (float("-inf"), ez.DataError, r"model 'm5', mean only: the metric returned -inf"),
        ("many", ez.UsageError, r"model 'm5', mean only: the metric failed with ValueError"),
        (len, ez.UsageError, r"model 'm5', mean only: the metric failed with TypeError"),
        (KeyError("x"), ez.UsageError, r"model 'm5', mean only: the metric failed with KeyError: 'x'"),
        (ez.FormatError("is odd"), ez.FormatError, r"model 'm5', mean only: is odd"),
    ],
)
def test_a_metric_that_fails_is_told_with_model_and_variant(
    tmp_path: Path, value: Any, error: type[Exception], text: str
) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    with pytest.raises(error, match=text):
        ez.evaluate(ez.fit(paths[:5], 2), failing(2, value), paths[5:6])


@pytest.mark.parametrize(
    ("call", "variant"),
    [(1, "original"), (3, "rebuilt at rank 1"), (5, "random basis of 2"), (6, "without the first 1")],
)
def test_every_variant_has_its_name(tmp_path: Path, call: int, variant: str) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    with pytest.raises(ez.DataError, match=f"model 'm5', {variant}: the metric returned inf"):
        ez.evaluate(ez.fit(paths[:5], 2), failing(call, float("inf")), paths[5:6])


def test_an_interrupt_passes(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    with pytest.raises(KeyboardInterrupt):
        ez.evaluate(ez.fit(paths[:5], 2), failing(2, KeyboardInterrupt()), paths[5:6])
