"""Random directions beside the zoo's: orthogonal, the same again, and in the file as two numbers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import eigenzoo as ez
from builders import random_factors, random_stack, seeded, write_adapter, write_stacks
from eigenzoo import adapt
from eigenzoo.adapt.adapter_file import read
from eigenzoo.adapt.augment import Augmentation, _widened
from eigenzoo.adapt.maps import Map, map_of
from eigenzoo.errors import BundleError, FormatError, UsageError
from tolerance import tolerance

FLOAT32 = tolerance(64, dtype=torch.float32)
SHAPES = {"a": (9, 8), "b": (7, 10)}
RANKS = {
    "models": {"models": 3},
    "sides": {"outputs": 4, "inputs": 3},
    "inputs": {"inputs": 3},
    "all": {"models": 3, "outputs": 5, "inputs": 4},
}
CASES = [("weight", name) for name in RANKS] + [("update", name) for name in RANKS if name != "models"]
EXPECTED = {"models": [(5,), (5,)], "sides": [(6, 5), (6, 5)], "inputs": [(9, 5), (7, 5)], "all": [(5,), (5,)]}
"""Shapes of both layers' coefficients with two directions more."""


def fitted(root: Path, view: str, rank: dict[str, int]) -> ez.Subspace:
    if view == "weight":
        stacks = {f"{name}.weight": random_stack(8, shape, place) for place, (name, shape) in enumerate(SHAPES.items())}
        return ez.fit(write_stacks(root, stacks), rank)
    paths = [write_adapter(root / f"m{n}", random_factors(SHAPES, 2, seed=n), lora_alpha=3 + n) for n in range(8)]
    return ez.fit(ez.open_zoo(paths, view=view), rank)


