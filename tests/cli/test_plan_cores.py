"""Rows of a plan with cut cores, against the fits that they stand for and against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runner import Run

import eigenzoo as ez
from builders import random_factors, read_update, write_adapter, write_stacks
from tolerance import tolerance

SIDES = ("outputs", "inputs")
MODULES = {"a.q": (96, 80), "a.v": (80, 64)}


@pytest.fixture(scope="module", params=["adapters", "weights"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve models of falling ranks of their own, between twelve directions that all share, and a little noise."""
    root, draw = tmp_path_factory.mktemp("zoo"), torch.Generator().manual_seed(7)
    sides = {name: [torch.randn(size, 12, generator=draw) for size in shape] for name, shape in MODULES.items()}
    models: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
    for place in range(12):
        own = 3 + place % 2
        fall = 0.4 ** torch.arange(own)
        models.append(
            {
                name: (
                    (left @ torch.randn(12, own, generator=draw) + 0.3 * torch.randn(len(left), own, generator=draw))
                    * fall,
                    torch.randn(own, 12, generator=draw) @ right.T + 0.3 * torch.randn(own, len(right), generator=draw),
                )
                for name, (left, right) in sides.items()
            }
        )
    if request.param == "adapters":
        return [
            write_adapter(root / f"m{place}", model, lora_alpha=3 + place % 2) for place, model in enumerate(models)
        ]
    return write_stacks(
        root, {name: torch.stack([torch.mm(*model[name]).double() for model in models]) for name in MODULES}
    )


def test_a_row_states_what_a_fit_of_these_ranks_loses_and_keeps(zoo: list[Path], tmp_path: Path) -> None:
    rows = [row for row in ez.plan(zoo).rows if row.core_rank is not None]
    assert len(rows) >= 3
    for row in rows:
        space = ez.fit(zoo, axes=row.axes, rank=row.rank, core_rank=row.core_rank)
        report = space.report
        assert row.exact
        assert row.residual == pytest.approx(report["residual"], abs=tolerance(4, dtype=torch.float32))
        if space.view == "update":
            whole = sum(layer["variance"] for layer in report["layers"].values())
            heldout = sum(layer["heldout"] * layer["variance"] for layer in report["layers"].values()) / whole
            assert row.heldout == pytest.approx(heldout, abs=tolerance(4, dtype=torch.float32))
            assert space.rebuild("m1").ranks().rank == row.lora_rank
        folder = space.save(tmp_path / f"{row.rank}-{row.core_rank}", moments=False)
        saved = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        coefficients = report["bytes"]["per_model"]
        # Headers are counted at most.
        assert saved <= row.bytes <= saved + 12 * 250 + 2300
        assert coefficients <= row.per_model <= coefficients + 250


def test_the_loss_is_numpys(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"m{place}", random_factors({"q": (14, 12)}, 3, place)) for place in range(6)]
    updates = np.stack([read_update(path, "q").double().numpy() for path in paths])
    left = np.linalg.eigh(sum(update @ update.T for update in updates))[1][:, ::-1][:, :8]
    right = np.linalg.eigh(sum(update.T @ update for update in updates))[1][:, ::-1][:, :8]
    tails = [(np.linalg.svd(left.T @ update @ right)[1][1:] ** 2).sum() for update in updates]
    sides = [(update**2).sum() - ((left.T @ update @ right) ** 2).sum() for update in updates]
    row = next(row for row in ez.plan(paths).rows if (row.axes, row.rank, row.core_rank) == (SIDES, 8, 1))
    assert row.residual == pytest.approx((sum(tails) + sum(sides)) / (updates**2).sum(), rel=tolerance(100))
    # Without the cut it is exact too, and no sum of the sides' tails.
    row = next(row for row in ez.plan(paths).rows if (row.axes, row.rank, row.core_rank) == (SIDES, 8, None))
    assert row.residual == pytest.approx(sum(sides) / (updates**2).sum(), rel=tolerance(100))


def test_only_rows_that_no_other_makes_useless_are_there(zoo: list[Path]) -> None:
    rows = [row for row in ez.plan(zoo).rows if row.axes == SIDES]
    for row in rows:
        better = [
            other for other in rows if other != row and other.bytes <= row.bytes and other.residual <= row.residual
        ]
        assert row.core_rank is None or not better
    # Where all sides are whole nothing is shared, and models cut alone are the control.
    assert all(row.rank < 96 for row in rows if row.core_rank is not None)


def test_the_table_and_the_advice_name_the_rank_of_cores(run: Run, zoo: list[Path]) -> None:
    plan = ez.plan(zoo, axes=SIDES)
    text = run("plan", zoo[0].parent, "--axes", ",".join(SIDES)).out
    best = plan.recommended
    assert best is not None
    assert best.core_rank is not None
    assert "core rank" in text
    assert f"→ Try this first: `--axes outputs,inputs --rank {best.rank} --core-rank {best.core_rank}`" in text or (
        plan.better_alone is not None
    )
    # For full weights a budget chooses whole cores, which lose more for these bytes.
    assert ("--budget" in text) is (plan.view == "update")
    assert ("kB --core-rank auto`, which chooses ranks" in text) is (plan.view == "update")
    assert f"at rank {best.rank} with cores of rank {best.core_rank}" in repr(plan)
    document = run("plan", zoo[0].parent, "--axes", ",".join(SIDES), "--json").json
    assert [row["core_rank"] for row in document["rows"]] == [row.core_rank for row in plan.rows]
    assert "core rank" not in run("plan", zoo[0].parent, "--axes", "models").out
