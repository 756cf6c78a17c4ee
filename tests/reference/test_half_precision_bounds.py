"""Budgets and error bounds hold of the bundle as it is stored: after rounding of the bases, with every header."""

from __future__ import annotations

import pytest
import torch
from test_reference_budget import AXES, MODULES, NUM_MODELS, bytes_on_disk, falling_stacks

import eigenzoo as ez
from builders import random_factors, write_adapter, write_stacks
from eigenzoo.errors import BudgetError
from eigenzoo.passes.workers import local_workers
from eigenzoo.records import no_progress
from eigenzoo.subspace.fitting import allocation
from eigenzoo.subspace.fitting import bytes as counting
from eigenzoo.subspace.fitting.options import resolve_options
from eigenzoo.subspace.moments.moments_cache import MomentsCache

DTYPES = ["float32", "bfloat16", "float16", "int8", "nf4"]
CODED = ("int8", "nf4")


@pytest.fixture(scope="module", params=["full weights", "updates"])
def zoo(request, tmp_path_factory) -> ez.Zoo:
    root = tmp_path_factory.mktemp("zoo")
    if request.param == "full weights":
        return ez.open_zoo(write_stacks(root, falling_stacks()))
    factors = [random_factors(MODULES, 4, seed=place) for place in range(NUM_MODELS)]
    return ez.open_zoo([write_adapter(root / f"adapter-{place}", update) for place, update in enumerate(factors)])


def lost(zoo: ez.Zoo, space: ez.Subspace) -> float:
    """The share of the energy that lies between the models and what is rebuilt of them, from dense matrices."""
    distance = whole = 0.0
    for name, basis in space.layers.items():
        stack = zoo.stack(name)
        for place, model in enumerate(zoo.names):
            matrix = torch.mm(*stack.factors(place)) if zoo.view == "update" else stack.matrix(place).double()
            values = basis.rebuild(space.coefficients(model).values[name])
            other = values if isinstance(values, torch.Tensor) else values[0] @ values[1]
            distance, whole = distance + float((matrix - other).square().sum()), whole + float(matrix.square().sum())
    return distance / whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_the_error_bound_holds_of_bases_as_they_are_stored(zoo, axes, dtype):
    """The bound is put where ranks that are chosen by spectra alone meet it exactly, so that any rounding breaks it."""
    plain = ez.fit(zoo, axes=axes, max_error=0.05, dtype="float32")
    bound = plain.report["residual"] * (1 + 1e-9)
    space = ez.fit(zoo, axes=axes, max_error=bound, dtype=dtype)
    assert space.report["residual"] <= bound
    # Coefficients are float32.
    assert lost(zoo, space) == pytest.approx(space.report["residual"], rel=1e-6, abs=1e-12)
    # Quantised directions cost so much less beside coefficients that other layers get them.
    if dtype not in CODED:
        ranks = [layer["rank"] for layer in space.report["layers"].values()]
        least = [layer["rank"] for layer in plain.report["layers"].values()]
        assert sum(sum(rank.values()) for rank in ranks) >= sum(sum(rank.values()) for rank in least)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_a_bound_that_rounding_alone_exceeds_is_refused(zoo, axes, dtype):
    # Factors keep the dtype of their files unless they are quantised, and a side that is kept whole has no basis.
    stacked = zoo.view == "update" and axes == ("models",)
    if (zoo.view == "update") == (axes == ("models",)) and axes in AXES[:3] and not (stacked and dtype in CODED):
        assert ez.fit(zoo, axes=axes, max_error=1e-12, dtype=dtype).report["residual"] <= 1e-12
        return
    with pytest.raises(
        BudgetError,
        match=rf"an error bound of 1e-12, but with all directions bases in {dtype} lose \S+\. .*Use dtype float32",
    ):
        ez.fit(zoo, axes=axes, max_error=1e-12, dtype=dtype)
    assert ez.fit(zoo, axes=axes, max_error=1e-12).report["residual"] <= 1e-12


def test_the_budget_holds_of_what_is_written_though_headers_take_more_than_was_counted(zoo, tmp_path, monkeypatch):
    budget = bytes_on_disk(ez.fit(zoo, axes=("outputs", "inputs"), rank=6).save(tmp_path / "six"))
    monkeypatch.setattr(counting, "MANIFEST_PER_MODEL", 0)
    monkeypatch.setattr(counting, "MANIFEST_PER_LAYER", 100)
    for place, dtype in enumerate(DTYPES):
        bundle = ez.fit(zoo, axes=("outputs", "inputs"), budget=budget, dtype=dtype, workspace=tmp_path).save(
            tmp_path / f"b{place}"
        )
        assert 0.9 * budget <= bytes_on_disk(bundle) <= budget
    whole = bytes_on_disk(ez.fit(zoo, axes=("outputs", "inputs"), rank=0).save(tmp_path / "none"))
    with pytest.raises(BudgetError, match=r"means, carried tensors and headers alone take [\d,]+"):
        ez.fit(zoo, axes=("outputs", "inputs"), budget=whole - 1)


def test_a_budget_for_which_there_is_no_room_is_refused_before_any_weight_is_read(zoo, monkeypatch):
    def read(*given, **named):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(allocation, "collect", read)
    for axes in AXES:
        with pytest.raises(BudgetError, match=r"a budget of 500 bytes, but means, carried tensors and headers alone"):
            ez.fit(zoo, axes=axes, budget=500)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_layers_without_a_direction_hold_no_variance(zoo, dtype):
    """Rounding must not make a share of less than nothing of it, which no manifest takes."""
    for axes in AXES:
        space = ez.fit(zoo, 0, axes=axes, dtype=dtype)
        assert {layer["captured"] for layer in space.report["layers"].values()} == {0.0}


def test_a_bound_that_rounding_just_exceeds_takes_one_more_direction_and_not_all(tmp_path):
    """The bound lies above the tail of three directions by nine tenths of what rounding adds to it."""
    zoo = ez.open_zoo(write_stacks(tmp_path, dict(list(falling_stacks().items())[:1])))
    exact, stored = (ez.fit(zoo, 3, dtype=dtype).report["residual"] for dtype in ("float32", "bfloat16"))
    bound = exact + 0.9 * (stored - exact)
    space = ez.fit(zoo, max_error=bound, dtype="bfloat16")
    assert [layer["rank"] for layer in space.report["layers"].values()] == [{"models": 4}]
    assert space.report["residual"] <= bound < stored


@pytest.mark.parametrize("bound", [{"budget": 60_000}, {"max_error": 0.05}], ids="".join)
def test_ranks_that_exceed_a_bound_are_not_chosen_again(zoo, bound):
    """By whatever little they exceed it: what they leave of the bound is no room for headers and rounding."""
    options = resolve_options(None, None, "models", "bfloat16", bound.get("budget"), bound.get("max_error"), 0)
    with local_workers(num=1) as workers:
        found = allocation.allocate(zoo, options, workers, MomentsCache(zoo, None), no_progress)
    chosen = found.per_layer(found.bound)
    tightened = found.per_layer(found.tightened(chosen, found.bound * (1 + 1e-9), 1))
    assert [layer.rules for layer in tightened.values()] != [layer.rules for layer in chosen.values()]
