"""The plan against what fits and saved bundles then are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Run
from safetensors.torch import save_file

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.cli.plan import render
from eigenzoo.display import in_bytes, in_percent
from eigenzoo.records import AloneRow, plain
from eigenzoo.subspace.fitting.alone import against_alone
from eigenzoo.subspace.fitting.bytes import sizes
from tolerance import tolerance

AXES = ("models", "outputs", "inputs")
MODULES = {"block.0.q": (96, 80), "block.1.q": (64, 112)}


def write_zoo(root: Path, kind: str) -> Path:
    """Big enough that headers are a small part of the bytes, as in any real zoo."""
    if kind == "adapters":
        for place in range(9):
            write_adapter(
                root / f"a{place}", random_factors(MODULES, [4, 8, 6][place % 3], place), lora_alpha=3 + place
            )
        return root
    stacks = {
        "0.w": random_stack(9, (64, 96), 0, rank=5),
        "1.w": random_stack(9, (80, 40), 1),
        "conv": random_stack(9, (32, 16, 3, 3), 2),
    }
    stacks["1.w"] = stacks["1.w"] * 0.3 + 2.0
    paths = write_stacks(root, {**stacks, "bias": random_stack(9, (48,), 3)})
    for path in paths:
        (path / "config.json").write_text('{"model_type": "small"}')
    return root


def fitted(root: Path, axes: tuple[str, ...], rank: int, **options: Any) -> ez.Subspace:
    # A rank above what a layer has means all of it, but for models, where more than there are is refused.
    return ez.fit(root, {axis: min(rank, 8) if axis == "models" else rank for axis in axes}, **options)


@pytest.mark.parametrize("kind", ["weights", "adapters"])
def test_the_plan_is_what_a_fit_then_does(tmp_path: Path, kind: str) -> None:
    root = write_zoo(tmp_path / "zoo", kind)
    plan = ez.plan(root)
    zoo = ez.open_zoo(root)
    assert plan.num_models == 9
    assert plan.whole_zoo == zoo.num_bytes == sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    assert {row.axes for row in plan.rows} == {
        ("models",),
        ("outputs",),
        ("inputs",),
        ("outputs", "inputs"),
        ("models", "outputs", "inputs"),
    }
    seen = small = 0
    for number, row in enumerate(plan.rows):
        if row.rank in (0, 2, 8) or row.rank == max(other.rank for other in plan.rows if other.axes == row.axes):
            seen += 1
            space = fitted(root, row.axes, row.rank, core_rank=row.core_rank)
            assert row.exact is (row.axes != ("models", "outputs", "inputs"))
            if row.exact:
                assert row.residual == pytest.approx(space.report["residual"], abs=1e-6), row
            else:
                assert row.residual >= space.report["residual"] - 1e-9, row
            bundle = space.save(tmp_path / f"b{number}")
            sizes = {path.name: path.stat().st_size for path in bundle.rglob("*") if path.is_file()}
            whole = (
                sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) - sizes["moments.safetensors"]
            )
            # Headers and the card are counted at most: 2 kB more than they are, which only a toy's bytes feel.
            assert row.bytes == pytest.approx(whole, rel=0.05, abs=2300), (row, whole)
            small += whole < 46_000
            assert row.ratio == pytest.approx(plan.whole_zoo / row.bytes)
            ranks = space.rebuild("a1").ranks() if kind == "adapters" else None
            if ranks is None:
                assert row.lora_rank is None
            else:
                assert ranks.rank == row.lora_rank
    assert seen >= 12
    assert small <= seen / 2, "most rows must be large enough for the five percent to be what is tested"


@pytest.mark.parametrize("axes", [("outputs", "inputs"), ("models", "outputs", "inputs")], ids=",".join)
def test_a_budget_holds_for_adapters_whose_configs_differ(tmp_path: Path, axes: tuple[str, ...]) -> None:
    """Every adapter has an alpha of its own: its config and layout are stored once more, and count."""
    root = write_zoo(tmp_path / "zoo", "adapters")
    for budget in (60_000, 160_000):
        bundle = ez.fit(root, axes=axes, budget=budget).save(tmp_path / f"b{budget}", moments=False)
        whole = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        assert 0.9 * budget <= whole <= budget


def test_several_axes_are_bounded_from_above_and_the_bound_is_of_use(tmp_path: Path) -> None:
    root = write_zoo(tmp_path / "zoo", "weights")
    plan = ez.plan(root, axes=AXES)
    bounds = {row.rank: row.residual for row in plan.rows}
    losses = {rank: fitted(root, AXES, rank).report["residual"] for rank in (2, 16, 32)}
    for rank, loss in losses.items():
        assert loss <= bounds[rank] + 1e-9
        # The best of several axes loses at least the largest tail, and the bound is their sum, or all the variance.
        assert bounds[rank] <= len(AXES) * loss + 1e-9
    assert bounds[max(bounds)] == pytest.approx(0, abs=1e-9)


def test_the_control_is_the_mean_alone(tmp_path: Path) -> None:
    for kind in ("weights", "adapters"):
        root = write_zoo(tmp_path / kind, kind)
        plan = ez.plan(root, axes=("models",))
        assert plan.mean_only_residual == pytest.approx(ez.fit(root, 0).report["residual"], abs=1e-9)
        rows = [row.residual for row in plan.rows]
        assert rows[0] == pytest.approx(plan.mean_only_residual)
        assert rows == sorted(rows, reverse=True)
        assert rows[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("center", "dtype"), [("columns", "bfloat16"), ("none", "float64"), ("global", "float32")])
def test_centers_and_dtypes_are_planned_for(tmp_path: Path, center: str, dtype: str) -> None:
    root = write_zoo(tmp_path / "zoo", "weights")
    for row in ez.plan(root, axes=("models",), center=center, dtype=dtype).rows:
        if row.rank in (1, 4):
            space = fitted(root, row.axes, row.rank, center=center, dtype=dtype)
            slack = (
                1e-6 if dtype != "bfloat16" else torch.finfo(torch.bfloat16).eps
            )  # the fit states what rounding adds
            assert row.residual == pytest.approx(space.report["residual"], abs=slack)
            # The center of these is smaller than the mean that the plan counts, by at most one layer.
            bundle = space.save(tmp_path / f"b{row.rank}", moments=False)
            whole = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
            assert row.bytes >= 0.95 * whole


def test_breaking_even_is_where_the_bundle_becomes_smaller(tmp_path: Path) -> None:
    root = write_zoo(tmp_path / "zoo", "weights")
    rows = ez.plan(root, axes=("outputs", "inputs")).rows
    assert any(row.break_even_models for row in rows)
    assert any(row.break_even_models is None for row in rows)
    per_model = ez.open_zoo(root).num_bytes / 9
    for row in rows:
        fixed = row.bytes - 9 * row.per_model
        if row.break_even_models is None:
            assert row.per_model >= per_model
        else:
            assert fixed + row.break_even_models * row.per_model < row.break_even_models * per_model
            before = row.break_even_models - 1
            assert fixed + before * row.per_model >= before * per_model


def test_the_command_prints_a_short_table_and_json_has_all(run: Run, tmp_path: Path) -> None:
    root = write_zoo(tmp_path / "zoo", "weights")
    document = run("plan", root, "--json").json
    text = run("plan", root).out
    plan = ez.plan(root)
    assert len(document["rows"]) == len(plan.rows) > 12
    shown = plan.shortlist()
    table = [line for line in text.splitlines() if "×" in line]
    assert len(table) == len(shown) <= 12
    for line, row in zip(table, shown, strict=True):
        assert line.lstrip("→ ").split("  ")[0].strip() == ", ".join(row.axes)
        assert f" {row.rank} " in line
        assert ("≤" in line) is not row.exact
        assert line.startswith("→") is (row == plan.recommended)
    assert f"The table shows {len(shown)} of {len(plan.rows)} choices" in text
    assert "`--json` prints all." in text
    assert run("plan", root, "--axes", "inputs", "--json").json["rows"][0]["axes"] == ["inputs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


def test_planted_directions_are_recommended_and_noise_is_not(run: Run, tmp_path: Path) -> None:
    """Four directions hold all that 40 models differ in: more are wasted, fewer lose some. Noise has none to recommend."""
    planted = write_stacks(tmp_path / "planted", {"w": random_stack(40, (48, 64), 0, rank=4)})
    best = ez.plan(planted).recommended
    assert best is not None
    assert (best.axes, best.rank) == (("models",), 4)
    text = run("plan", tmp_path / "planted").out
    assert "→ Try this first: `--axes models --rank 4`" in text
    assert "Smaller bundles: compare with `--dtype nf4 --coefficients-dtype bfloat16`" in text
    assert "Rounding to" not in text
    rounded = run("plan", tmp_path / "planted", "--dtype", "int8", "--coefficients-dtype", "bfloat16").out
    assert "→ Try this first: `--axes models --rank 4 --dtype int8 --coefficients-dtype bfloat16`" in rounded
    assert "Rounding to bfloat16 and int8 loses more than the table says: `fit` prints the loss with it." in rounded
    assert "of the energy lost before rounding to bfloat16 and int8" in rounded
    assert "Smaller bundles" not in rounded
    noise = write_stacks(tmp_path / "noise", {"w": random_stack(40, (48, 64), 1)})
    assert ez.plan(noise).recommended is None
    assert "No choice is recommended" in run("plan", tmp_path / "noise").out


def test_adapters_cut_alone_are_the_control_of_sharing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unrelated adapters are best cut one by one; adapters of one U and V are best stored together."""
    root, written = write_zoo(tmp_path / "zoo", "adapters"), tmp_path / "cut"
    plan = ez.plan(root)
    assert [row.rank for row in plan.alone] == [1, 2, 4]
    for row in plan.alone:
        lost = energy = 0.0
        for place in range(9):
            cut = {}
            for module, (b_OR, a_RI) in random_factors(MODULES, [4, 8, 6][place % 3], place).items():
                scale = (3 + place) / [4, 8, 6][place % 3]
                left, values, right = torch.linalg.svd(scale * b_OR.double() @ a_RI.double(), full_matrices=False)
                own = min(row.rank, [4, 8, 6][place % 3])
                cut[module] = ((left[:, :own] * values[:own]).float(), right[:own].float())
                lost, energy = lost + float(values[row.rank :].square().sum()), energy + float(values.square().sum())
            write_adapter(written / str(row.rank) / f"a{place}", cut)
        assert row.residual == pytest.approx(lost / energy, abs=tolerance(9 * 96, dtype=torch.float32))
        # Headers give offsets in fewer digits: a byte or two for each of four tensors.
        sizes = [path.stat().st_size for path in (written / str(row.rank)).rglob("*.safetensors")]
        assert row.bytes == pytest.approx(sum(sizes), abs=9 * 4 * 4)
    text = run("plan", root).out
    assert f"rank 4: {in_bytes(plan.alone[2].bytes)}, {in_percent(plan.alone[2].residual)} lost." in text
    assert plan.better_alone is not None
    assert f"Cut to rank {plan.better_alone.rank}, the adapters alone keep more for their bytes than any bundle" in text
    assert "`fit --axes models --rank 1.0`, then `rebuild --max-lora-rank R`." in text

    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(256, 8, generator=draw), torch.randn(8, 256, generator=draw)
    for place in range(12):
        write_adapter(
            tmp_path / "shared" / f"a{place}", {"q": (left @ torch.randn(8, 8, generator=draw), right)}, lora_alpha=8
        )
    plan = ez.plan(tmp_path / "shared")
    assert plan.better_alone is None
    text = run("plan", tmp_path / "shared").out
    assert "Without a bundle, each adapter cut" in text
    assert "→ Try this first: `--axes" in text
    assert "sharing does not save bytes here" not in text
    render(replace(plan, alone=(AloneRow(1, 0.0, 1),)))
    text = capsys.readouterr().out
    # What to do comes before the bundle that is not advised.
    assert (
        text.index("Advice: ")
        < text.index("sharing does not save bytes here")
        < text.index("→ The best bundle for its bytes")
    )
    assert "Cut to rank 1, the adapters alone keep more for their bytes than any bundle" in text
    text = run("plan", write_zoo(tmp_path / "weights", "weights")).out
    assert "Without a bundle" not in text
    assert "With the models' mean stored once, each model's deviation from it cut by its own SVD: rank 1: " in text


