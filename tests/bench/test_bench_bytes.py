"""Bytes against loss: what is counted is what files of these dtypes take, rounding loses what it must, the least wins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eigenzoo as ez
from bench.rates import Row, at_number, frontier, keeps, loses, smallest
from bench.sizes import SIZES, BytesPlan
from bench.stored_bytes import FLOAT, SMALL, Alone, Measured, bundles, run_bytes, split
from bench.tables import bytes_table, rates_table
from builders import random_factors, random_stack, write_adapter, write_model, write_stacks

MODULES = {"block.q": (64, 16), "block.v": (16, 64)}
PLAN = BytesPlan("Networks", "digits-cnn", None, (6, 30), (2, 7), (2, 4), (1,))


@pytest.fixture(scope="module", params=["adapters", "differences"])
def measured(request, tmp_path_factory) -> Measured:
    root, base = tmp_path_factory.mktemp("zoo"), None
    if request.param == "adapters":
        paths = [write_adapter(root / f"m{place}", random_factors(MODULES, 2, place)) for place in range(8)]
    else:
        paths = write_stacks(root, {"block.weight": random_stack(8, (64, 16), 0), "bias": random_stack(8, (5,), 1)})
        parent = {"block.weight": 3 + random_stack(1, (64, 16), 2)[0].float(), "bias": torch.zeros(5)}
        base = write_model(root / "_base", parent)
    zoo = ez.open_zoo(paths, base=base, view=None if base is None else "delta")
    folder = tmp_path_factory.mktemp("bundles")
    return Measured(zoo.select(names=zoo.names[:6]), zoo.select(names=zoo.names[6:]), base, lambda path: 0.5, folder)


def test_models_by_themselves_lose_more_in_fewer_bits(measured):
    rows = {dtype: measured.alone(Alone("", dtype, dtype), 6) for dtype in ("float32", "bfloat16", "int8", "nf4")}
    losses = [row.held_out for row in rows.values()]
    assert losses == sorted(losses)
    assert losses[0] < 1e-25
    assert losses[0] < losses[1] < 1e-5 < losses[2] < 3e-4 < losses[3] < 3e-2
    values = 2 * 2 * 80 if measured.base is None else 64 * 16 + 5
    saved = {name: rows["float32"].per_model - row.per_model for name, row in rows.items()}
    assert saved["bfloat16"] == 2 * values
    assert rows["float32"].values == 4 * values
    assert saved["nf4"] == pytest.approx(4 * values - values * (0.5 + 2 / 64), abs=20)


@pytest.mark.parametrize("about_mean", [False, True])
def test_cut_models_lose_the_energy_of_the_smaller_singular_values(measured, about_mean):
    row = measured.alone(Alone("", "", rank=1, mean=about_mean), 6)
    lost = energy = 0.0
    for name, layer in measured.held.layers.items():
        first, held = (matrices(zoo, name) for zoo in (measured.fitted, measured.held))
        energy += float(held.square().sum())
        mean = first.mean(0) if about_mean else torch.zeros(layer.shape)
        if min(layer.shape) > 1:
            lost += float(torch.linalg.svdvals(held - mean)[:, 1:].square().sum())
    assert row.held_out == pytest.approx(lost / energy, rel=1e-6)
    values = 2 * 80 if measured.base is None else 80 + 5
    assert measured.alone(Alone("", ""), 6).per_model - row.per_model == 4 * (
        (2 * 2 * 80 if measured.base is None else 64 * 16 + 5) - values
    )
    assert (
        row.shared
        == row.shared_values
        == (4 * sum(layer.num_values for layer in measured.held.layers.values()) if about_mean else 0)
    )


@pytest.mark.parametrize(
    "way", [Alone("", ""), Alone("", "", rank=1), Alone("", "", "nf4", 1, True), Alone("", "", rank=0)]
)
def test_what_is_measured_is_written(measured, way, tmp_path):
    """The files that the metric sees lose what the row states."""
    row = measured.alone(way, 6, tmp_path)
    written = ez.open_zoo(sorted(tmp_path.iterdir()), view=measured.held.view, base=measured.base)
    lost = energy = 0.0
    for name in measured.held.layers:
        original = matrices(measured.held, name)
        lost += float((matrices(written, name) - original).square().sum())
        energy += float(original.square().sum())
    assert row.held_out == pytest.approx(lost / energy, rel=1e-4, abs=1e-12)


def test_bundles_count_their_files_and_lose_what_they_state(measured):
    ways = list(bundles(PLAN, 6, (FLOAT, SMALL)))
    rows = {way.name: measured.bundle(way, 6) for way in ways if way.family == "axis models"}
    exact, small = rows["2 directions, float32"], rows["2 directions, nf4 + bfloat16"]
    assert exact.each(1000) > small.each(1000)
    assert exact.lost < small.lost
    assert exact.each(6) * 6 == measured_bytes(measured.folder / "6 2 directions, float32")
    assert all(0 < row.held_out < 1.3 for row in rows.values())
    assert small.values == (2 * 2 + 4) * len(measured.held.layers)  # two coefficients, and the layer's energy
    assert small.shared_values < exact.shared_values < exact.shared
    assert measured.score(ways[0], 6) == (0.5, 0.0)


def test_a_zoos_own_held_out_models_are_held_out_else_every_sixth(tmp_path):
    write_stacks(tmp_path, {"w": random_stack(12, (6, 5), 0)})
    fitted, held = split(tmp_path)
    assert (len(fitted), len(held)) == (10, 2)
    assert not set(fitted.names) & set(held.names)
    write_stacks(tmp_path / "_heldout", {"w": random_stack(3, (6, 5), 1)})
    fitted, held = split(tmp_path)
    assert (len(fitted), len(held)) == (12, 3)


def test_cores_are_cut_where_that_is_smaller():
    names = [way.name for way in bundles(PLAN, 6, (FLOAT,))]
    assert names[:3] == ["2 directions, float32", "sides 2, float32", "sides 4, float32"]
    assert names[3] == "sides 4, cores of rank 1, float32"
    assert len(names) == 7


def test_a_zoo_of_the_nursery_becomes_tables(tmp_path: Path):
    """What is there is not trained again; every way is in a row, and one of them wins for each number of models."""
    zoo = tmp_path / "digits-cnn"
    write_stacks(zoo, {"w": random_stack(12, (6, 5), 0)})
    (zoo / "zoo.json").write_text("{}")
    found = run_bytes(replace(PLAN, fitted=(30,), models=(7,), sides=(4,)), tmp_path, lambda path: 1.0)
    assert (found["fitted"], found["held_out"]) == (10, 2)
    lines = bytes_table(found).markdown()
    assert lines[0] == "**Networks: 10 models fitted, 2 held out**"
    assert sum(line.startswith("| 7 directions, ") for line in lines) == 3
    rates = [line for line in rates_table(found).markdown() if line.startswith(("| 9", "| ≤"))]
    assert len(rates) == 16
    assert all("**" in line for line in rates)


def row(
    family: str, shared: float, per_model: float, held_out: float, score: float | None = None, fitted: int = 10
) -> Row:
    return Row(family, family, fitted, shared, per_model, shared, per_model - 1, None, held_out, score)


def test_the_winner_depends_on_the_number_of_models():
    alone, bundle, poor = row("alone", 0, 100, 0.1), row("bundle", 1000, 10, 0.1), row("poor", 0, 1, 0.4)
    rows = [alone, bundle, poor]
    for number, share, best in ((10, 0.1, alone), (12, 0.1, bundle), (12, 0.4, poor), (12, 0.05, None)):
        assert smallest(rows, number, loses(share)) is best


def test_a_share_of_the_gain_counts_from_nothing():
    meets = keeps(0.95, 0.5, 0.9)
    assert meets(row("a", 0, 1, 0, 0.8801))
    assert not meets(row("a", 0, 1, 0, 0.8799))
    assert not meets(row("a", 0, 1, 0))


def test_the_frontier_leaves_out_what_a_smaller_row_nearly_equals():
    small, nearly, better = row("a", 0, 10, 0.2), row("a", 0, 20, 0.195), row("a", 0, 30, 0.1)
    other, worse, files = row("b", 0, 50, 0.3), row("b", 0, 60, 0.31), row("files", 0, 90, 0.0)
    rows = [better, nearly, small, other, worse, files]
    assert frontier(rows, 10, by_family=True) == [files, small, better, other]
    assert frontier(rows, 10, by_family=False) == [files, small, better]


def test_more_models_than_were_fitted_have_the_largest_fit():
    few, many = row("a", 0, 1, 0.1, fitted=10), row("a", 0, 1, 0.1, fitted=30)
    assert at_number([few, many], 10) == at_number([few, many], 29) == [few]
    assert at_number([few, many], 200) == [many]
    assert at_number([few, many], 5) == [few]


def test_larger_runs_have_the_zoos_of_the_nursery():
    assert [plan.kind for plan in SIZES["full"].bytes] == ["digits-lora", "digits-vit", "docstrings-lora"]
    assert [plan.kind for plan in SIZES["small"].bytes] == ["digits-lora"]
    assert not SIZES["ci"].bytes


def matrices(zoo: ez.Zoo, layer: str) -> torch.Tensor:
    """All models' matrices of a layer, float64."""
    stack = zoo.stack(layer)
    read = (lambda place: torch.mm(*stack.factors(place))) if zoo.view == "update" else stack.matrix
    return torch.stack([read(place).double() for place in range(len(zoo))])


def measured_bytes(bundle: Path) -> int:
    """Bytes of a bundle's files without its moments."""
    return sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file() and "moments" not in file.name)
