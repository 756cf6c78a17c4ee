"""Choosing a merge: by one part of the data, reported on another, beside controls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, read_update, write_adapter
from eigenzoo.errors import DataError, UsageError
from eigenzoo.merge.choosing import DOES_NOT_PAY, PAYS, UNDECIDED, choose, nai

MODULES = {"a.q_proj": (12, 10), "b.q_proj": (12, 10)}


def adapters(folder: Path, num: int = 3, shared: float = 0.0) -> list[Path]:
    """Adapters whose updates have a share of one common update in them."""
    common = random_factors(MODULES, 2, seed=99)
    paths = []
    for number in range(num):
        own = random_factors(MODULES, 2, seed=number)
        factors = {
            module: (
                torch.cat([own[module][0] * (1 - shared), common[module][0] * shared], 1),
                torch.cat([own[module][1], common[module][1]]),
            )
            for module in MODULES
        }
        paths.append(write_adapter(folder / f"m{number}", factors))
    return paths


class Nearness:
    """How near a model's updates are to each of the targets: 1 at the target, 0 at the base."""

    def __init__(self, targets: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.targets, self.calls = targets, list[tuple[str, str]]()

    def __call__(self, path: Path, part: str) -> dict[str, float]:
        self.calls.append((Path(path).name, part))
        scores = {}
        for task, wanted in self.targets.items():
            lost = sum(float((self.update(path, module) - each).square().sum()) for module, each in wanted.items())
            scores[task] = 1 - lost / sum(float(each.square().sum()) for each in wanted.values())
        return scores

    def update(self, path: Path, module: str) -> Tensor:
        return torch.zeros(12, 10).double() if Path(path).name == "base" else read_update(Path(path), module)


def targets_of(paths: list[Path]) -> dict[str, dict[str, Tensor]]:
    return {path.name: {module: read_update(path, module) for module in MODULES} for path in paths}


def test_the_best_multiple_of_a_sum_is_found_and_reported_on_the_other_part(tmp_path: Path) -> None:
    paths = adapters(tmp_path, shared=0.8)
    common = {module: sum(read_update(path, module) for path in paths) * 0.5 for module in MODULES}
    metric = Nearness({"all": common})  # type: ignore[dict-item]
    chosen = choose(ez.open_zoo(paths), metric, methods=["mean", "task_arithmetic"])
    # The target is 1.5 times the mean, one of the sizes.
    assert chosen.best.score == pytest.approx(1.0, abs=1e-9)
    assert chosen.controls["merged"].mean == pytest.approx(1.0, abs=1e-9)
    assert chosen.verdict == UNDECIDED  # one task says nothing of others
    tests = [name for name, part in metric.calls if part == "test"]
    assert tests == ["merged", "merged", chosen_single(metric, chosen)]
    # The mean is the same merge as the sum at the same size, and is not tried beside it.
    assert len(chosen.tried) == 4 + 9
    json.dumps(chosen.to_dict(), allow_nan=False)


def chosen_single(metric: Nearness, chosen: Any) -> str:
    return [name for name, part in metric.calls if part == "test"][-1]


def test_merging_pays_where_models_share_what_they_learned(tmp_path: Path) -> None:
    paths = adapters(tmp_path, num=8, shared=0.5)
    chosen = choose(
        ez.open_zoo(paths), Nearness(targets_of(paths)), methods=["mean", "task_arithmetic"], parent=tmp_path / "base"
    )
    assert chosen.verdict == PAYS
    assert chosen.controls["own"].mean == pytest.approx(1.0)
    assert chosen.controls["base"].mean == 0
    assert chosen.nai == pytest.approx(chosen.controls["merged"].mean)
    assert "merging pays: merged" in chosen.text
    assert "over 8 tasks" in chosen.text


def test_merging_unrelated_models_does_not_pay(tmp_path: Path) -> None:
    """A task is solved by what is near to its own model, and no merge is near to any of them."""
    paths = adapters(tmp_path)

    def solved(path: Path, part: str) -> dict[str, float]:
        return {task: float(score > 0.7) for task, score in Nearness(targets_of(paths))(path, part).items()}

    chosen = choose(ez.open_zoo(paths), solved, methods=["mean", "ties"], parent=tmp_path / "base")
    assert chosen.verdict == DOES_NOT_PAY
    assert "merging does not pay: merged" in chosen.text


def test_weights_and_ranks_are_searched(tmp_path: Path) -> None:
    """The target is the first model alone, at rank 2 of its own."""
    paths = adapters(tmp_path)
    metric = Nearness({"first": targets_of(paths)["m0"]})
    chosen = choose(ez.open_zoo(paths), metric, methods=["task_arithmetic"], ranks=[2])
    assert chosen.best.weights is not None
    assert chosen.best.weights[1:] == (0.0, 0.0)
    assert any(candidate.rank == 2 for candidate in chosen.tried)


def test_wrong_metrics_are_named(tmp_path: Path) -> None:
    zoo = ez.open_zoo(adapters(tmp_path, 2))
    with pytest.raises(DataError, match="the metric returned all: nan"):
        choose(zoo, lambda path, part: float("nan"), methods=["mean"])
    with pytest.raises(DataError, match="the metric returned nothing"):
        choose(zoo, lambda path, part: {}, methods=["mean"])
    with pytest.raises(DataError, match="the metric returned other tasks for"):
        choose(zoo, lambda path, part: {Path(path).name: 1.0}, methods=["mean"])
    with pytest.raises(UsageError, match="method 'best' is unknown"):
        choose(zoo, lambda path, part: 1.0, methods=["best"])
    with pytest.raises(UsageError, match="no methods are given"):
        choose(zoo, lambda path, part: 1.0, methods=[])


def test_nai_is_a_mean_over_tasks() -> None:
    controls = {
        "base": {"a": 0.5, "b": 0.2, "c": 0.3},
        "own": {"a": 0.9, "b": 0.6, "c": 0.3},
        "merged": {"a": 0.7, "b": 0.5, "c": 0.1},
    }
    assert nai(controls) == pytest.approx((0.5 + 0.75) / 2)
    assert nai({"merged": {"a": 1.0}}) is None
