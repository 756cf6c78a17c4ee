"""Trained coefficients: a start, and numbers around it in units of how far apart the zoo's own models lie.

    c = c_start + s ∘ θ,   s_k = √(Σ_n c_nk² / N)

A step of θ by 0.1 moves a weight by a tenth of what tells two models of the zoo apart, in whatever direction and layer, so one
learning rate fits all of them: 0.1 with Adam is a good first choice (measured: docs/adapt.md).

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
"""For Adam, on θ."""


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products run in the dtype of their operands, whatever surrounds it.

    A weight that bfloat16 autocast computes is off by up to 4e-3 of itself, which is as much as small fine-tunes change.
    """
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class KeepsDtype(nn.Module):
    """A module whose tensors go to other devices, but keep their dtype when the model is moved to another one."""

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(values: Tensor) -> Tensor:
            found = fn(values)
            return found if found.dtype == values.dtype else values.to(found.device)

        return cast(Self, super()._apply(moved, recurse))  # type: ignore[no-untyped-call]


class Coefficients(KeepsDtype):
    """One layer's coefficients, any shape; float32 whatever dtype the model is moved to.

    Attributes:
        theta: what is trained; zero at the start.
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
        """Put θ where c is as given."""
        with torch.no_grad():
            self.theta.copy_((values.to(self.start) - self.start) / self.scales)


@dataclass(frozen=True)
class Start:
    """Where training begins.

    Attributes:
        mean: whether the zoo's mean is part of the weight; else coefficients are a change of the weights that a model has.
        values: each layer's coefficients; zero for what is not named.
    """

    mean: bool
    values: dict[str, Tensor]


def scales_of(rows_NK: Tensor) -> Tensor:
    """Return s of one layer from all models' coefficients (N, …); one where the zoo does not vary, so that nothing is lost.

    A direction of less than a hundredth of the largest one counts as much as that: it can still be trained.
    """
    spread = rows_NK.double().square().mean(0).sqrt()
    largest = float(spread.max()) if spread.numel() else 0.0
    return (spread.clamp_min(largest / 100) if largest > 0 else torch.ones_like(spread)).float()


ZERO, MEAN, RANDOM = "zero", "mean", "random"


def find_start(space: Subspace, start: str | os.PathLike[str], seed: int = 0) -> Start:
    """Return where training begins.

    Args:
        start: `zero`: the model as it is (coefficients are a change of its weights); `mean`: the zoo's mean; `random`: about
            the mean, each coefficient drawn as the zoo's are spread; the name of a model in the bundle; or a path of any
            model of the same layers, which is projected.
        seed: of `random`.

    Raises UsageError for a name that is neither, and what `Subspace.project` raises.
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
