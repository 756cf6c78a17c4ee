"""Calibration: a model that was rebuilt at too small a rank, made good again on a few hundred samples.

    adapted = calibrate(module, space, "m7", lambda module, step: cross_entropy(module(images), labels), besides=["head.*"])

Projection keeps the closest weights, not the closest function. Some hundred steps on the coefficients find a better point of the
same subspace; what is stored is as small as before. Any loss does: the task's own, or, where no labels are at hand, the distance to
the outputs that the whole model gives.

The loop is the plainest there is; `training` has one with batches and checkpoints.
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
"""For Adam, on plain weights such as a head's."""


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
    """Put a model as the subspace rebuilds it into a module, train its coefficients, and return the adapted module.

    Args:
        module: of the architecture, with what the bundle does not hold (a head, biases) as the model has it; its mode is kept.
        space: the subspace.
        model: the name of a model in the bundle, or the path of any model of its layers.
        loss: of the module, at each step; on all samples, or on a batch by the number of the step.
        steps: of Adam; the rate falls to zero along a cosine.
        besides: patterns of the names of parameters that are trained too, a head say.
        names: see `attach`.
        learning_rate: of the coefficients, in units of the zoo's spread.
        besides_rate: of what is trained besides.
        device: where the module is moved to (`cpu`, `cuda`, `cuda:1`), and stays; None: it stays where it is. The loss brings its
            own data, and has them there.
        progress: called as progress(stage, done, total).

    Raises what `attach` raises, UsageError for no steps and a device that is not there, and DataError where the loss is NaN or Inf.
    Whatever is raised, an interruption too, the module is as it was before, but for its device.
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
    """Take steps of Adam along a cosine, rate·(1 + cos(π t/T))/2 at step t; returns the losses before each of them.

    Raises DataError where one is NaN or Inf. Whatever is raised, an interruption too, what is trained is put back to where it was.
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
