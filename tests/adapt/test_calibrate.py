"""Calibration: beside the least squares that it should end at, and what it gives back to real models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import eigenzoo as ez
from builders import random_stack, seeded, write_stacks
from eigenzoo.adapt import attach
from eigenzoo.adapt.calibrate import calibrate, descend
from eigenzoo.errors import DataError, UsageError

pytest.importorskip("sklearn")

import digit_nets


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return write_stacks(tmp_path, {"weight": random_stack(7, (4, 6))})


def test_it_ends_at_the_weighted_least_squares(paths: list[Path]) -> None:
    """‖(M + L(c) − T) D‖² with inputs D of very different sizes: its minimum over c by lstsq, far from the projection."""
    space, target = ez.fit(paths[:6], 3), torch.randn(4, 6, generator=seeded(3))
    inputs = torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.5, 0.3, 0.1]))
    basis = space.layers["weight"]
    mean = basis.removed().float()
    rows = torch.stack([basis.rebuild(unit) for unit in torch.eye(3)]).float() - mean
    design = (rows @ inputs).flatten(1).T
    expected = torch.linalg.lstsq(design, ((target - mean) @ inputs).flatten()[:, None]).solution[:, 0]
    adapted = calibrate(
        nn.Linear(6, 4, bias=False),
        space,
        paths[6],
        lambda module, step: ((module.weight - target) @ inputs).square().sum(),
        steps=600,
        learning_rate=0.1,
    )
    found, projected = adapted.coefficients()["weight"], space.project(paths[6]).values["weight"]
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    assert float((projected - expected).abs().max()) > 0.1 * float(expected.abs().max())


def test_the_steps_are_adams_along_a_cosine(paths: list[Path]) -> None:
    """One coefficient under a linear loss: Adam moves by the rate at every step, and the rates add up to (T + 1)/2 of the first."""
    space = ez.fit(paths, 1)
    adapted = attach(nn.Linear(6, 4, bias=False), space)
    theta = adapted.weights["weight"].trained.theta
    losses = descend(adapted, lambda module, step: theta.sum() + 0 * module.weight.sum(), 20, learning_rate=0.01)
    assert float(theta.detach()) == pytest.approx(-0.01 * 21 / 2, rel=1e-4)
    assert len(losses) == 20
    assert losses[0] == 0.0
    assert losses[1] == pytest.approx(-0.01, rel=1e-4)


def test_a_loss_that_is_nan_leaves_the_projection(paths: list[Path]) -> None:
    adapted = attach(nn.Linear(6, 4), ez.fit(paths, 3), start="m2", besides=["bias"])
    before, bias = adapted.coefficients()["weight"], adapted.module.bias.detach().clone()

    def loss(module: nn.Module, step: int) -> torch.Tensor:
        return module(torch.ones(2, 6)).square().sum() * (float("nan") if step == 3 else 1.0)

    with pytest.raises(DataError, match="step 3: the loss is nan"):
        descend(adapted, loss, 10)
    assert torch.equal(adapted.coefficients()["weight"], before)
    assert torch.equal(adapted.module.bias, bias)
    with pytest.raises(UsageError, match="0 steps"):
        calibrate(nn.Linear(6, 4), ez.fit(paths, 3), "m2", loss, steps=0)


@pytest.mark.parametrize("besides", [(), pytest.param(("head.*",), marks=pytest.mark.slow)])
def test_two_hundred_images_give_back_what_a_small_rank_has_lost(tmp_path: Path, besides: tuple[str, ...]) -> None:
    """Held-out digits at rank 6: of the accuracy that the projection loses at least a third comes back, on average."""
    nets = digit_nets.make(tmp_path, rank=6)
    lost, kept = 0.0, 0.0
    for task, path in nets.held.items():
        images, labels = (part[:200] for part in digit_nets.digits.load().training_set(task))
        rebuilt = attach(nets.net(path), nets.space, start=path)
        calibrated = calibrate(
            nets.net(path),
            nets.space,
            path,
            lambda module, step, images=images, labels=labels: cross_entropy(module(images), labels),
            besides=besides,
        )
        whole = digit_nets.accuracy(nets.net(path), task)
        lost += whole - digit_nets.accuracy(rebuilt.module, task)
        kept += whole - digit_nets.accuracy(calibrated.module, task)
        moved = not torch.equal(calibrated.module.head.weight, nets.parent["head.weight"])
        assert moved == bool(besides)
    assert lost / len(nets.held) > 0.05, "the rank is not small enough to show anything"
    assert kept < lost * 2 / 3