def test_the_json_of_fit_has_the_comparison_with_models_cut_alone(run: Run, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    document = run("fit", write_zoo(tmp_path / "zoo", "adapters"), "-o", bundle, "--rank", 3, "--json").json
    assert [row["rank"] for row in document["alone"]] == [1, 2, 4]
    found = against_alone(ez.load(bundle).report)
    assert found is not None
    assert document["against_alone"] == plain(found)
    text = run("fit", tmp_path / "zoo", "-o", bundle, "--rank", 3, "--force").out
    assert f"without sharing: {' '.join(found.sentences)}" in text


def test_the_budget_of_the_advice_is_one_that_fit_takes(run: Run, tmp_path: Path) -> None:
    write_stacks(tmp_path / "planted", {"w": random_stack(40, (48, 64), 0, rank=4)})
    advice = re.search(r"or `--axes models --budget (\d+kB)`", run("plan", tmp_path / "planted").out)
    assert advice is not None
    run("fit", tmp_path / "planted", "-o", tmp_path / "bundle", "--budget", advice[1])
    assert ez.load(tmp_path / "bundle").report["residual"] < 1e-6


@pytest.mark.parametrize("kind", ["weights", "adapters"])
def test_the_shortlist_has_no_row_that_another_makes_useless(tmp_path: Path, kind: str) -> None:
    plan = ez.plan(write_zoo(tmp_path / "zoo", kind))
    for most in (3, 12, 1000):
        shown = plan.shortlist(most)
        assert 1 < len(shown) <= most
        assert plan.recommended is None or plan.recommended in shown
        for row in shown:
            better = [
                other
                for other in plan.rows
                if other != row and other.bytes <= row.bytes and other.residual <= row.residual
            ]
            assert all((other.bytes, other.residual) == (row.bytes, row.residual) for other in better)
    assert {shown[0], shown[-1]} <= set(plan.shortlist(3))
    doubled = replace(plan, rows=plan.rows + tuple(replace(row, rank=row.rank + 1) for row in plan.rows))
    assert len(doubled.shortlist(1000)) == len(shown)


def test_what_is_kept_of_models_held_out_is_what_the_fit_says(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(5)
    shared = torch.randn(2, 48, generator=draw)
    for number in range(9):
        home = tmp_path / f"m{number}"
        home.mkdir()
        weights = torch.randn(2, generator=draw) @ shared + 0.3 * torch.randn(48, generator=draw)
        save_file({"w": weights.view(8, 6)}, home / "model.safetensors")
    layer = ez.fit(tmp_path, rank=2).report["layers"]["w"]
    row = next(row for row in ez.plan(tmp_path, axes=["models"]).rows if row.rank == 2)
    assert row.captured == pytest.approx(layer["captured"], rel=1e-9)
    assert row.heldout == pytest.approx(layer["heldout"], rel=1e-9)
    assert 0.3 < row.heldout < row.captured
    assert all(row.heldout is None for row in ez.plan(tmp_path, axes=["outputs"]).rows)


def test_the_report_has_the_bytes_of_the_plan(tmp_path: Path) -> None:
    """Stacked factors have a table of weights, whose bytes grow with the square of the rank."""
    root = write_zoo(tmp_path / "zoo", "adapters")
    counted = sizes(ez.open_zoo(root))
    for row in ez.plan(root, axes=("models",)).rows:
        basis = sum(layer.basis(row.rank) + 9 * row.rank * layer.per_coefficient for layer in counted.layers.values())
        assert counted.shared + 9 * counted.per_model + basis == row.bytes