class Net(nn.Module):
    """Both layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 9, bias=False), nn.Linear(10, 7, bias=False)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def widened(space: ez.Subspace, name: str, num: int = 2, seed: int = 0) -> Map:
    layer = map_of(space.layers[name], torch.float64)
    Augmentation(num, seed).widen(layer, name)
    return layer


def columns(layer: Map, shape: tuple[int, ...]) -> torch.Tensor:
    """The map as a dense matrix: what each single coefficient makes, flattened."""
    units = torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64)
    return torch.stack([layer.matrix(unit.view(shape)).flatten() for unit in units])


@pytest.mark.parametrize(("view", "name"), CASES)
def test_directions_are_orthonormal_and_the_zoos_are_among_them(tmp_path: Path, view: str, name: str) -> None:
    space = fitted(tmp_path, view, RANKS[name])
    for (layer, basis), shape in zip(space.layers.items(), EXPECTED[name], strict=True):
        found = widened(space, layer)
        assert Augmentation(2).shape(basis) == shape
        rows = columns(found, shape)
        identity = torch.eye(len(rows), dtype=torch.float64)
        assert torch.allclose(rows @ rows.T, identity, atol=FLOAT32)
        old = columns(map_of(basis, torch.float64), basis.coefficient_shape)
        projector = rows.T @ rows
        assert torch.allclose(old @ projector, old, atol=FLOAT32)
        assert torch.allclose(found.mean(), map_of(basis, torch.float64).mean(), atol=FLOAT32)


@pytest.mark.parametrize(("view", "name"), CASES)
def test_a_model_of_the_zoo_stays_what_it_is(tmp_path: Path, view: str, name: str) -> None:
    space = fitted(tmp_path, view, RANKS[name])
    plain, wide = adapt.attach(net(), space, start="m3"), adapt.attach(net(), space, start="m3", augment=2)
    for one, other in ((plain.module.a, wide.module.a), (plain.module.b, wide.module.b)):
        assert torch.allclose(one.weight, other.weight, atol=FLOAT32 * float(one.weight.detach().abs().max()))
    assert wide.num_trained == sum(int(torch.tensor(shape).prod()) for shape in EXPECTED[name])
    for layer, weight in wide.weights.items():
        new = weight.trained.scales[plain.weights[layer].trained.scales.shape[0] :]
        assert bool((new == plain.weights[layer].trained.scales.min()).all())


def test_training_reaches_what_the_zoo_does_not_span(tmp_path: Path) -> None:
    """With as many directions as a layer has room for every matrix can be reached, without them only the projection."""
    space = fitted(tmp_path, "weight", {"models": 3})
    target = torch.randn(9, 8, generator=seeded(5))
    left = {}
    for num in (0, 4, 100):
        # Of a module in float64 the bases are read as that.
        weight = adapt.attach(net().double(), space, augment=num).weights["a.weight"]
        rows = columns(weight.layer, tuple(weight.trained.start.shape))
        assert len(rows) == min(3 + num, 72)
        wanted = (target - weight.layer.mean()).flatten()
        left[num] = float((wanted - wanted @ rows.T @ rows).square().sum() / wanted.square().sum())
    assert left[0] > left[4] > left[100]
    assert left[100] < FLOAT32


def test_draws_depend_on_seed_and_layer_alone(tmp_path: Path) -> None:
    space = fitted(tmp_path, "weight", {"models": 3})
    first = widened(space, "a.weight").table
    torch.manual_seed(99)
    assert torch.equal(widened(space, "a.weight").table, first)
    assert not torch.allclose(widened(space, "a.weight", seed=1).table[3:], first[3:], atol=0.01)
    # The first of more directions are the same: a larger number adds to them.
    assert torch.allclose(widened(space, "a.weight", num=5).table[:5], first, atol=tolerance(72))


def test_the_draws_stay_what_they_are(tmp_path: Path) -> None:
    """Files hold a seed and no directions: other draws would make them other models."""
    rows = torch.zeros(1, 4, dtype=torch.float64)
    rows[0, 0] = 1.0
    words = np.frombuffer(hashlib.sha256(b"0/layer").digest(), dtype="<u4").astype(np.uint32)
    found = _widened(rows, 2, np.random.RandomState(words))
    drawn = torch.from_numpy(np.random.RandomState(words).standard_normal((2, 4)))[:, 1:]
    one = drawn[0] / drawn[0].norm()
    two = drawn[1] - (drawn[1] @ one) * one
    expected = torch.stack([one, two / two.norm()])
    assert torch.allclose(found[1:, 1:], expected, atol=tolerance(16))
    assert float(found[1:, 0].abs().max()) < tolerance(4)


def test_a_file_says_what_it_was_trained_in(tmp_path: Path) -> None:
    space = fitted(tmp_path / "zoo", "weight", {"models": 3})
    adapted = adapt.attach(net(), space, augment=2, seed=7)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.normal_(generator=seeded(1))
    expected = adapted.module.a.weight.detach().clone()
    path = adapt.save(adapted, tmp_path / "task.safetensors")
    again = adapt.attach(net(), space, augment=2, seed=7)
    adapt.load(path, again)
    assert torch.allclose(again.module.a.weight, expected, atol=FLOAT32)
    assert read(path, space, augmented=True).augmentation == Augmentation(2, 7)
    with pytest.raises(BundleError, match="2 random directions of each layer besides"):
        read(path, space)
    for other in ({"augment": 2}, {"augment": 3, "seed": 7}, {}):
        with pytest.raises(BundleError, match="was trained with augment=2, seed=7"):
            adapt.load(path, adapt.attach(net(), space, **other))
    plain = adapt.save(adapt.attach(net(), space, seed=3), tmp_path / "plain.safetensors")
    adapt.load(plain, adapt.attach(net(), space, seed=4))
    with pytest.raises(BundleError, match="was trained with augment=0"):
        adapt.load(plain, again)


@pytest.mark.parametrize(
    "changed",
    [
        {"augment": "2 "},
        {"augment": "-2"},
        {"augment": "0"},
        {"augment": "x"},
        {"augment_seed": None},
        {"augment": None},
    ],
)
def test_numbers_that_nobody_wrote_are_refused(tmp_path: Path, changed: dict[str, str | None]) -> None:
    space = fitted(tmp_path / "zoo", "weight", {"models": 3})
    path = adapt.save(adapt.attach(net(), space, augment=2), tmp_path / "task.safetensors")
    with safe_open(path, "pt") as opened:
        metadata = {**opened.metadata(), **changed}
        values = opened.get_tensor("coefficients")
    save_file({"coefficients": values}, path, {name: text for name, text in metadata.items() if text is not None})
    with pytest.raises(FormatError, match="no numbers as its random directions"):
        read(path, space, augmented=True)


def test_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    space = fitted(tmp_path / "zoo", "weight", {"models": 3})
    path = adapt.save(adapt.attach(net(), space, augment=2), tmp_path / "task.safetensors")
    with safe_open(path, "pt") as opened:
        metadata, values = opened.metadata(), opened.get_tensor("coefficients")
    save_file({"coefficients": values}, path, {**metadata, "augment": "3"})
    with pytest.raises(BundleError, match="holds 10 coefficients"):
        read(path, space, augmented=True)


def test_what_cannot_be_widened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="beside sums of the zoo's own updates"):
        adapt.attach(net(), fitted(tmp_path, "update", {"models": 3}), augment=2)
    with pytest.raises(UsageError, match="-1 random directions"):
        adapt.attach(net(), fitted(tmp_path / "two", "weight", {"models": 3}), augment=-1)
