"""Bytes against loss: what is counted is what files of these dtypes take, and rounding loses what it must."""

from __future__ import annotations

from pathlib import Path

import pytest

import eigenzoo as ez
from bench.sizes import SIZES, BytesPlan
from bench.stored_bytes import Measured, run_bytes
from bench.tables import bytes_table
from builders import random_factors, random_stack, write_adapter, write_model, write_stacks

MODULES = {"block.q": (64, 16), "block.v": (16, 64)}


@pytest.fixture(scope="module", params=["adapters", "differences"])
def measured(request, tmp_path_factory) -> Measured:
    root, base = tmp_path_factory.mktemp("zoo"), None
    if request.param == "adapters":
        paths = [write_adapter(root / f"m{place}", random_factors(MODULES, 2, place)) for place in range(8)]
    else:
        paths = write_stacks(root, {"block.weight": random_stack(8, (64, 16), 0), "bias": random_stack(8, (5,), 1)})
        base = write_model(
            root / "_base",
            {"block.weight": 3 + random_stack(1, (64, 16), 2)[0].float(), "bias": random_stack(1, (5,), 3)[0].float()},
        )
    zoo = ez.open_zoo(paths, base=base, view=None if base is None else "delta")
    return Measured(zoo.select(names=zoo.names[:6]), zoo.select(names=zoo.names[6:]), base, lambda path: 0.5)


def test_models_by_themselves_lose_more_in_fewer_bits(measured):
    rows = {row.name.removeprefix("each by itself: "): row for row in measured.alone()}
    losses = [rows[name].lost for name in ("files", "bfloat16", "int8", "nf4")]
    assert losses == sorted(losses)
    assert losses[0] == 0 < losses[1] < 1e-5 < losses[2] < 3e-4 < losses[3] < 3e-2
    values = 2 * 2 * 80 if measured.base is None else 64 * 16 + 5
    saved = {name: rows["files"].per_model - row.per_model for name, row in rows.items()}
    assert saved["bfloat16"] == 2 * values
    assert saved["nf4"] == pytest.approx(4 * values - values * (0.5 + 2 / 64), abs=20)


def test_bundles_count_their_files_and_lose_what_they_state(measured):
    rows = list(measured.bundles({"models": 3}))
    assert [row.name.partition(": ")[2] for row in rows[:2]] == ["float32", "float32, coefficients bfloat16"]
    exact = rows[0]
    assert all(row.whole < exact.whole for row in rows[4:])
    assert exact.lost <= rows[1].lost < rows[-1].lost
    assert all(0 < row.held_out < 1.3 and row.score == 0.5 for row in rows)


def test_a_zoo_of_the_nursery_becomes_a_table(tmp_path: Path, monkeypatch):
    """What is there is not trained again; every row is printed."""
    zoo = tmp_path / "digits-cnn"
    write_stacks(zoo, {"w": random_stack(12, (6, 5), 0)})
    (zoo / "zoo.json").write_text("{}")
    found = run_bytes(BytesPlan("Networks", "digits-cnn", None, ({"models": 2},)), tmp_path, lambda path: 1.0)
    assert (found["fitted"], found["held_out"]) == (10, 2)
    lines = bytes_table(found).markdown()
    assert lines[0] == "**Networks: 10 models fitted, 2 held out**"
    assert sum(line.startswith("| bundle, models 2: ") for line in lines) == 8


def test_larger_runs_have_the_zoos_of_the_nursery():
    assert [plan.kind for plan in SIZES["full"].bytes] == ["digits-lora", "digits-vit"]
    assert not SIZES["ci"].bytes
