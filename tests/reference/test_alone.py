"""Models cut alone by their own SVD, the control without sharing: in `plan`, `fit` and `evaluate`, against plain numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import random_factors, random_stack, read_update, seeded, write_adapter, write_model, write_stacks
from eigenzoo.display import in_percent
from eigenzoo.records import AloneRow
from eigenzoo.subspace.fitting import alone
from eigenzoo.subspace.fitting.alone import against_alone
from tolerance import tolerance

SHAPES = {"0.q": (24, 16), "1.q": (12, 40)}
NUM_MODELS = 6


def write_zoo(root: Path, view: str) -> tuple[list[Path], Path | None]:
    if view == "update":
        ranks = [2, 5, 3, 4, 5, 2]
        return [write_adapter(root / f"m{n}", random_factors(SHAPES, rank, n)) for n, rank in enumerate(ranks)], None
    stacks = {name: random_stack(NUM_MODELS, shape, seed) + 1 for seed, (name, shape) in enumerate(SHAPES.items())}
    stacks["bias"] = random_stack(NUM_MODELS, (12,), 9)
    base = write_model(root / "_base", {name: stack[0] / 3 for name, stack in stacks.items()})
    return write_stacks(root, stacks), base if view == "delta" else None


def matrices(paths: list[Path], name: str, base: Path | None) -> np.ndarray[Any, Any]:
    if (paths[0] / "adapter_config.json").exists():
        return np.stack([read_update(path, name).double().numpy() for path in paths])
    removed = load_file(base / "model.safetensors")[name].double() if base is not None else 0.0
    return np.stack([(load_file(path / "model.safetensors")[name].double() - removed).numpy() for path in paths])


def lost_at(paths: list[Path], base: Path | None, rank: int, about: str) -> float:
    """Share of the energy that plain SVDs lose; layers that factors would not make smaller stay whole."""
    lost = energy = 0.0
    for name in SHAPES if base is None and (paths[0] / "adapter_config.json").exists() else (*SHAPES, "bias"):
        stack = matrices(paths, name, base)
        energy += float((stack**2).sum())
        if name == "bias":
            continue
        cut = stack - stack.mean(0) if about == "mean" else stack
        if (paths[0] / "adapter_config.json").exists() or rank * sum(SHAPES[name]) < np.prod(SHAPES[name]):
            lost += sum(float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum()) for matrix in cut)
    return lost / energy


ABOUT = {"update": {"zero"}, "weight": {"mean"}, "delta": {"zero", "mean"}}


@pytest.mark.parametrize("view", ABOUT)
def test_plan_and_every_fit_state_what_plain_svds_lose(tmp_path: Path, view: str) -> None:
    paths, base = write_zoo(tmp_path / "zoo", view)
    zoo = ez.open_zoo(paths, base=base)
    rows = ez.plan(zoo).alone
    assert {row.about for row in rows} == ABOUT[view]
    for row in rows:
        assert row.residual == pytest.approx(
            lost_at(paths, base, row.rank, row.about), abs=tolerance(NUM_MODELS * 480, dtype=torch.float32)
        )
    for axes in (("models",), ("outputs", "inputs")):
        for cache in (False, True):  # with moments that are kept, rows are read for the basis alone
            fitted = ez.fit(zoo, dict.fromkeys(axes, 3), cache=cache).report["alone"]
            for row, stated in zip(rows, fitted, strict=True):
                assert AloneRow(**{**stated, "residual": row.residual}) == row
                assert stated["residual"] == pytest.approx(row.residual, rel=1e-5)


def test_bytes_are_those_of_factors_and_of_one_mean(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path / "zoo", "weight")
    zoo = ez.open_zoo(paths)
    first = ez.plan(zoo).alone[0]
    per_model = 4 * ((24 + 16) + (12 + 40) + 12)
    headers = zoo.num_bytes - zoo.layer_bytes
    mean = 4 * (24 * 16 + 12 * 40)
    assert first.bytes == headers + NUM_MODELS * per_model + mean
    assert first.per_model == pytest.approx(headers / NUM_MODELS + per_model, abs=1)


def test_where_it_is_not_cheap_it_is_not_measured_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eigenzoo.cli.fit import render
    from eigenzoo.cli.plan import render as render_plan

    paths, _ = write_zoo(tmp_path / "zoo", "weight")
    monkeypatch.setattr(alone, "MOST_PRODUCTS", 1)
    plan, space = ez.plan(paths), ez.fit(paths, 2)
    assert plan.alone == ()
    assert space.report["alone"] == []
    assert against_alone(space.report) is None
    render_plan(plan)
    render(space.report)
    assert "Not measured: each model cut alone by its own SVD." in capsys.readouterr().out.split("without sharing")[0]
    render(space.report)
    assert "without sharing: not measured" in capsys.readouterr().out


def report(**changes: Any) -> dict[str, Any]:
    """A bundle of ten models with 1,000 bytes in common and 20 for each, which loses a tenth."""
    sizes = {"whole_bundle": 1200, "per_model": 20, "whole_zoo": 5000}
    rows = [vars(AloneRow(1, 0.3, 600, 60)), vars(AloneRow(2, 0.08, 1100, 110))]
    layer = {"captured": 0.875, "heldout": 0.5, "variance": 8.0}
    found = {"num_models": 10, "residual": 0.1, "energy": 10.0, "bytes": sizes, "alone": rows, "layers": {"w": layer}}
    return {**found, **changes}


def test_who_wins_at_how_many_models() -> None:
    found = against_alone(report())
    assert found is not None
    assert (found.per_model_now, found.same_bytes, found.as_good) == (
        120,
        AloneRow(2, 0.08, 1100, 110),
        found.same_bytes,
    )
    # 1000 + 20 N < 110 N from 12 models on; at ten, models cut alone are smaller.
    assert (found.better, found.better_from) == ("alone", 12)
    # Models left out lose half of what they vary by, 0.4 of the energy: rank 1 loses 0.3, and 1000 + 20 N < 60 N from 26 on.
    assert (found.unseen_residual, found.unseen_as_good, found.unseen_better_from) == (
        0.4,
        AloneRow(1, 0.3, 600, 60),
        26,
    )
    text = " ".join(found.sentences)
    assert "Each model cut alone by its own SVD to rank 2 takes 110 B and loses 8.00 %" in text
    assert (
        "the bundle is smaller from 12 models on. At the 10 models of this bundle, models cut alone are smaller."
        in text
    )
    assert (
        "loses 40.0 %. To lose no more, a model alone needs rank 1, 60 B: the bundle is smaller from 26 models on."
        in text
    )


def test_the_models_own_files_stand_for_a_rank_that_loses_nothing() -> None:
    found = against_alone(report(residual=0.01))
    assert found is not None
    assert found.as_good is None
    assert (found.better, found.better_from) == ("bundle", 3), "1000 + 20 N < 500 N"
    assert "a model alone needs its whole file: the bundle is smaller from 3 models on" in found.sentences[1]
    sizes = {"whole_bundle": 1200, "per_model": 70, "whole_zoo": 5000}
    never = against_alone(report(residual=0.5, bytes=sizes))
    assert never is not None
    assert (never.better, never.better_from) == ("alone", None)
    assert "the bundle is never smaller" in never.sentences[1]


def test_a_mean_that_is_stored_once_costs_few_models_most() -> None:
    """600 bytes of a mean and 60 a model: 1000 + 20 N < 600 + 60 N from 11 models on."""
    found = against_alone(report(alone=[vars(AloneRow(1, 0.05, 1200, 60, "mean"))]))
    assert found is not None
    assert found.better_from == 11
    assert "to rank 1 about the mean takes 120 B" in found.sentences[0]


def test_without_held_out_shares_of_all_layers_nothing_is_said_of_new_models() -> None:
    layers = {"v": {"captured": 0.9, "heldout": None, "variance": 1.0}, **report()["layers"]}
    found = against_alone(report(layers=layers))
    assert found is not None
    assert found.unseen_residual is None
    assert len(found.sentences) == 2


@pytest.mark.parametrize("view", ABOUT)
def test_evaluate_measures_models_cut_alone(tmp_path: Path, view: str) -> None:
    paths, base = write_zoo(tmp_path / "zoo", view)
    space = ez.fit(paths[:4], 1, base=base)
    seen: dict[float, dict[str, torch.Tensor]] = {}

    def metric(path: Path) -> float:
        names = SHAPES if view == "update" else (*SHAPES, "bias")
        read = (lambda name: read_update(path, name)) if view == "update" else load_file(path / "model.safetensors").get
        seen[float(len(seen))] = {name: read(name).double() for name in names}
        return float(len(seen) - 1)

    found = ez.evaluate(space, metric, paths[4:])
    assert {1, 2} <= set(found.mean.alone)
    for place in (4, 5):
        for rank, figure in found.models[f"m{place}"].alone.items():
            for name, (outputs, inputs) in SHAPES.items():
                own = matrices(paths[place : place + 1], name, base)[0]
                mean = 0.0 if view == "update" else matrices(paths[:4], name, base).mean(0)
                if view == "update" or rank * (outputs + inputs) < outputs * inputs:
                    left, values, right = np.linalg.svd(own - mean, full_matrices=False)
                    own = mean + (left[:, :rank] * values[:rank]) @ right[:rank]
                removed = load_file(base / "model.safetensors")[name].double().numpy() if base is not None else 0.0
                np.testing.assert_allclose(seen[figure][name].numpy(), own + removed, atol=2e-5)


def test_a_grown_bundle_says_nothing_of_models_cut_alone(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path / "zoo", "update")
    grown = ez.fit(paths[:5], 2).add(paths[5:])
    assert against_alone(grown.report) is None


def test_a_plan_advises_the_control_where_it_wins(tmp_path: Path) -> None:
    """Unrelated adapters are cut alone, now and for many; adapters of one U and V are stored together, now and for many."""
    draw = seeded(3)
    paths, _ = write_zoo(tmp_path / "unrelated", "update")
    plan = ez.plan(paths)
    assert plan.advice.startswith("Advice: for bytes now, each model cut alone to rank ")
    assert plan.better_alone is not None
    assert f" in all ({in_percent(plan.better_alone.residual)} of the energy lost); for many" in plan.advice
    assert "for many more models, each model cut alone to rank " in plan.advice
    left, right = torch.randn(256, 8, generator=draw), torch.randn(8, 256, generator=draw)
    for place in range(12):
        write_adapter(
            tmp_path / "shared" / f"a{place}", {"q": (left @ torch.randn(8, 8, generator=draw), right)}, lora_alpha=8
        )
    plan = ez.plan(tmp_path / "shared")
    assert plan.recommended is not None
    assert plan.advice.startswith(f"Advice: for bytes now, axes {', '.join(plan.recommended.axes)} at rank")
    assert "for many more models, axes outputs, inputs at rank 8" in plan.advice
    assert "without sharing, each model cut alone to rank" in plan.advice
    assert replace(plan, rows=(), alone=()).advice == ""


def test_advice_for_many_full_weights_counts_sides_that_only_a_fit_measures(tmp_path: Path) -> None:
    """Weights with common sides: no share of held-out models is known, yet models cut alone are not the advice."""
    draw = seeded(5)
    left, right = torch.randn(48, 8, generator=draw), torch.randn(8, 64, generator=draw)
    for index in range(12):
        weight = left @ torch.randn(8, 8, generator=draw) @ right
        (tmp_path / f"m{index}").mkdir()
        save_file({"q": weight}, tmp_path / f"m{index}" / "model.safetensors")
    plan = ez.plan(tmp_path)
    unmeasured = plan.unmeasured_for_many
    assert unmeasured is not None
    assert (unmeasured.axes, unmeasured.rank, unmeasured.heldout) == (("outputs", "inputs"), 8, None)
    assert "for many more models, axes outputs, inputs at rank 8, " in plan.advice
    assert "if the fit, which measures models left out of it, does not lose much more of them" in plan.advice
    # Where models cut alone keep more for their bytes than any bundle, they are the advice for many too.
    alone = replace(plan, alone=(AloneRow(1, 0.0, 1, 1, "zero"),))
    assert alone.unmeasured_for_many is None
    assert "for many more models, each model cut alone to rank 1, 1 B for each" in alone.advice
