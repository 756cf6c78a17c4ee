"""Ranks of sides and cores chosen together, for a budget of bytes or an error bound: kept to, true, and better than either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import eigenzoo as ez
from builders import random_factors, random_stack, read_update, write_adapter, write_stacks
from eigenzoo.errors import BudgetError, UsageError
from tolerance import tolerance

AXES = ("outputs", "inputs")
MODULES = {"a.q": (64, 48), "a.v": (48, 40), "a.o": (40, 56)}
NUM_MODELS, LORA_RANK = 14, 5


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Layers whose updates fall off at unlike rates, between sides that are shared in part."""
    root, draw = tmp_path_factory.mktemp("adapters"), torch.Generator().manual_seed(3)
    shared = {name: [torch.randn(size, 10, generator=draw) for size in shape] for name, shape in MODULES.items()}
    found = []
    for place in range(NUM_MODELS):
        own = random_factors(MODULES, LORA_RANK, place)
        factors = {}
        for number, (name, (left, right)) in enumerate(shared.items()):
            fall = (0.3 + 0.3 * number) ** torch.arange(LORA_RANK)
            b_OR = left @ torch.randn(10, LORA_RANK, generator=draw) + own[name][0]
            a_RI = torch.randn(LORA_RANK, 10, generator=draw) @ right.T + own[name][1]
            factors[name] = (b_OR * fall, a_RI)
        found.append(write_adapter(root / f"m{place}", factors))
    return found


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ranks_of(space: ez.Subspace) -> dict[str, dict[str, int]]:
    return {name: dict(layer["rank"]) for name, layer in space.report["layers"].items()}


@pytest.mark.parametrize("rank", [4, 12])
def test_a_budget_is_kept_on_disk_and_loses_less_than_ranks_that_are_given(
    adapters: list[Path], tmp_path: Path, rank: int
) -> None:
    equal = ez.fit(adapters, axes=AXES, rank=rank, core_rank=2)
    budget = bytes_on_disk(equal.save(tmp_path / "equal", moments=False)) + 8000
    chosen = ez.fit(adapters, axes=AXES, budget=budget, core_rank="auto")
    assert 0.9 * budget <= bytes_on_disk(chosen.save(tmp_path / "chosen", moments=False)) <= budget
    sides = ez.fit(adapters, axes=AXES, budget=budget)
    assert chosen.report["residual"] < min(equal.report["residual"], sides.report["residual"])
    for core_rank in (1, 3):
        asked = ez.fit(adapters, axes=AXES, budget=budget, core_rank=core_rank)
        assert bytes_on_disk(asked.save(tmp_path / f"asked{core_rank}", moments=False)) <= budget
        assert asked.manifest.options["rules"]["cores"] == core_rank
        assert chosen.report["residual"] <= asked.report["residual"] + 0.01
    # The layer whose updates fall off fast has cores of a lower rank than the one whose updates hardly do.
    cores = {name: ranks["cores"] for name, ranks in ranks_of(chosen).items()}
    assert cores["a.q"] <= cores["a.o"]


@pytest.mark.parametrize("core_rank", ["auto", 4])
@pytest.mark.parametrize("stored", [{}, {"dtype": "bfloat16", "coefficients_dtype": "bfloat16"}], ids=["exact", "half"])
@pytest.mark.parametrize("max_error", [0.4, 0.1])
def test_an_error_bound_is_met_by_what_is_lost_and_no_better_than_it_must_be(
    adapters: list[Path], max_error: float, stored: dict[str, str], core_rank: str | int
) -> None:
    space = ez.fit(adapters, axes=AXES, max_error=max_error, core_rank=core_rank, **stored)
    assert 0.93 * max_error <= space.report["residual"] <= max_error
    lost = energy = 0.0
    for path in adapters:
        rebuilt = space.rebuild(path.name)
        for module in MODULES:
            update = read_update(path, module).numpy()
            lost += float(((update - rebuilt.layer(module).numpy()) ** 2).sum())
            energy += float((update**2).sum())
    assert lost / energy == pytest.approx(space.report["residual"], abs=tolerance(4, dtype=torch.float32))


def test_an_error_bound_takes_fewer_bytes_than_whole_cores(adapters: list[Path]) -> None:
    chosen, whole = (ez.fit(adapters, axes=AXES, max_error=0.05, core_rank=core) for core in ("auto", None))
    # Of bases and coefficients: most of so small a bundle is headers.
    assert chosen.report["bytes"]["bundle"] < 0.9 * whole.report["bytes"]["bundle"]
    assert len({ranks["cores"] for ranks in ranks_of(chosen).values()}) > 1


def test_nothing_is_lost_where_nothing_may_be(adapters: list[Path]) -> None:
    space = ez.fit(adapters, axes=AXES, max_error=0.0, core_rank="auto")
    assert space.report["residual"] <= tolerance(10, dtype=torch.float32) ** 2
    assert {ranks["cores"] for ranks in ranks_of(space).values()} == {LORA_RANK}


def test_the_ranks_are_those_of_another_fit(adapters: list[Path]) -> None:
    """What is chosen is what a user could ask for, to the last coefficient."""
    chosen = ez.fit(adapters, axes=AXES, max_error=0.2, core_rank="auto", include=["a.q"])
    ranks = ranks_of(chosen)["a.q"]
    again = ez.fit(
        adapters, axes=AXES, rank={axis: ranks[axis] for axis in AXES}, core_rank=ranks["cores"], include=["a.q"]
    )
    assert chosen.report["residual"] == pytest.approx(again.report["residual"], rel=tolerance(100, dtype=torch.float32))
    first, second = (space.rebuild("m1").layer("a.q").numpy() for space in (chosen, again))
    assert np.abs(first - second).max() <= tolerance(10, dtype=torch.float32, scale=np.abs(first).max())


def test_the_card_has_the_command_of_the_fit(adapters: list[Path], tmp_path: Path) -> None:
    for options, words in (
        ({"budget": 10**5, "core_rank": "auto"}, "--budget 100000 --core-rank auto"),
        ({"rank": 6, "core_rank": 2}, "--rank outputs=6,inputs=6 --core-rank 2"),
    ):
        text = (ez.fit(adapters, axes=AXES, **options).save(tmp_path / words[2:6]) / "README.md").read_text()
        assert all(word in text for word in words.split(" --"))
        assert "cores=" not in text


def test_what_cannot_be_chosen_is_refused(adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"an error bound of 0\.001, but cores of rank 1 lose 0\.\d+ between whole sides"
    ):
        ez.fit(adapters, axes=AXES, max_error=0.001, core_rank=1)
    weights = write_stacks(tmp_path, {"w": random_stack(6, (14, 12), 0)})
    with pytest.raises(UsageError, match="a core rank with a budget or an error bound, and view 'weight'"):
        ez.fit(weights, axes=AXES, budget=10**6, core_rank="auto")
