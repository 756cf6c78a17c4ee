"""`ez.evaluate`: every variant against dense algebra, random directions and parents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from function_zoos import (
    CASES,
    NUM_FITTED,
    NUM_HELD,
    RANKS,
    SHAPES,
    Recorder,
    assert_close,
    dense,
    reference,
    write_zoo,
)
from safetensors.torch import load_file
from torch import Tensor

import eigenzoo as ez
from builders import (
    random_stack,
    seeded,
)
from eigenzoo.evidence.random_basis import project_randomly
from tolerance import tolerance


@pytest.mark.parametrize(("view", "axes"), CASES)
def test_every_variant_is_what_dense_algebra_says(evaluated: Callable[..., Any], view: str, axes: str) -> None:
    paths, _, _, metric, found = evaluated(view, axes)
    assert found.ranks == (1, 2, 4)
    assert found.secondary_rank == 2
    assert found.heldout
    assert (found.num_models, found.num_fitted) == (NUM_HELD, NUM_FITTED)
    for layer in SHAPES:
        stack = dense(paths, layer, view)
        for place in range(NUM_FITTED, len(paths)):
            measured = found.models[paths[place].name]
            expected = reference(stack[:NUM_FITTED], stack[place], RANKS[axes], view == "update")
            assert torch.equal(metric.of(measured.original)[layer], stack[place])
            assert_close(metric.of(measured.mean)[layer], expected(0, 0))
            for rank in found.ranks:
                assert_close(metric.of(measured.rebuilt[rank])[layer], expected(0, rank))
            assert_close(metric.of(measured.secondary)[layer], expected(2, 4))


@pytest.mark.parametrize(("view", "axes"), CASES)
def test_the_random_basis_is_an_orthogonal_projection_of_the_same_size(
    evaluated: Callable[..., Any], view: str, axes: str
) -> None:
    paths, _, space, metric, found = evaluated(view, axes)
    for layer, shape in SHAPES.items():
        stack = dense(paths, layer, view)
        inside = []
        for place in range(NUM_FITTED, len(paths)):
            measured = found.models[paths[place].name]
            mean, projected = (metric.of(figure)[layer] for figure in (measured.mean, measured.random_basis[4]))
            kept, dropped = projected - mean, stack[place] - projected
            assert abs(float((kept * dropped).sum())) < tolerance(
                10, dtype=torch.float32, scale=float(stack[place].norm()) ** 2
            )
            assert 0 < float(kept.norm()) < 0.99 * float((stack[place] - mean).norm())
            inside.append(kept)
        ranks = {**dict(zip(("outputs", "inputs"), shape, strict=True)), **space.layers[layer].ranks}
        # Seven models would span seven directions, and all rows and columns, if the basis were not shared and small.
        assert numerical_rank(torch.stack(inside).flatten(1)) == min(NUM_HELD, ranks.get("models", NUM_HELD))
        if (view, axes) == ("update", "models"):
            # Four random updates of the zoo's rank, 2.
            ranks |= {axis: min(size, 8) for axis, size in zip(("outputs", "inputs"), shape, strict=True)}
        assert numerical_rank(torch.cat(inside, 1)) == ranks["outputs"]
        assert numerical_rank(torch.cat(inside, 0)) == ranks["inputs"]


def numerical_rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-5))


@pytest.mark.parametrize("num_directions", [0, 1, 5, 19, 20])
@pytest.mark.parametrize("block_bytes", [1, 800, 2**20])
def test_a_random_projection_is_idempotent_symmetric_and_of_its_trace(num_directions: int, block_bytes: int) -> None:
    size = 20

    def project(values: Tensor) -> Tensor:
        return project_randomly(values, num_directions, seeded(3), block_bytes)

    matrix = torch.stack([project(row) for row in torch.eye(size, dtype=torch.float64)])
    # The Gram of directions nearly as many as dimensions is as ill-conditioned as chance makes it.
    bound = tolerance(size, scale=1e4)
    assert float((matrix - matrix.T).abs().max()) < bound
    assert float((matrix @ matrix - matrix).abs().max()) < bound
    assert abs(float(matrix.trace()) - num_directions) < bound


def test_random_directions_hold_their_share_of_the_energy_and_no_more() -> None:
    size, num_directions, draws = 400, 40, 50
    values = random_stack(1, (size,), 1)[0]
    shares = [
        float(project_randomly(values, num_directions, seeded(seed)).square().sum() / values.square().sum())
        for seed in range(draws)
    ]
    # The share is Beta-distributed, with mean k / D; four standard errors of the average of so many.
    deviation = (2 * 0.1 * 0.9 / (size + 2) / draws) ** 0.5
    assert abs(sum(shares) / draws - num_directions / size) < 4 * deviation


@pytest.mark.parametrize("view", ["weight", "delta", "update"])
def test_the_parent_is_the_base_or_a_zero_update_or_unknown(evaluated: Callable[..., Any], view: str) -> None:
    paths, base, _, metric, found = evaluated(view, "models")
    measured = found.models[paths[-1].name]
    if view == "weight":
        assert measured.parent is None
        assert found.mean.parent is None
        assert found.spread.parent is None
        return
    for layer in SHAPES:
        parent = metric.of(measured.parent)[layer]
        if view == "delta":
            assert torch.equal(parent, load_file(base / "model.safetensors")[layer])
        else:
            assert torch.equal(parent, torch.zeros_like(parent))


def test_adapters_seen_as_factors_have_a_zero_update_as_parent_too(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "update")
    space = ez.fit(paths[:5], 2, view="factors")
    metric = Recorder()
    found = ez.evaluate(space, metric, paths[5:6])
    for layer in SHAPES:
        update = metric.of(found.models["m5"].parent)[layer]
        assert torch.equal(update, torch.zeros_like(update))


def test_without_the_models_mean_removed_the_mean_is_that_of_the_coefficients(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space = ez.fit(paths[:4], 4, center="none", dtype="float64")
    metric = Recorder()
    measured = ez.evaluate(space, metric, paths[4:5]).models["m4"]
    for layer in SHAPES:
        stack = dense(paths, layer, "weight")
        assert_close(metric.of(measured.mean)[layer], stack[:4].mean(0))
        basis_KD = torch.linalg.svd(stack[:4].flatten(1), full_matrices=False)[2]
        own, mean = basis_KD @ stack[4].flatten(), basis_KD @ stack[:4].mean(0).flatten()
        assert_close(metric.of(measured.rebuilt[2])[layer].flatten(), own[:2] @ basis_KD[:2])
        assert_close(metric.of(measured.secondary)[layer].flatten(), mean[:2] @ basis_KD[:2] + own[2:] @ basis_KD[2:])
