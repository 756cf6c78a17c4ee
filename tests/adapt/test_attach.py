"""Coefficients on torch modules: what is computed, trained, stored, and left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import eigenzoo as ez
from builders import random_stack, write_model
from eigenzoo import adapt
from tolerance import tolerance

FLOAT32 = tolerance(64, dtype=torch.float32)


class Net(nn.Module):
    """A convolution, a linear layer, and a head that no zoo holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.conv(images)).mean((2, 3)))))


SHAPES = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "body.weight": (6, 4)}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    stacks = {name: random_stack(9, shape, seed=place) for place, (name, shape) in enumerate(SHAPES.items())}
    return [
        write_model(tmp_path / "zoo" / f"m{model}", {name: stack[model].float() for name, stack in stacks.items()})
        for model in range(9)
    ]


@pytest.fixture
def space(paths: list[Path]) -> ez.Subspace:
    return ez.fit(paths[:8], 4)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


IMAGES = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("start", ["mean", "m2", "path"])
def test_the_weights_are_those_that_the_bundle_rebuilds(space: ez.Subspace, paths: list[Path], start: str) -> None:
    adapted = adapt.attach(net(), space, start=paths[8] if start == "path" else start)
    coefficients = space.project(paths[8]) if start == "path" else space.coefficients("m2" if start == "m2" else "m0")
    rebuilt = space.rebuild(coefficients, mean_only=start == "mean")
    for layer in space.layers:
        expected = rebuilt.layer(layer).float()
        found = _weight(adapted.module, layer)
        assert torch.allclose(found, expected, atol=FLOAT32 * float(expected.abs().max())), layer


def _weight(module: nn.Module, layer: str) -> torch.Tensor:
    path, _, leaf = layer.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def test_start_zero_changes_nothing_and_trains_a_change(space: ez.Subspace) -> None:
    before = net()(IMAGES)
    adapted = adapt.attach(net(), space, start="zero")
    assert torch.allclose(adapted.module(IMAGES), before, atol=FLOAT32)
    assert sum(p.numel() for p in adapted.module.parameters() if p.requires_grad) == adapted.num_trained == 4 * 3
    adapted.module(IMAGES).square().sum().backward()
    assert all(
        parameter.grad is not None and float(parameter.grad.abs().max()) > 0 for parameter in adapted.parameters()
    )
    assert adapted.module.head.weight.grad is None


def test_training_lowers_a_loss_and_moves_nothing_else(space: ez.Subspace) -> None:
    adapted = adapt.attach(net(), space, besides=["head.*"])
    target = torch.tensor([0, 1, 1, 0, 1])
    frozen = {name: p.detach().clone() for name, p in adapted.module.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(adapted.parameters(), adapt.LEARNING_RATE)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(adapted.module(IMAGES), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(frozen[name], dict(adapted.module.named_parameters())[name]) for name in frozen)


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_what_is_saved_comes_back_and_is_small(tmp_path: Path, space: ez.Subspace, start: str) -> None:
    adapted = adapt.attach(net(), space, start=start, besides=["head.bias"])
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    file = adapt.save(adapted, tmp_path / "task.safetensors")
    assert file.stat().st_size <= 4 * adapted.num_trained + 500
    again = adapt.attach(net(), space, start=start, besides=["head.bias"])
    adapt.load(file, again)
    assert torch.allclose(again.module(IMAGES), adapted.module(IMAGES), atol=FLOAT32)
    with pytest.raises(ez.OutputError, match="exists already"):
        adapt.save(adapted, file)
    other = adapt.attach(net(), space, start="zero" if start == "mean" else "mean", besides=["head.bias"])
    with pytest.raises(ez.BundleError, match="another kind of start"):
        adapt.load(file, other)


def test_a_file_of_another_basis_is_refused(tmp_path: Path, space: ez.Subspace, paths: list[Path]) -> None:
    file = adapt.save(adapt.attach(net(), space), tmp_path / "task.safetensors")
    other = ez.fit(paths[1:], 4)
    with pytest.raises(ez.BundleError, match="another basis"):
        adapt.load(file, adapt.attach(net(), other))


def test_detached_weights_are_plain_and_the_same(space: ez.Subspace) -> None:
    adapted = adapt.attach(net(), space, start="m1")
    answer = adapted.module(IMAGES).detach()
    module = adapt.detach(adapted)
    assert torch.equal(module(IMAGES), answer)
    assert set(module.state_dict()) == set(net().state_dict())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_half_precision_and_copies_work(space: ez.Subspace) -> None:
    module = net().to(torch.bfloat16)
    adapted = adapt.attach(module, space)
    assert adapted.module(IMAGES.bfloat16()).dtype == torch.bfloat16
    assert next(adapted.parameters()).dtype == torch.float32


def test_what_does_not_fit_is_refused_before_anything_changes(space: ez.Subspace) -> None:
    module = net()
    module.body = nn.Linear(5, 6)
    with pytest.raises(ez.MismatchError, match=r"parameter 'body.weight': has shape \[6, 5\]"):
        adapt.attach(module, space)
    del module.body
    with pytest.raises(ez.MismatchError, match="are not in the module: "):
        adapt.attach(module, space)
    with pytest.raises(ez.UsageError, match="matches 'tail"):
        adapt.attach(net(), space, besides=["tail.*"])
    with pytest.raises(ez.UsageError, match="neither a model of the bundle nor a path"):
        adapt.attach(net(), space, start="nobody")
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_one_rate_fits_all_layers_because_units_are_the_zoo_s_spread(space: ez.Subspace) -> None:
    adapted = adapt.attach(net(), space)
    for name, weight in adapted.weights.items():
        spread = space.all_coefficients[name].double().square().mean(0).sqrt()
        with torch.no_grad():
            weight.trained.theta.fill_(1.0)
        assert torch.allclose(weight.trained().double(), spread, rtol=1e-5)
