"""Solver `sketch` against dense moments, the exact solver and TensorLy: full weights and updates, from files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference_algebra import Array, axis_basis, center_of, hooi_error, largest_sine, squares, unfold
from reference_cases import energy, rebuilt_stack
from torch.utils._python_dispatch import TorchDispatchMode

import eigenzoo as ez
from builders import random_factors, read_update, regauge, seeded, write_adapter, write_stacks
from eigenzoo.linalg.side import SideMoment
from eigenzoo.linalg.sketch import PASSES, Krylov, num_columns
from eigenzoo.passes.resources import Resources
from eigenzoo.subspace.fitting import tucker_fit
from eigenzoo.subspace.fitting.options import resolve_options
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.sketched import SketchPlan, sketch_sides, sketched_ranks
from tolerance import tolerance

NUM_MODELS, SHAPE, RANK = 7, (160, 150), 4
SIDES = {"outputs": RANK, "inputs": RANK}
LAYERS = ("planted", "noise", "thin_sides", "repeated", "tied", "zero")


def stacks() -> dict[str, torch.Tensor]:
    """Layers long enough for sketches to be used; float32 values, as the files hold them."""
    draw = seeded(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(SHAPE[0], RANK))[0], torch.linalg.qr(normal(SHAPE[1], RANK))[0]
    thin = normal(1, *SHAPE) + 60 * left @ normal(NUM_MODELS, RANK, RANK) @ right.T
    found = {
        "planted": thin + normal(NUM_MODELS, *SHAPE),
        "noise": normal(NUM_MODELS, *SHAPE) * torch.linspace(0.2, 2, NUM_MODELS)[:, None, None],
        "thin_sides": thin,
        "repeated": (thin + normal(NUM_MODELS, *SHAPE))[torch.arange(NUM_MODELS) % 3],
        "tied": normal(1, *SHAPE).expand(NUM_MODELS, -1, -1),
        "zero": torch.zeros(NUM_MODELS, *SHAPE),
    }
    return {name: stack.float().double() for name, stack in found.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_stacks(tmp_path_factory.mktemp("sketch"), stacks())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters of mixed ranks whose updates share a few outputs; the last two are one update in other factors."""
    root, draw, found = tmp_path_factory.mktemp("adapters"), seeded(9), []
    shared = torch.randn(SHAPE[0], 6, generator=draw)
    for place in range(40):
        rank = (8, 4, 2)[place % 3]
        (noise, a_RI), *_ = random_factors({"q": SHAPE}, rank, seed=place, dtype=torch.float32).values()
        factors = {"q": (shared @ torch.randn(6, rank, generator=draw) + 0.3 * noise, a_RI)}
        found.append(write_adapter(root / f"a{place}", factors, lora_alpha=2 * rank))
    return [*found, write_adapter(root / "again", regauge(factors, seed=40), lora_alpha=2 * rank)]


@pytest.fixture(scope="module")
def updates(adapters) -> Array:
    return np.stack([read_update(folder, "q").numpy() for folder in adapters])


def captured(stack_NOI: Array, axis: str, basis: torch.Tensor) -> float:
    return energy(basis.numpy().T @ unfold(stack_NOI, axis))


def check_side(side: SideMoment, stack_NOI: Array, axis: str, rank: int) -> None:
    """What every sketch must be, whatever the layer."""
    values, found = squares(stack_NOI, axis), side.eigenvectors()
    bound = tolerance(max(SHAPE), scale=values.sum())
    assert side.trace == pytest.approx(values.sum(), abs=bound)
    basis = found.basis(rank)
    kept = basis.shape[1]
    assert float((basis.T @ basis - torch.eye(kept)).abs().sum()) <= tolerance(max(SHAPE))
    held = captured(stack_NOI, axis, basis)
    assert float(found.values_K[:rank].sum()) <= held + bound
    assert held <= values[:rank].sum() + bound
    assert values[:rank].sum() <= found.most(rank) + bound
    # Fewer directions than asked only where there are no more.
    assert values[kept:rank].sum() <= bound


