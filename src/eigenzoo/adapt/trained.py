"""Parametrise coefficients for training: a start, and steps from it in units of the spread of the zoo's models.

    c = c_start + s ∘ θ,   s_k = √(Σ_n c_nk² / N)

A step of θ by 0.1 moves a weight by a tenth of the zoo's spread in every direction and layer. So one learning rate fits all of
them: 0.1 with Adam is a good first choice (measured: docs/adapt.md).

Legend: N models, K numbers of one layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from eigenzoo.errors import UsageError
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.subspace import Subspace

Self = TypeVar("Self", bound="KeepsDtype")

LEARNING_RATE = 0.1
"""Learning rate of Adam for θ."""


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, in which products run in the dtype of their operands.

    A weight computed under bfloat16 autocast has a relative error of up to 4e-3, which is as much as small fine-tunes change.
    """
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class KeepsDtype(nn.Module):
    """A module whose tensors move to other devices, but keep their dtype if the model is converted to another one."""

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(values: Tensor) -> Tensor:
            changed = fn(values)
            return changed if changed.dtype == values.dtype else values.to(changed.device)

        return cast(Self, super()._apply(moved, recurse))  # type: ignore[no-untyped-call]


class Coefficients(KeepsDtype):
    """One layer's coefficients of any shape. They stay float32 if the model is converted to another dtype.

    Attributes:
        theta: the trained parameter; zero at the start.
        start, scales: c_start and s.
    """

    start: Tensor
    scales: Tensor

    def __init__(self, start: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros_like(start))
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self) -> Tensor:
        """Return c."""
        return self.start + self.scales * self.theta

    def set(self, values: Tensor) -> None:
        """Set θ so that the coefficients are c."""
        with torch.no_grad():
            self.theta.copy_((values.to(self.start) - self.start) / self.scales)


@dataclass(frozen=True)
class Start:
    """The start of training.

    Attributes:
        mean: whether the zoo's mean is part of the weight. Otherwise coefficients are a change of a model's own weights.
        values: each layer's coefficients; zero for layers that are not named.
    """

    mean: bool
    values: dict[str, Tensor]


def scales_of(rows_NK: Tensor) -> Tensor:
    """Return s of one layer from all models' coefficients (N, …), or one if the zoo does not vary.

    s is at least a hundredth of the largest value, so that every direction can be trained.
    """
    spread = rows_NK.double().square().mean(0).sqrt()
    largest = float(spread.max()) if spread.numel() else 0.0
    return (spread.clamp_min(largest / 100) if largest > 0 else torch.ones_like(spread)).float()


ZERO, MEAN, RANDOM = "zero", "mean", "random"


def find_start(space: Subspace, start: str | os.PathLike[str], seed: int = 0) -> Start:
    """Return the start of training.

    Args:
        start: `zero` for the model's own weights, which coefficients change; `mean` for the zoo's mean; `random` for coefficients
            drawn around the mean with the zoo's spread; the name of a model in the bundle; or the path of a model with the same
            layers, which is projected.
        seed: seed of `random`.

    Raises UsageError for any other name, and the errors of `Subspace.project`.
    """
    seed = check_seed(seed)
    if start == ZERO:
        return Start(False, {})
    if start == MEAN:
        return Start(True, {})
    if start == RANDOM:
        generator = torch.Generator().manual_seed(seed)
        scales = {name: scales_of(rows_NK) for name, rows_NK in space.all_coefficients.items()}
        return Start(
            True, {name: scale * torch.randn(scale.shape, generator=generator) for name, scale in scales.items()}
        )
    if str(start) in space.names:
        return Start(True, dict(space.coefficients(str(start)).values))
    if Path(start).exists():
        return Start(True, dict(space.project(start).values))
    raise UsageError(
        f"the start {str(start)!r} is neither a model of the bundle nor a path",
        where=str(space.path),
        rule=f"choose {ZERO}, {MEAN}, {RANDOM}, a model's name, or a path",
    )
