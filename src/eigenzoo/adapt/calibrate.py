"""Calibrate a model that was rebuilt at too small a rank, on a few hundred samples.

    adapted = calibrate(module, space, "m7", lambda module, step: cross_entropy(module(images), labels), besides=["head.*"])

Projection keeps the closest weights, not the closest function. Some hundred steps on the coefficients find a better point of the
same subspace, and the file stays as small. The loss can be the task's own, or without labels the distance to the original model's
outputs.

The loop is minimal. `training` has one with batches and checkpoints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from eigenzoo.adapt.attach import Adapted, attach, undo
from eigenzoo.adapt.trained import LEARNING_RATE, Start
from eigenzoo.adapt.training import move
from eigenzoo.errors import DataError, UsageError
from eigenzoo.records import Progress, no_progress
from eigenzoo.subspace.subspace import Subspace

Loss = Callable[[nn.Module, int], Tensor]
"""Called with the module and the number of the step, from 0; returns a scalar."""

BESIDES_RATE = 1e-3
"""Learning rate of Adam for ordinary weights such as a head's."""


def calibrate(
    module: nn.Module,
    space: Subspace,
    model: str | os.PathLike[str] | Start,
    loss: Loss,
    *,
    steps: int = 100,
    besides: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    learning_rate: float = LEARNING_RATE,
    besides_rate: float = BESIDES_RATE,
    device: str | None = None,
    progress: Progress = no_progress,
) -> Adapted:
    """Load a rebuilt model into a module, train its coefficients, and return the adapted module.

    Args:
        module: a module of the architecture, with the model's values of everything outside the bundle (a head, biases). Its mode is
            kept.
        space: the subspace.
        model: the name of a model in the bundle, or the path of any model with its layers.
        loss: loss of the module at a step, on all samples or on a batch that the step's number selects.
        steps: number of steps of Adam. The rate falls to zero along a cosine.
        besides: name patterns of other parameters to train, such as a head.
        names: see `attach`.
        learning_rate: rate of the coefficients, in units of the zoo's spread.
        besides_rate: rate of the other trained parameters.
        device: the device to which the module is moved and where it stays (`cpu`, `cuda`, `cuda:1`). None does not move it. The
            loss's data must be on the same device.
        progress: called as progress(stage, done, total).

    Raises the errors of `attach`, UsageError for no steps or a missing device, and DataError if the loss is NaN or Inf. After an
    error or an interruption the module is unchanged except for its device.
    """
    if steps < 1:
        raise UsageError(f"{steps} steps", rule="calibration takes one or more")
    move(module, device)
    adapted = attach(module, space, start=model, besides=besides, names=names)
    try:
        descend(adapted, loss, steps, learning_rate, besides_rate, progress)
    except BaseException:
        undo(adapted)
        raise
    return adapted


def descend(
    adapted: Adapted,
    loss: Loss,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    besides_rate: float = BESIDES_RATE,
    progress: Progress = no_progress,
) -> list[float]:
    """Take steps of Adam with the rate rate·(1 + cos(π t/T))/2 at step t. Return the losses before each step.

    Raises DataError if a loss is NaN or Inf. After an error or an interruption the trained parameters are restored.
    """
    parameters = list(adapted.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    groups = [
        {"params": [weight.trained.theta for weight in adapted.weights.values()], "lr": learning_rate},
        {"params": list(adapted.besides.values()), "lr": besides_rate},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    try:
        with torch.enable_grad():
            return _steps(adapted, loss, steps, optimizer, progress)
    except BaseException:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)
        raise


def _steps(adapted: Adapted, loss: Loss, steps: int, optimizer: torch.optim.Adam, progress: Progress) -> list[float]:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(adapted.module, step)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise DataError(
                f"the loss is {losses[-1]}",
                where=f"step {step}",
                next_step="lower the learning rate, or look at the data",
            )
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress("calibrating", step + 1, steps)
    return losses