@pytest.mark.parametrize("center", ["models", "none", "columns", "global"])
@pytest.mark.parametrize("layer", LAYERS)
def test_sides_of_full_weights(folders, layer, center):
    stack = ez.open_zoo(folders).stack(layer)
    removed = center_of(stacks()[layer].numpy(), center)
    sides = sketch_sides(stack, SIDES, torch.from_numpy(removed))
    for axis, side in sides.items():
        check_side(side, stacks()[layer].numpy() - removed, axis, RANK)


@pytest.mark.parametrize("axis", SIDES)
def test_shared_sides_are_found(folders, axis):
    centered_NOI = stacks()["planted"].numpy() - stacks()["planted"].numpy().mean(0)
    stack = ez.open_zoo(folders).stack("planted")
    side = sketch_sides(stack, {axis: RANK}, stacks()["planted"].mean(0))[axis]
    values = squares(centered_NOI, axis)
    ratio = values[RANK] / values[RANK - 1]
    assert largest_sine(side.eigenvectors().basis(RANK).numpy(), axis_basis(centered_NOI, axis, RANK)) <= ratio**2
    held = captured(centered_NOI, axis, side.eigenvectors().basis(RANK))
    assert values[:RANK].sum() - held <= ratio**2 * values.sum()
    assert side.eigenvectors().most(RANK) - held <= 0.01 * values.sum()


def test_thin_sides_are_exact(folders):
    stack_NOI = stacks()["thin_sides"].numpy()
    centered_NOI = stack_NOI - stack_NOI.mean(0)
    stack = ez.open_zoo(folders).stack("thin_sides")
    for axis, side in sketch_sides(stack, SIDES, stacks()["thin_sides"].mean(0)).items():
        held = captured(centered_NOI, axis, side.eigenvectors().basis(RANK))
        # What float32 files rounded is the only energy that is not in four directions.
        outside = squares(centered_NOI, axis)[RANK:].sum()
        assert energy(centered_NOI) - held <= outside + tolerance(max(SHAPE), scale=energy(centered_NOI))


