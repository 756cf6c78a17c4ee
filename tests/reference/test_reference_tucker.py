"""Axes `outputs` and `inputs`, with and without `models`: against SVDs of the unfoldings and TensorLy's Tucker."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from reference_algebra import (
    axis_basis,
    center_of,
    hooi_error,
    hosvd_error,
    largest_sine,
    numerical_rank,
    relative_gap,
    squares,
)
from reference_cases import SHAPES, energy, rebuilt_stack, stacks, stored, write_zoo

import eigenzoo as ez
from tolerance import angle_tolerance, tolerance

AXES = ("models", "outputs", "inputs")
SUBSETS = [
    axes for axes in chain.from_iterable(combinations(AXES, count) for count in (1, 2, 3)) if axes != ("models",)
]
RANKS = {"models": 3, "outputs": 2, "inputs": 2}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module", params=SUBSETS, ids="+".join)
def axes(request):
    return request.param


@pytest.fixture(scope="module", params=["models", "none", "columns", "global"])
def fitted(request, zoo, axes):
    return request.param, ez.fit(zoo, rank={axis: RANKS[axis] for axis in axes}, center=request.param, dtype="float64")


def centered(layer: str, center: str) -> tuple[np.ndarray, np.ndarray]:
    stack_NOI = stored(stacks()[layer], torch.float32)
    return stack_NOI, stack_NOI - center_of(stack_NOI, center)


@pytest.mark.parametrize("layer", SHAPES)
def test_error_is_between_the_best_and_that_of_hosvd(fitted, axes, layer):
    center, space = fitted
    stack_NOI, centered_NOI = centered(layer, center)
    lost = energy(stack_NOI - rebuilt_stack(space, layer))
    # Coefficients are float32: their rounding adds eps² of the energy, and eps of what is lost.
    total = energy(centered_NOI)
    bound = tolerance(1, dtype=torch.float32, scale=total) * 1e-3 + 1e-12 * energy(stack_NOI)
    assert space.report["layers"][layer]["residual"] * energy(stack_NOI) == pytest.approx(lost, abs=bound)
    if total <= 1e-12 * energy(stack_NOI):
        assert lost <= bound
        return
    ranks = {axis: min(RANKS[axis], numerical_rank(centered_NOI, axis)) for axis in axes}
    if "models" in axes:
        # TensorLy warns of more shared cores than a core has values.
        ranks["models"] = min(
            ranks["models"], ranks.get("outputs", stack_NOI.shape[1]) * ranks.get("inputs", stack_NOI.shape[2])
        )
    assert lost <= hosvd_error(centered_NOI, ranks) + bound
    assert lost <= sum(squares(centered_NOI, axis)[ranks[axis] :].sum() for axis in axes) + bound
    # De Lathauwer, De Moor, Vandewalle 2000: within the number of axes of the best, which iteration comes near from above.
    assert lost <= len(axes) * hooi_error(centered_NOI, ranks) + bound
    assert lost >= max(squares(centered_NOI, axis)[ranks[axis] :].sum() for axis in axes) - bound
    kept = space.report["layers"][layer]["captured"] * total
    assert kept == pytest.approx(total - lost, abs=bound)


@pytest.mark.parametrize("layer", SHAPES)
def test_sides_are_those_of_the_unfoldings(fitted, axes, layer):
    center, space = fitted
    _, centered_NOI = centered(layer, center)
    basis = space.layers[layer]
    for axis in set(axes) & set(basis.ranks) - {"models"}:
        rank = basis.ranks[axis]
        gap = relative_gap(centered_NOI, axis, rank)
        if not rank or gap < 1e-6:
            continue
        found = basis.tensors.read(f"{layer}/{axis}").numpy()
        assert np.abs(found.T @ found - np.eye(rank)).max() <= tolerance(len(found))
        assert largest_sine(found, axis_basis(centered_NOI, axis, rank)) <= angle_tolerance(centered_NOI.size, gap)


@pytest.mark.parametrize("layer", ["random", "wide", "noisy", "kernel"])
def test_cores_of_outputs_and_inputs_are_those_of_numpy(zoo, layer):
    space = ez.fit(zoo, rank={"outputs": 2, "inputs": 2}, dtype="float64")
    stack_NOI, centered_NOI = centered(layer, "models")
    left, right = axis_basis(centered_NOI, "outputs", 2), axis_basis(centered_NOI, "inputs", 2)
    expected = stack_NOI.mean(0) + left @ (left.T @ centered_NOI @ right) @ right.T
    bound = tolerance(4, dtype=torch.float32, scale=np.abs(stack_NOI).max())
    assert np.abs(rebuilt_stack(space, layer) - expected).max() <= bound
    for name, core in zip(space.names, left.T @ centered_NOI @ right, strict=True):
        found = space.coefficients(name).values[layer].numpy()
        # A core is known up to rotations of its sides: its singular values are not.
        assert np.abs(np.linalg.svd(found, compute_uv=False) - np.linalg.svd(core, compute_uv=False)).max() <= bound


def test_everything_kept_is_everything_back(zoo, axes):
    space = ez.fit(zoo, rank=1.0, axes=axes)
    for layer in SHAPES:
        stack_NOI, _ = centered(layer, "models")
        error = np.abs(rebuilt_stack(space, layer) - stack_NOI).max()
        # Bases and coefficients in float32: one rounding per direction of each axis.
        assert error <= tolerance(3, dtype=torch.float32, scale=np.abs(stack_NOI).max()), layer
    assert space.report["residual"] <= tolerance(30)


def test_exact_low_rank_costs_nothing_and_tells_its_ranks(zoo):
    space = ez.fit(zoo, rank=1.0, axes=("outputs", "inputs"))
    assert space.report["layers"]["thin_sides"]["rank"] == {"outputs": 2, "inputs": 3}
    assert ez.fit(zoo, rank=1.0).report["layers"]["low_rank"]["rank"] == {"models": 3}
    assert ez.fit(zoo, rank=1.0).report["layers"]["repeated"]["rank"] == {"models": 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equal_models_have_no_directions_on_any_axis(tmp_path, axes, dtype):
    zoo = write_zoo(tmp_path, dtype)
    space = ez.fit(zoo, rank={axis: RANKS[axis] for axis in axes})
    assert space.report["layers"]["tied"]["rank"] == dict.fromkeys(axes, 0)
    assert space.report["layers"]["zero"]["rank"] == dict.fromkeys(axes, 0)
