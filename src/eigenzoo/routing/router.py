"""A router: which models answer an input, from a few labelled examples of features per model.

Models are told apart by linear discriminant analysis with a shrunk covariance (`linalg.discriminant`), fitted to all examples.
A third of the examples is held out from a second fit. It serves two purposes:

* the p-value of an input (split conformal prediction, Vovk et al. 2005). Its score is the relative Mahalanobis distance of Ren et
  al. (2021): min_m d²(x, m) − d²(x, all examples as one group).
* the temperature T of the weights, softmax(−d² / 2T) (Guo et al. 2017). Without it a few examples in many features make every
  input look certain.

Inputs that come together have one mixture: the weights whose average of the models' means is nearest to the mean of the inputs. It
is sharper than the average of the inputs' own weights, each of which is uncertain.

The bundle's own coefficients do not help to tell inputs apart (docs/route.md has the figures), so only the mixtures use them.

Legend: M models, N examples, D features, X inputs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenzoo.display import counted, one_line
from eigenzoo.errors import DataError, MismatchError, UsageError
from eigenzoo.formats.feature_file import read_examples, read_inputs
from eigenzoo.linalg.discriminant import Discriminant, discriminant
from eigenzoo.passes.settings import own_settings
from eigenzoo.routing.routing import Routing
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.renames import nearest

ALPHA = 0.05
HELD_OUT = 3
"""One example in so many is held out for p-values and temperature."""

LARGEST = 1e50
"""Features beyond this have no finite fourth power in float64."""

TEMPERATURES = tuple(2 ** (step / 4) for step in range(-8, 49))

Features = Any
"""(n, D) numbers: a tensor, a numpy array, or anything that torch.as_tensor takes."""


@dataclass(frozen=True)
class Router:
    """A fitted router; `Router.fit` makes one.

    Attributes:
        names: the M models that it chooses from.
        temperature: T of the weights.
        scores: scores of the held-out examples, sorted.
    """

    names: tuple[str, ...]
    temperature: float
    scores: Tensor
    _chosen_by: Discriminant
    _held_out_from: Discriminant
    _background: Discriminant

    def __repr__(self) -> str:
        return one_line(f"Router({counted(len(self.names), 'model')}, {counted(len(self.scores), 'held-out example')})")

    @classmethod
    @own_settings()
    def fit(cls, examples: Mapping[str, Features] | str | os.PathLike[str], *, seed: int = 0) -> Router:
        """Fit to examples of the inputs that each model answers.

        Args:
            examples: features (n, D) by model, at least 3 of each, computed like those of the inputs: an encoder's, or hidden
                states of the base. Or the path of a safetensors file with one such tensor per model.
            seed: seed of the choice of the held-out third.

        Cost: three SVDs of (N, D); memory a few times the examples in float64.

        Raises:
            MismatchError: the models' examples differ in D.
            DataError: NaN, Inf, or no two examples of a model differ.
            UsageError: fewer than 3 examples of a model, or features that are not numbers (n, D).
        """
        named = read_examples(examples) if isinstance(examples, str | os.PathLike) else examples
        if not named:
            raise UsageError("there are no examples", rule="a router needs examples of at least one model")
        groups = {str(name): _rows(rows, f"examples of {name}") for name, rows in named.items()}
        _check_examples(groups)
        seed = check_seed(seed)
        fitted, held_out = [], []
        for rows in groups.values():
            # One seed for all models: their order changes nothing, and examples in pairs stay together.
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            held_out.append(rows[order[: len(rows) // HELD_OUT]])
            fitted.append(rows[order[len(rows) // HELD_OUT :]])
        try:
            chosen_by, split = discriminant(list(groups.values())), discriminant(fitted)
            background = discriminant([torch.cat(fitted)])
        except ValueError as error:
            raise DataError(
                str(error).replace("group", "model"), rule="the spread of a model's examples is the scale of distances"
            ) from None
        calibration_ND = torch.cat(held_out)
        distances_NM = split.distances(calibration_ND)
        labels_N = torch.repeat_interleave(torch.tensor([len(rows) for rows in held_out]))
        scores = _scores(distances_NM, background.distances(calibration_ND)).sort().values
        return cls(tuple(groups), _temperature(distances_NM, labels_N), scores, chosen_by, split, background)

    @own_settings()
    def route(self, inputs: Features | str | os.PathLike[str], *, alpha: float = ALPHA) -> Routing:
        """Choose the models that answer inputs.

        Args:
            inputs: features (X, D), or the path of an .npy or safetensors file.
            alpha: the largest share of inputs of these models that may be left without an answer, in [0, 1). The bound holds on
                average over held-out examples, for inputs that are drawn like the examples, in their proportions. How many
                inputs of other tasks are left without an answer is not bounded. 0 answers every input.

        Cost: X·D·(N + M) products; memory the inputs and X·M.

        Raises:
            MismatchError: inputs of another D than the examples.
            DataError: NaN or Inf.
            UsageError: too few held-out examples for alpha: at least 1/alpha − 1 are needed.
        """
        alpha = self._checked_alpha(alpha)
        rows = read_inputs(inputs) if isinstance(inputs, str | os.PathLike) else inputs
        where = str(inputs) if isinstance(inputs, str | os.PathLike) else "inputs"
        rows_XD = _rows(rows, where)
        width = len(self._chosen_by.origin_D)
        if rows_XD.shape[1] != width:
            raise MismatchError(
                f"{rows_XD.shape[1]} features",
                where=where,
                rule=f"the examples have {width}",
                next_step="compute both by the same encoder",
            )
        distances_XM = self._chosen_by.distances(rows_XD)
        scores_X = _scores(self._held_out_from.distances(rows_XD), self._background.distances(rows_XD))
        num = len(self.scores)
        at_least_X = num - torch.searchsorted(self.scores, scores_X, right=False)
        p_values_X = (1 + at_least_X.double()) / (num + 1)
        nearest_X = distances_XM.argmin(1).tolist()
        models = tuple(
            None if p_value <= alpha else self.names[place]
            for place, p_value in zip(nearest_X, p_values_X.tolist(), strict=True)
        )
        weights_XM = torch.softmax(-distances_XM / (2 * self.temperature), 1)
        answered_XD = rows_XD[p_values_X > alpha]
        blend_M = self._chosen_by.blend(answered_XD) if len(answered_XD) else None
        return Routing(self.names, models, weights_XM, p_values_X, alpha, num, blend_M)

    def _checked_alpha(self, alpha: float) -> float:
        if not 0 <= alpha < 1:
            raise UsageError(f"alpha {alpha}", rule="alpha is a share from 0 to below 1, such as 0.05")
        num = len(self.scores)
        if 0 < alpha < 1 / (num + 1):
            needed = math.ceil(1 / alpha) - 1
            raise UsageError(
                f"{counted(num, 'held-out example')} cannot tell an error rate of {alpha:g}",
                rule=f"at least {needed} are needed, a third of all examples",
                next_step=f"give more examples, or alpha of at least {1 / (num + 1):.2g}, or alpha 0 to answer every input",
            )
        return float(alpha)


def route(
    space: Subspace,
    inputs: Features | str | os.PathLike[str],
    examples: Mapping[str, Features] | str | os.PathLike[str],
    *,
    alpha: float = ALPHA,
    seed: int = 0,
) -> Routing:
    """Choose which models of a bundle answer inputs, given features of the inputs and a few examples per model.

    `Router.fit(examples, seed=seed).route(inputs, alpha=alpha)`, once the names of the examples are checked against the bundle.
    Keep the `Router` to route more inputs. `routing.coefficients(space)` is the mixture of models for these inputs.

    Args:
        space: a fitted subspace; models without examples are never chosen.
        inputs: features (X, D), or the path of an .npy or safetensors file.
        examples: features (n, D) by model, or the path of a safetensors file with one tensor per model.
        alpha: the largest share of inputs of these models that may be left without an answer.
        seed: seed of the choice of the held-out examples.

    Raises what `Router.fit` and `Router.route` raise, and MismatchError for examples of a model that the bundle lacks.
    """
    named = read_examples(examples) if isinstance(examples, str | os.PathLike) else examples
    check_names(space, list(named))
    return Router.fit(named, seed=seed).route(inputs, alpha=alpha)


def check_names(space: Subspace, names: Sequence[str]) -> None:
    """Raise MismatchError unless these are models of the bundle."""
    for name in names:
        if name not in space.names:
            near = nearest(str(name), space.names)
            raise MismatchError(
                f"examples of {str(name)[:200]!r}, which is not a model of the bundle",
                where=str(space.path),
                rule=f"the bundle has {len(space.names)}: {', '.join(space.names[:5])}{', …' if len(space.names) > 5 else ''}",
                next_step=f"did you mean {near!r}?" if near else "name each tensor of examples after its model",
            )


def _rows(rows: Features, where: str) -> Tensor:
    """Check features and return them as a detached tensor on the CPU, in their own dtype."""
    try:
        found = torch.as_tensor(rows).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"not numbers ({str(error)[:200]})", where=where, rule="features are (n, D) numbers"
        ) from error
    if found.dim() != 2 or 0 in found.shape or found.is_complex() or found.dtype == torch.bool:
        raise UsageError(
            f"features of shape {list(found.shape)}, {str(found.dtype).removeprefix('torch.')}",
            where=where,
            rule="features are numbers, one row per input and one column per feature",
        )
    # In blocks, because the comparison makes a copy of what it compares.
    for start in range(0, len(found), 2**12):
        wrong = ~(found[start : start + 2**12].double().abs() <= LARGEST).all(1)
        if bool(wrong.any()):
            raise DataError(
                f"row {start + int(wrong.nonzero()[0])} has features that are NaN, Inf or beyond {LARGEST:.0e}",
                where=where,
                next_step="remove the row",
            )
    return found


def _check_examples(groups: Mapping[str, Tensor]) -> None:
    first, width = next((name, rows.shape[1]) for name, rows in groups.items())
    for name, rows in groups.items():
        if rows.shape[1] != width:
            raise MismatchError(
                f"{rows.shape[1]} features",
                where=f"examples of {name}",
                rule=f"those of {first} have {width}",
                next_step="compute all by the same encoder",
            )
        if len(rows) < HELD_OUT:
            raise UsageError(
                f"{counted(len(rows), 'example')}",
                where=f"examples of {name}",
                rule=f"each model needs {HELD_OUT}: one is held out for the error rate",
                next_step="give more examples, or leave the model out",
            )


def _scores(distances_XM: Tensor, background_X1: Tensor) -> Tensor:
    """How badly rows fit all models, beside how badly they fit the examples as one group."""
    return distances_XM.min(1).values - background_X1[:, 0]


def _temperature(distances_NM: Tensor, labels_N: Tensor) -> float:
    """Choose the temperature of the largest likelihood of the held-out examples."""

    def loss(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(-distances_NM / (2 * temperature), labels_N).item()

    return min(TEMPERATURES, key=loss)