def test_sides_of_updates_are_those_of_the_products(adapters, updates):
    stack = ez.open_zoo(adapters).stack("q")
    for axis, side in sketch_sides(stack, SIDES, None, seed=3).items():
        check_side(side, updates, axis, RANK)
        rows = torch.from_numpy(unfold(updates, axis))
        moment_SS = rows @ rows.T
        krylov = Krylov(len(rows), num_columns(RANK), seed=3)
        for _ in range(krylov.passes):
            krylov.take(moment_SS @ krylov.block())
        expected = krylov.moment(float(moment_SS.diagonal().sum()))
        error = float((side.matrix_SS - expected.matrix_SS).abs().max())
        # The second block is what S adds to the first: its round-off is that of S over its smallest part.
        assert error <= tolerance(updates.shape[0] * max(SHAPE), scale=float(squares(updates, axis)[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_order_of_models_does_not_matter(folders, adapters, dtype):
    order = torch.randperm(NUM_MODELS, generator=seeded(2)).tolist()
    bound = tolerance(NUM_MODELS * max(SHAPE), dtype=dtype)
    for paths, layer, mean in ((folders, "noise", stacks()["noise"].mean(0)), (adapters[:NUM_MODELS], "q", None)):
        first, other = ez.open_zoo(paths).stack(layer), ez.open_zoo([paths[place] for place in order]).stack(layer)
        first.dtype = other.dtype = dtype
        sides, others = sketch_sides(first, SIDES, mean), sketch_sides(other, SIDES, mean)
        for axis, side in sides.items():
            assert float((side.matrix_SS - others[axis].matrix_SS).abs().max()) <= bound * side.trace
            assert others[axis].outside.energy == pytest.approx(side.outside.energy, abs=bound * side.trace)


def test_models_that_are_there_twice_count_twice(folders, tmp_path):
    noise, mean = stacks()["noise"], stacks()["noise"].mean(0)
    twice = ez.open_zoo(write_stacks(tmp_path, {"noise": torch.cat([noise, noise])})).stack("noise")
    once = sketch_sides(ez.open_zoo(folders).stack("noise"), SIDES, mean)
    for axis, side in sketch_sides(twice, SIDES, mean).items():
        bound = tolerance(2 * NUM_MODELS * max(SHAPE), scale=side.trace)
        assert float((side.matrix_SS - 2 * once[axis].matrix_SS).abs().max()) <= bound
        assert side.outside.energy == pytest.approx(2 * once[axis].outside.energy, abs=bound)


def test_one_pass_serves_both_axes(folders):
    stack = ez.open_zoo(folders).stack("noise")
    mean = stacks()["noise"].mean(0)
    both = sketch_sides(stack, SIDES, mean)
    for axis in SIDES:
        assert torch.equal(both[axis].factor_SP, sketch_sides(stack, {axis: RANK}, mean)[axis].factor_SP)


def test_weights_are_read_once_per_pass(folders, adapters, monkeypatch):
    for paths, layer, method in ((folders, "noise", "matrix"), (adapters, "q", "factors")):
        stack = ez.open_zoo(paths).stack(layer)
        read, places = getattr(stack, method), []
        monkeypatch.setattr(
            stack, method, lambda place, read=read, places=places: (places.append(place), read(place))[1]
        )
        sketch_sides(stack, SIDES, None, passes=3)
        assert places == 3 * list(range(len(paths)))


class LargestSquare(TorchDispatchMode):
    """Watches every tensor that an operation takes or gives: the smaller of its two largest sides."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, found)):
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                self.size = max(self.size, sorted(value.shape)[-2])
        return found


def test_nothing_as_large_as_a_moment_is_formed(tmp_path, adapters):
    # The largest square is that of all test columns and of as many directions of the factor.
    most = 2 * PASSES * num_columns(RANK)
    tall = torch.randn(8, 300, 60, generator=seeded(4), dtype=torch.float64)
    cases = [
        (ez.open_zoo(write_stacks(tmp_path, {"w": tall})).stack("w"), 300, tall.mean(0)),
        (ez.open_zoo(adapters).stack("q"), SHAPE[0], None),
    ]
    for stack, size, removed in cases:
        with LargestSquare() as watch:
            side = sketch_sides(stack, {"outputs": RANK}, removed)["outputs"].eigenvectors()
            side.basis(RANK)
            side.most(RANK)
        assert 0 < watch.size <= most < size
        with LargestSquare() as watch:
            collect(stack, ("outputs",)).outputs.eigenvectors()
        assert watch.size >= size


@pytest.mark.parametrize(
    ("shape", "num_models", "rank", "expected"),
    [
        ((160, 150), 7, 4, {"outputs": 4, "inputs": 4}),  # 4 · 36 = 144 columns would be sketched
        ((144, 145), 7, 4, {"inputs": 4}),
        ((160, 150), 7, 20, {}),
        ((4000, 30), 4, 4, {}),  # 120 columns in all: the factor is exact; and 30 inputs
        ((4000, 30), 5, 4, {"outputs": 4}),
    ],
)
def test_a_sketch_is_made_where_it_is_less_than_the_moment(tmp_path, shape, num_models, rank, expected):
    stack = ez.open_zoo(write_stacks(tmp_path, {"w": torch.zeros(num_models, *shape)})).stack("w")
    assert sketched_ranks(stack, SketchPlan({"outputs": rank, "inputs": rank})) == expected
    assert sketched_ranks(stack, None) == {}


def test_few_updates_are_exact(adapters):
    plan = SketchPlan(SIDES)
    assert sketched_ranks(ez.open_zoo(adapters).stack("q"), plan) == SIDES
    assert sketched_ranks(ez.open_zoo(adapters[:20]).stack("q"), plan) == {}


AXES = [
    {"outputs": RANK},
    {"inputs": RANK},
    {"outputs": RANK, "inputs": RANK},
    {"models": 3, "outputs": RANK},
    {"models": 2, "outputs": RANK, "inputs": RANK},
]


@pytest.mark.parametrize("ranks", AXES, ids="+".join)
def test_a_fit_states_what_a_better_one_could_hold(folders, ranks):
    exact, found = (ez.fit(folders, rank=ranks, dtype="float64", solver=solver) for solver in ("exact", "sketch"))
    for layer in LAYERS:
        stack_NOI = stacks()[layer].numpy()
        centered_NOI = stack_NOI - stack_NOI.mean(0)
        record = found.report["layers"][layer]
        assert exact.report["layers"][layer]["bound"] is None
        assert record["rank"] == exact.report["layers"][layer]["rank"]
        if record["variance"] == 0:
            assert record["bound"] is None
            continue
        total = energy(centered_NOI)
        lost = energy(stack_NOI - rebuilt_stack(found, layer))
        # Coefficients are float32: their rounding adds eps² of the energy, and eps of what is lost.
        slack = tolerance(1, dtype=torch.float32) * 1e-3
        assert record["captured"] == pytest.approx(1 - lost / total, abs=slack)
        best = max(exact.report["layers"][layer]["captured"], 1 - hooi_error(centered_NOI, ranks) / total)
        assert best <= record["captured"] + record["bound"] + slack
        for axis in set(ranks) - {"models"}:
            assert "from a sketch of 72 directions" in record["reason"][axis]
    planted = found.report["layers"]["planted"]
    assert planted["captured"] == pytest.approx(exact.report["layers"]["planted"]["captured"], abs=1e-4)
    if len(ranks) == 1:
        assert planted["bound"] <= 0.01


@pytest.mark.parametrize("ranks", AXES, ids="+".join)
@pytest.mark.parametrize("center", ["models", "none"])
def test_a_fit_of_updates_states_what_a_better_one_could_hold(adapters, updates, ranks, center):
    exact, found = (ez.fit(adapters, rank=ranks, center=center, solver=solver) for solver in ("exact", "sketch"))
    record, other = found.report["layers"]["q"], exact.report["layers"]["q"]
    # The bound is about the whole energy, which bases of updates hold; so is the residual.
    assert 1 - other["residual"] <= 1 - record["residual"] + record["bound"] + tolerance(1, dtype=torch.float32)
    assert record["residual"] == pytest.approx(other["residual"], abs=0.02)
    lost = energy(np.stack([found.rebuild(name).layer("q").numpy() for name in found.names]) - updates)
    assert record["residual"] == pytest.approx(lost / energy(updates), abs=1e-5)


def test_held_out_capture_is_of_sketches_too(folders, monkeypatch):
    stack = ez.open_zoo(folders).stack("planted")
    plan = SketchPlan(SIDES)
    exact, found = (collect(stack, ("outputs", "inputs"), "models", sketch=sketch) for sketch in (None, plan))
    asked = {"exact": exact, "sketch": found}

    def capture(solver: str) -> float | None:
        options = resolve_options(SIDES, None, "models", "float32", None, None, 0, solver)
        assert options.sketch == (plan if solver == "sketch" else None)
        return tucker_fit.tucker_capture(stack, asked[solver], SIDES, options, Resources())

    assert capture("sketch") == pytest.approx(capture("exact"), abs=1e-3)
    monkeypatch.setattr(tucker_fit, "LARGEST_HELD_OUT", 100)
    assert capture("exact") is None
    assert capture("sketch") is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "solver 'sketch' without axis outputs or inputs.*needs no sketch"),
        (
            {"rank": {"outputs": "auto"}},
            "solver 'sketch' with rank 'auto' for axis 'outputs'.*whole spectra.*Give a number",
        ),
        ({"rank": {"outputs": 4, "inputs": 0.9}}, "solver 'sketch' with rank 0.9 for axis 'inputs'"),
        ({"axes": ("outputs",)}, "solver 'sketch' with rank 'auto'"),
        ({"axes": ("outputs",), "budget": 10**9}, "solver 'sketch' with a budget or an error bound.*whole spectra"),
        ({"axes": ("inputs",), "max_error": 0.1}, "solver 'sketch' with a budget or an error bound"),
        ({"rank": {"outputs": 4}, "solver": "random"}, "solver 'random' is unknown.*exact, sketch"),
    ],
)
def test_what_a_sketch_cannot_give_is_refused(folders, options, message):
    with pytest.raises(ez.UsageError, match=message):
        ez.fit(folders, **{"solver": "sketch", **options})


def test_shares_and_auto_of_axis_models_stand_beside_a_sketch(folders):
    for rule in (0.5, "auto"):
        record = ez.fit(folders, rank={"models": rule, "outputs": RANK}, solver="sketch").report["layers"]["planted"]
        assert record["rank"]["outputs"] == RANK
        assert record["bound"] is not None
