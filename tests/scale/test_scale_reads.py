"""How often a plan and a fit read the weights: counted in values that stacks hand out, over all values that there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.linalg import heldout
from eigenzoo.passes.resources import Resources
from eigenzoo.passes.workers import Workers, local_workers
from eigenzoo.subspace.fitting import allocation
from eigenzoo.zoo.stack import DenseStack, UpdateStack
from eigenzoo.zoo.zoo import Zoo

NUM_MODELS = 10
SHAPES = {"a": (20, 12), "b": (16, 18)}


@pytest.fixture(scope="module", params=["weights", "updates"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten models, each with a tensor and a file of its own that are carried."""
    root = tmp_path_factory.mktemp("zoo")
    others = [{"step": torch.tensor([place])} for place in range(NUM_MODELS)]
    if request.param == "weights":
        stacks = {name: random_stack(NUM_MODELS, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
        write_stacks(root, stacks | {"step": torch.arange(NUM_MODELS)[:, None]}, torch.float64)
        for place in range(NUM_MODELS):
            (root / f"m{place}" / "config.json").write_text(f'{{"place": {place}}}')
        return root
    for place in range(NUM_MODELS):
        write_adapter(root / f"m{place}", random_factors(SHAPES, 3, place), others=others[place])
    return root


class Reads:
    """Values that were read, by what they were read for: times each value."""

    def __init__(self, zoo: Zoo) -> None:
        self.counts: Counter[str] = Counter()
        self._whole = {
            name: len(zoo) * layer.num_values if layer.kind == "dense" else 3 * len(zoo) * sum(layer.shape)
            for name, layer in zoo.layers.items()
        }

    def times(self) -> float:
        """How often all weights were read."""
        return sum(self.counts[name] for name in self._whole) / sum(self._whole.values())


@contextmanager
def counted(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    reads = Reads(zoo)
    read, matrix, stored, tile = DenseStack.read, DenseStack.matrix, UpdateStack.stored_factors, UpdateStack.tile

    def count_rows(self: Any, start: int, stop: int, rows: torch.Tensor) -> None:
        reads.counts[self.layer.name] += rows.numel()
        read(self, start, stop, rows)

    def count_matrix(self: Any, place: int) -> torch.Tensor:
        reads.counts[self.layer.name] += self.layer.num_values
        return matrix(self, place)

    def count_factors(self: Any, place: int) -> Any:
        reads.counts[self.layer.name] += self.ranks[place] * sum(self.layer.shape)
        return stored(self, place)

    def count_tile(self: Any, places: Any, *room: torch.Tensor) -> Any:
        reads.counts[self.layer.name] += sum(self.ranks[place] for place in places) * sum(self.layer.shape)
        return tile(self, places, *room)

    carried = Zoo.read_carried

    def count_carried(self: Any, place: int, name: str) -> torch.Tensor:
        reads.counts["carried"] += 1
        return carried(self, place, name)

    with monkeypatch.context() as patch:
        patch.setattr(DenseStack, "read", count_rows)
        patch.setattr(DenseStack, "matrix", count_matrix)
        patch.setattr(UpdateStack, "stored_factors", count_factors)
        patch.setattr(UpdateStack, "tile", count_tile)
        patch.setattr(Zoo, "read_carried", count_carried)
        yield reads


def small_workers(workers: Workers) -> Workers:
    """The same threads, with no memory to keep a layer's rows in."""
    return Workers(workers._executor, workers.num, Resources(layer_bytes=0))


def test_a_plan_reads_the_weights_once_and_a_second_one_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = ez.open_zoo(root)
    monkeypatch.setenv("EIGENZOO_CACHE", str(root.with_name(f"{root.name}-cache")))
    plans = []
    # Models cut alone cost two reads more of full weights: their mean is not in the moments.
    monkeypatch.setattr(allocation, "is_affordable", lambda zoo: False)
    for times in (1, 0):
        with counted(zoo, monkeypatch) as reads:
            plans.append(ez.plan(zoo, axes=("models",)))
        assert reads.times() == times
    assert plans[0] == plans[1]


def test_a_plan_of_all_axes_reads_for_moments_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of choices and ranks: the Gram's read, and one for each side that rows of one block do not give.

    Small full weights are read twice more for models cut alone, and twice for cores; updates once for cores, and for held-out
    shares: the moments of four models of five, and every model between their sides.
    """
    zoo = ez.open_zoo(root)
    with counted(zoo, monkeypatch) as reads:
        rows = ez.plan(zoo).rows
    assert len({row.axes for row in rows}) == 5
    # A layer of one value is not read for models cut alone.
    assert reads.times() == pytest.approx(2 + 2 + 2 if zoo.view == "weight" else 3 + 1 + 3 * 0.8 + 1, abs=0.01)
    assert reads.counts["carried"] == sum(len(zoo.carried(place)) for place in range(len(zoo)))


def test_folds_are_fitted_once_for_all_ranks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, folds, hold_out = ez.open_zoo(root), [], heldout.hold_out

    def count(*given: Any) -> Any:
        folds.append(given)
        return hold_out(*given)

    with monkeypatch.context() as patch:
        patch.setattr(heldout, "hold_out", count)
        rows = ez.plan(zoo, axes=("models",)).rows
    assert len(folds) == 5 * len(zoo.layers)
    for row in rows[1:]:
        layers = ez.fit(zoo, min(row.rank, NUM_MODELS - 1)).report["layers"].values()
        whole = sum(layer["variance"] for layer in layers)
        assert row.heldout == pytest.approx(sum(layer["heldout"] * layer["variance"] for layer in layers) / whole)


@pytest.mark.parametrize("bound", [{"max_error": 0.05}, {"budget": 60_000}], ids=str)
@pytest.mark.parametrize("axes", [("models",), ("outputs", "inputs"), ("models", "outputs")], ids=",".join)
def test_a_bound_costs_no_read_that_the_ranks_would_not(
    root: Path, monkeypatch: pytest.MonkeyPatch, axes: tuple[str, ...], bound: dict[str, Any]
) -> None:
    """Moments once, for the choice and for the fit; of full weights on axis `models` the basis comes from a second read."""
    zoo = ez.open_zoo(root)
    cores = {"core_rank": "auto"} if zoo.view == "update" and axes == ("outputs", "inputs") else {}
    with local_workers() as opened:
        workers = small_workers(opened)
        with counted(zoo, monkeypatch) as reads:
            space = ez.fit(zoo, axes=axes, **bound, **cores, cache=False, workers=workers)
        ranks = {axis: max(layer["rank"][axis] for layer in space.report["layers"].values()) for axis in axes}
        with counted(zoo, monkeypatch) as others:
            ez.fit(zoo, ranks, cache=False, workers=workers)
    assert reads.times() == others.times()
    if axes == ("models",):
        assert reads.times() == 2


def test_a_bound_on_kept_moments_reads_for_the_basis_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = ez.open_zoo(root)
    monkeypatch.setenv("EIGENZOO_CACHE", str(root.with_name(f"{root.name}-cache-of-fits")))
    for times in (2, 1):
        with counted(zoo, monkeypatch) as reads:
            ez.fit(zoo, max_error=0.1)
        assert reads.times() == times
