"""Maps: what coefficients are to a weight, beside the bundle's own rebuilding of the same coefficients."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.adapt.maps import apply, dense, follow, freeze, map_of, sides
from tolerance import tolerance

FLOAT32 = tolerance(64, dtype=torch.float32)
MODULES = {"block.0.q": (9, 8), "block.1.q": (7, 10)}
RANKS = {
    "models": {"models": 3},
    "sides": {"outputs": 4, "inputs": 3},
    "inputs": {"inputs": 3},
    "outputs": {"outputs": 4},
    "all": {"models": 3, "outputs": 5, "inputs": 4},
}


def fitted(root: Path, view: str, rank: dict[str, int]) -> ez.Subspace:
    if view == "weight":
        stacks = {"a.weight": random_stack(8, (9, 8)), "b.weight": random_stack(8, (7, 10), seed=1)}
        return ez.fit(write_stacks(root, stacks), rank)
    paths = [write_adapter(root / f"m{n}", random_factors(MODULES, 2, seed=n), lora_alpha=3 + n) for n in range(8)]
    return ez.fit(ez.open_zoo(paths, view=view), rank)


CASES = [("weight", name) for name in RANKS] + [("update", name) for name in RANKS]


@pytest.mark.parametrize(("view", "name"), CASES)
def test_a_map_makes_what_the_bundle_rebuilds(tmp_path: Path, view: str, name: str) -> None:
    space = fitted(tmp_path, view, RANKS[name])
    for layer, basis in space.layers.items():
        layer_map = map_of(basis)
        coefficients = space.coefficients("m3").values[layer]
        expected = space.rebuild("m3").layer(layer).reshape(basis.layer.shape).float()
        found = layer_map.matrix(coefficients) + layer_map.mean()
        assert torch.allclose(found, expected, atol=FLOAT32 * float(expected.abs().max()))
        inputs = torch.randn(5, basis.layer.shape[1], generator=torch.Generator().manual_seed(0))
        answer = follow([layer_map.chains(coefficients, mean=True)], inputs, apply)
        assert torch.allclose(answer, inputs @ expected.T, atol=FLOAT32 * float((inputs @ expected.T).abs().max()))
        change = follow([layer_map.chains(coefficients, mean=False)], inputs, apply)
        assert torch.allclose(
            change, inputs @ layer_map.matrix(coefficients).T, atol=FLOAT32 * float(answer.abs().max())
        )
        factors = layer_map.factors(coefficients, mean=True)
        assert (factors is None) == (layer_map.before is None or view == "weight")
        if factors is not None:
            assert torch.allclose(factors[0] @ factors[1], expected, atol=FLOAT32 * float(expected.abs().max()))


@pytest.mark.parametrize(("view", "name"), CASES)
def test_chains_multiply_to_the_map_and_its_transpose(tmp_path: Path, view: str, name: str) -> None:
    """What lies beside a weight has no mean that is not a middle, and the dtypes that it is cast to."""
    space = fitted(tmp_path, view, RANKS[name])
    for (layer, basis), transposed in product(space.layers.items(), (False, True)):
        coefficients = space.coefficients("m3").values[layer].double()
        frozen, whole = freeze(basis, transposed=transposed, dtype=torch.float64), map_of(basis, torch.float64)
        assert frozen.offset is None
        expected = whole.matrix(coefficients) + (whole.mean() if view == "update" else 0)
        expected = expected.T if transposed else expected
        stages = [frozen.chains(coefficients, mean=True)]
        left, right = sides(stages)
        for found in (dense(stages, torch.float64), left @ right):
            assert torch.allclose(found, expected, rtol=0, atol=tolerance(64) * float(expected.abs().max()))
        frozen.cast(torch.device("cpu"), torch.bfloat16)
        large = {part.dtype for part in (frozen.before, frozen.after) if part is not None}
        assert large == (set() if frozen.is_dense else {torch.bfloat16})
        assert frozen.table is None or frozen.table.dtype == (torch.bfloat16 if frozen.is_dense else torch.float32)


@pytest.mark.parametrize(("view", "name"), CASES)
def test_a_map_is_linear_and_its_gradient_is_its_adjoint(tmp_path: Path, view: str, name: str) -> None:
    """⟨G, L(c)⟩ = ⟨L*(G), c⟩ for every G: what training follows."""
    space = fitted(tmp_path, view, RANKS[name])
    basis = next(iter(space.layers.values()))
    layer_map = map_of(basis, torch.float64)
    generator = torch.Generator().manual_seed(1)
    one, two = torch.randn(2, *basis.coefficient_shape, generator=generator, dtype=torch.float64)
    summed = layer_map.matrix(one) + 2 * layer_map.matrix(two)
    assert torch.allclose(layer_map.matrix(one + 2 * two), summed, rtol=1e-9, atol=1e-9)
    direction = torch.randn(basis.layer.shape, generator=generator, dtype=torch.float64)
    one.requires_grad_()
    (layer_map.matrix(one) * direction).sum().backward()
    assert one.grad is not None
    assert float((one.grad * two).sum()) == pytest.approx(float((layer_map.matrix(two) * direction).sum()), rel=1e-9)


@pytest.mark.parametrize(("view", "name"), [case for case in CASES if case[1] != "inputs"])
def test_a_random_basis_keeps_the_mean_and_the_sizes(tmp_path: Path, view: str, name: str) -> None:
    space = fitted(tmp_path, view, RANKS[name])
    for layer, basis in space.layers.items():
        learned, drawn = map_of(basis), map_of(basis)
        drawn.randomize(torch.Generator().manual_seed(3))
        assert torch.allclose(drawn.mean(), learned.mean(), atol=FLOAT32 * float(learned.mean().abs().max()))
        coefficients = space.coefficients("m3").values[layer]
        size, found = float(learned.matrix(coefficients).norm()), drawn.matrix(coefficients)
        assert found.shape == learned.matrix(coefficients).shape
        # Sums of random updates have no size that is known; whole directions and sides keep it exactly.
        low, high = (1 - FLOAT32, 1 + FLOAT32) if (view, name) != ("update", "models") else (0.2, 5)
        assert low * size <= float(found.norm()) <= high * size
        inputs = torch.randn(5, basis.layer.shape[1])
        whole = drawn.matrix(coefficients) + drawn.mean()
        answer = follow([drawn.chains(coefficients, mean=True)], inputs, apply)
        assert torch.allclose(answer, inputs @ whole.T, atol=FLOAT32 * float(answer.abs().max()))
