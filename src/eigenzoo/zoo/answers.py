"""Compute the outputs of adapters' updates for random inputs. Updates with equal outputs are equal, whatever their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eigenzoo.formats.model import LoraUpdate, Model

NUM_LISTENERS = 8
"""How many numbers are kept of an update's answer: two different updates agree in all of them with probability zero."""

SAME_FUNCTION = 1e-5
"""Relative difference of two adapters' answers to random inputs below which they are the same update, factored twice."""

MOST_PROBED = 2**21
"""Inputs or outputs of one update, or ranks of all updates of an adapter: with more, its answers would take more memory than a
read does. The largest vocabularies are an eighth of that."""

# M updates of one adapter, L listeners, N models, T tensors of one shape, R rank, O outputs, I inputs.


@dataclass(frozen=True)
class Probe:
    """A random input x as long as that of any update (I,), and random listeners Y (L, O): the same for all models.

    None of the numbers is zero: so a product with values among which one is NaN or Inf is not finite.
    """

    input_I: NDArray[np.float32]
    listeners_LO: NDArray[np.float32]

    def half_answers(self, side: str, factors_TRC: Tensor, first: int) -> NDArray[np.float64]:
        """Return Y·B (T, L, R) or A·x (T, R) of some of the factors' rows, from row `first` on, in float64.

        Products are float32 where the factors are: their own rounding, which is as large, is far below `SAME_FUNCTION`. They are
        numpy's, which takes less time around a small product than torch.

        Args:
            side: `a` for factors A (T, rows of R, I), `b` for factors B (T, rows of O, R).
            factors_TRC: the rows.
            first: their place among the factor's rows.
        """
        num, rows, columns = factors_TRC.shape
        factors = factors_TRC.to(torch.promote_types(factors_TRC.dtype, torch.float32)).numpy()
        half: NDArray[np.float64]
        if side == "a":
            input_I = self.input_I[:columns].astype(factors.dtype, copy=False)
            half = (factors.reshape(num * rows, columns) @ input_I).reshape(num, rows).astype(np.float64)
        else:
            listeners_LO = self.listeners_LO[:, first : first + rows].astype(factors.dtype, copy=False)
            half = np.matmul(listeners_LO, factors).astype(np.float64)
        return half


@dataclass(frozen=True)
class Answers:
    """An adapter's answers yᵀ(s·B·A)x: its modules, and an array (M, L); of full weights there are none."""

    modules: tuple[str, ...]
    answers_ML: NDArray[np.float64]

    @property
    def are_zero(self) -> bool:
        """Whether these are answers, and all of them are zero."""
        return bool(self.modules) and not self.answers_ML.any()


def probed_updates(model: Model) -> Mapping[str, LoraUpdate]:
    """Return a model's updates, or none where they exceed `MOST_PROBED`: a sparse file of any size takes no room on disk."""
    updates = model.updates.values()
    longest = max((size for update in updates for size in update.shape), default=0)
    return model.updates if max(longest, sum(update.rank for update in updates)) <= MOST_PROBED else {}


def make_probe(models: Sequence[Model]) -> Probe:
    """Draw an input and listeners that are long enough for every probed update of some models."""
    shapes = [update.shape for model in models for update in probed_updates(model).values()]
    outputs, inputs = (max((shape[side] for shape in shapes), default=0) for side in (0, 1))
    draw = torch.Generator().manual_seed(0)  # numpy's random numbers would have to be imported
    input_I = torch.randn(inputs, generator=draw, dtype=torch.float32).numpy()
    listeners_LO = torch.randn(NUM_LISTENERS, outputs, generator=draw, dtype=torch.float32).numpy()
    for numbers in (input_I, listeners_LO):
        numbers[numbers == 0] = 1
    return Probe(input_I, listeners_LO)


def join_halves(updates: Mapping[str, LoraUpdate], halves: Mapping[str, NDArray[np.float64]]) -> Answers:
    """Multiply the halves of each update, by the keys of its factors: Y·B (L, R) and A·x (R,)."""
    modules = tuple(sorted(updates))
    answers_ML = np.zeros((len(modules), NUM_LISTENERS))
    for row_L, update in zip(answers_ML, map(updates.__getitem__, modules), strict=True):
        row_L[:] = update.scale * (halves[update.key_b] @ halves[update.key_a])
    return Answers(modules, answers_ML)


def same_function(answers: Sequence[Answers]) -> list[list[int]]:
    """Group the models, by number, whose answers agree with those of a group's first model; groups of one are left out."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, answer in enumerate(answers):
        if answer.modules:
            alike.setdefault(answer.modules, []).append(number)
    groups = [group for numbers in alike.values() for group in _same_answers(numbers, answers)]
    return sorted(group for group in groups if len(group) > 1)


def _same_answers(numbers: Sequence[int], answers: Sequence[Answers]) -> list[list[int]]:
    """Group models of the same modules."""
    groups: list[list[int]] = []
    # The first module distinguishes nearly all pairs. It is compared with the first modules of all groups at once.
    firsts_NL, sizes_N = np.empty((len(numbers), NUM_LISTENERS)), np.empty(len(numbers))
    with np.errstate(all="ignore"):
        for number in numbers:
            answers_ML = answers[number].answers_ML
            num_groups = len(groups)
            far_N = np.linalg.norm(firsts_NL[:num_groups] - answers_ML[0], axis=1)
            near = np.flatnonzero(far_N <= SAME_FUNCTION * sizes_N[:num_groups])
            home = next((groups[index] for index in near if _agree(answers[groups[index][0]], answers[number])), None)
            if home is not None:
                home.append(number)
                continue
            firsts_NL[num_groups], sizes_N[num_groups] = answers_ML[0], np.linalg.norm(answers_ML[0])
            groups.append([number])
    return groups


def _agree(first: Answers, second: Answers) -> bool:
    far_M = np.linalg.norm(first.answers_ML - second.answers_ML, axis=1)
    return bool((far_M <= SAME_FUNCTION * np.linalg.norm(first.answers_ML, axis=1)).all())
