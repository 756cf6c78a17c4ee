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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from eigenzoo.errors import UsageError
from eigenzoo.linalg.low_rank import LowRank, multiply
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

    Low-rank cores are trained as what they are kept as: the numbers c are those of two factors, and the coefficients their product.

    Attributes:
        theta: the trained parameter; zero at the start.
        start, scales: c_start and s.
        center: of low-rank cores the mean, where it is part of the matrix that the factors make.
    """

    start: Tensor
    scales: Tensor
    center: Tensor | None

    def __init__(self, start: Tensor, scales: Tensor, form: LowRank | None = None) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros_like(start))
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        center = None if form is None or form.center is None else form.center.to(start)
        self.register_buffer("center", center, persistent=False)
        self._form = form

    @property
    def form(self) -> LowRank | None:
        """How the numbers make coefficients that are low-rank cores; None where they are the coefficients."""
        return None if self._form is None else replace(self._form, center=self.center)

    def forward(self) -> Tensor:
        """Return the coefficients."""
        numbers = self.numbers()
        if self._form is None:
            return numbers
        cores = multiply(numbers, self._form.shape, self._form.rank)
        return cores if self.center is None else cores - self.center

    def numbers(self) -> Tensor:
        """Return c, what files hold."""
        return self.start + self.scales * self.theta

    def set(self, values: Tensor) -> None:
        """Set θ so that these are the coefficients, or so that low-rank cores are the nearest ones of their rank."""
        values = values.to(self.start)
        self.set_numbers(values if self.form is None else self.form.numbers(values))

    def set_numbers(self, numbers: Tensor) -> None:
        """Set θ so that c is given."""
        with torch.no_grad():
            self.theta.copy_((numbers.to(self.start) - self.start) / self.scales)


def begin(values: Tensor, rows: Tensor, form: LowRank, zoo: LowRank) -> tuple[Tensor, Tensor]:
    """Return c_start and s of low-rank cores, from the core to begin with (P, Q) and those of all models (N, P, Q), float32.

    Both factors have the spread of the zoo's own, whose cores are kept by `zoo`. A start of a lower rank, such as a change of
    nothing, leaves columns of the left factor zero. The rows of the right factor that they meet are put where the zoo's cores have
    most of their energy besides, so that gradients reach both factors. Cost: SVDs of all models' cores.
    """
    rank, (num_rows, num_columns) = form.rank, form.shape
    sides = [num_rows * rank, rank * num_columns]
    left, right = torch.split(form.numbers(values.double()), sides)
    left_PR, right_RQ = left.view(num_rows, rank), right.view(rank, num_columns)
    numbers_NC = zoo.numbers(rows.double())
    squares_NRQ = torch.split(numbers_NC, sides, -1)[1].view(-1, rank, num_columns).square()
    lengths_R = squares_NRQ.sum(-1).mean(0).sqrt()
    fresh_R = right_RQ.square().sum(1).sqrt() <= _NOTHING * lengths_R.max()
    if bool(fresh_R.any()):
        left_PR[:, fresh_R] = 0
        whole = zoo.matrices(numbers_NC) if zoo.center is None else zoo.matrices(numbers_NC) + zoo.center
        right_RQ[fresh_R] = _leading_rows(whole.flatten(0, 1), right_RQ[~fresh_R], lengths_R[fresh_R])
    return torch.cat([left_PR.flatten(), right_RQ.flatten()]).float(), scales_of(numbers_NC)


def _leading_rows(matrix_MQ: Tensor, used_RQ: Tensor, lengths: Tensor) -> Tensor:
    """The leading right singular vectors of a matrix, orthogonal to rows that are used already, at these lengths (1 for zero)."""
    rest_MQ = matrix_MQ
    if len(used_RQ):
        basis_QR = torch.linalg.qr(used_RQ.T)[0]
        rest_MQ = matrix_MQ - matrix_MQ @ basis_QR @ basis_QR.T
    vectors_QQ = torch.linalg.eigh(rest_MQ.T @ rest_MQ)[1].flip(1)
    rows: Tensor = torch.where(lengths > 0, lengths, 1.0)[:, None] * vectors_QQ.T[: len(lengths)]
    return rows


_NOTHING = 1e-5
"""Share of the zoo's own factors' lengths below which a factor is round-off of a core of a lower rank."""


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
