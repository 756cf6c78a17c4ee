"""Search coefficients without gradients by CMA-ES, with a black-box metric and a budget of evaluations.

    found = search(adapted, lambda module: loss_of(module), budget=500, state="search.safetensors")

Every candidate is θ = θ₀ + R z, with θ in units of the zoo's spread (see `trained`), z drawn by CMA-ES (Hansen 2016, package
`cma`), and θ₀ the module's current value. There are two choices of R:

    over="coefficients"   z are the coefficients, all or the leading ones of each layer
    over="models"         one weight per model of the zoo, shared by all layers: Σ_n w_n c_n with w = z/√N, so that a step of z
    moves θ as far as above. LoRAHub (Huang et al. 2023) searches such weights of LoRA factors. Here updates are added instead of
    factors, and weights have no penalty

Above `DIAGONAL` numbers the covariance is diagonal (sep-CMA-ES, Ros and Hansen 2008), because a full one has D² numbers, which a
few thousand evaluations cannot determine. Measured on held-out tasks: python -m bench.search.

Legend: E candidates, D numbers that are searched, A all coefficients of a bundle, N models of the zoo.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize

from eigenzoo.adapt.attach import Adapted
from eigenzoo.adapt.search_state import SearchState, read_state, search_key, write_state
from eigenzoo.adapt.trained import Coefficients
from eigenzoo.adapt.training import move
from eigenzoo.errors import DataError, UsageError, install
from eigenzoo.records import Progress, no_progress
from eigenzoo.seeds import check_seed

Metric = Callable[[nn.Module], float | Tensor]
Floats = NDArray[np.float64]

COEFFICIENTS, MODELS = "coefficients", "models"
DIAGONAL = 100
"""Number of searched values above which the covariance is diagonal. At 598 both are equally good."""
SPREAD = 0.3
"""First standard deviation of θ. With 0.1 the search starts more slowly (loss 0.144 instead of 0.096 after 250 evaluations)."""


@dataclass(frozen=True)
class Found:
    """The result of a search. The module has these coefficients.

    Attributes:
        values: the best coefficients by layer.
        best: their metric.
        start: the metric at the start of the search; `best` is never worse.
        evaluations: number of evaluations, including those of a resumed search.
        history: (evaluations, best metric so far) after each generation.
        weights: each model's weight w_n for `over="models"`, else empty.
    """

    values: Mapping[str, Tensor]
    best: float
    start: float
    evaluations: int
    history: tuple[tuple[int, float], ...]
    weights: Mapping[str, float]


def search(
    adapted: Adapted,
    metric: Metric,
    *,
    budget: int = 2000,
    seed: int = 0,
    over: str = COEFFICIENTS,
    layers: Sequence[str] = ("*",),
    leading: int | None = None,
    spread: float = SPREAD,
    maximize: bool = False,
    at_once: int | None = None,
    state: str | os.PathLike[str] | None = None,
    device: str | None = None,
    progress: Progress = no_progress,
) -> Found:
    """Search for coefficients by a metric alone, and load the best into the module.

    Args:
        adapted: an adapted module, in the mode that the metric needs (usually `.eval()`). Other trained parameters are not changed.
        metric: function that returns one number for the module, where smaller is better: a loss, an error rate, a judge's score. It
            runs without gradients. NaN and Inf count as worse than all others of the generation.
        budget: largest number of evaluations. Only whole generations run. The start and the last mean are one evaluation each.
        seed: seed of all draws.
        over: `coefficients` or `models`; see above.
        layers: name patterns of the layers to change.
        leading: for `coefficients`, change only this many coefficients of each layer, those in which the zoo varies most.
        spread: first standard deviation of θ.
        maximize: larger is better, as for an accuracy.
        at_once: number of candidates in one batch of `torch.func.vmap`. The metric must then be a function of torch tensors that
            returns a tensor of one value. On one core this gains little (1.3 times at 64 images of a tiny ViT, nothing at 512).
            Memory is that of this many models' weights and activations. None evaluates candidates one by one, with any metric.
        state: a file that is written after each generation. A search that is started again with it resumes and ends with the same
            bits. A finished search continues if the budget is larger. The metric must be the same, which cannot be checked.
        device: the device to which the module is moved and where it stays (`cpu`, `cuda`, `cuda:1`). None does not move it. The
            metric's data must be on the same device.
        progress: called as progress(stage, done, total).

    Raises UsageError if `cma` or the device is missing, for fewer than two numbers, a budget smaller than two generations, patterns
    that match nothing, or a state of another search. Raises DataError if the metric is not finite at the start. If the metric
    raises, the module is restored. Cost besides the metric: D numbers per candidate, or D² up to D = 100.
    """
    cma, seed = _cma(), check_seed(seed)
    move(adapted.module, device)
    numbers = _numbers(adapted, over, layers, leading)
    if numbers.count < 2:
        raise UsageError(
            f"{numbers.count} numbers to search over", rule="CMA-ES needs two", next_step="name more layers or models"
        )
    options = {
        "seed": seed,
        "over": over,
        "layers": list(layers),
        "leading": leading,
        "spread": spread,
        "max": maximize,
    }
    key = search_key(adapted, options | {"cma": cma.__version__, "numpy": np.__version__})
    file = None if state is None else Path(state)
    origin = _theta(adapted)
    saved_state = read_state(file, key, origin.numel(), numbers.count) if file and os.path.lexists(file) else None
    run = _Run(
        _strategy(cma, numbers.count, spread, seed), numbers, saved_state or SearchState(origin, [], np.zeros((0, 0)))
    )
    if budget < run.size + 2:
        raise UsageError(
            f"a budget of {budget} evaluations",
            rule=f"one generation is {run.size}, the start and the last mean one each",
            next_step=f"allow {run.size + 2} or more, mostly some hundreds",
        )
    evaluate = _Evaluator(adapted, metric, at_once, -1.0 if maximize else 1.0)
    try:
        for grown in run.generations(evaluate, budget):
            if grown and file is not None:
                write_state(file, key, run.state)
            progress("searching", run.done, budget)
        run.ask_mean(evaluate)
    except BaseException:
        _put(adapted, origin)
        raise
    _put(adapted, run.best_theta)
    sign = -1.0 if maximize else 1.0
    history = tuple((done, sign * best) for done, best in run.history)
    names = adapted.space.names if over == MODELS else ()
    weights = dict(zip(names, (run.best_z / len(names) ** 0.5).tolist(), strict=True)) if names else {}
    return Found(adapted.coefficients(), sign * run.best, sign * run.state.values[0], run.done, history, weights)


class _Run:
    """One search: CMA-ES, all values so far, and the best. Values are minimised."""

    def __init__(self, strategy: Any, numbers: _Numbers, state: SearchState) -> None:
        self.strategy, self.numbers, self.state = strategy, numbers, state
        self.size: int = strategy.popsize
        self.done, self.best = 0, float("inf")
        self.best_z: Floats = np.zeros(numbers.count)
        self.best_theta = state.origin
        self.history: list[tuple[int, float]] = []

    def generations(self, evaluate: _Evaluator, budget: int) -> Iterator[bool]:
        """Run one generation after another, and yield whether it was evaluated or read from the state."""
        if not self.state.values:
            (start,) = evaluate(self.state.origin[None])
            if not np.isfinite(start):
                raise DataError("the metric is NaN or Inf", where="the start of the search")
            self.state.values.append(float(start))
        self._count(self.best_z[None], self.state.origin[None], np.array(self.state.values[:1]))
        while self.done + self.size + 1 <= budget:
            points = self.strategy.ask()
            thetas_EA = self.numbers.thetas(self.state.origin, np.array(points))
            values = self.state.values[self.done : self.done + self.size]
            if values:
                self._check(np.array(points), len(values))
            else:
                values = evaluate(thetas_EA).tolist()
                self.state.values.extend(values)
                self.state.last = np.array(points)
            grown = self.done + self.size == len(self.state.values)
            self.strategy.tell(points, _comparable(np.array(values)).tolist())
            self._count(np.array(points), thetas_EA, np.array(values))
            yield grown

    def ask_mean(self, evaluate: _Evaluator) -> None:
        """Evaluate the mean of the distribution, which for a flat or noisy metric is often better than any draw."""
        mean = np.array(self.strategy.mean)[None]
        thetas_EA = self.numbers.thetas(self.state.origin, mean)
        self._count(mean, thetas_EA, evaluate(thetas_EA))

    def _count(self, points_ED: Floats, thetas_EA: Tensor, values_E: Floats) -> None:
        self.done += len(values_E)
        values_E = np.where(np.isfinite(values_E), values_E, np.inf)
        best_index = int(values_E.argmin())
        if values_E[best_index] < self.best:
            self.best, self.best_z, self.best_theta = (
                float(values_E[best_index]),
                points_ED[best_index],
                thetas_EA[best_index].clone(),
            )
        self.history.append((self.done, self.best))

    def _check(self, points_ED: Floats, num_stored: int) -> None:
        """Raise UsageError if the last stored points differ from those drawn now: then no value belongs to its point."""
        last = self.done + self.size == len(self.state.values)
        if num_stored < self.size or (last and not np.array_equal(points_ED, self.state.last)):
            raise UsageError(
                "the state is of a search that drew other points",
                rule="it goes on with the same versions of cma and numpy, on the same kind of machine",
                next_step="start anew with another state",
            )


def _comparable(values_E: Floats) -> Floats:
    """Replace values that are not finite by worse ones than all others. CMA-ES uses only the order."""
    finite = np.isfinite(values_E)
    worst = values_E[finite].max() if finite.any() else 0.0
    return np.where(finite, values_E, worst + abs(worst) + 1)


@dataclass(frozen=True)
class _Numbers:
    """The searched numbers.

    Attributes:
        count: D.
        change: z (E, D) as a change of θ (E, A).
    """

    count: int
    change: Callable[[Tensor], Tensor]

    def thetas(self, origin_A: Tensor, points_ED: Floats) -> Tensor:
        """Return θ (E, A), float32."""
        return origin_A + self.change(torch.from_numpy(points_ED).float())


def _numbers(adapted: Adapted, over: str, patterns: Sequence[str], leading: int | None) -> _Numbers:
    chosen = {name for pattern in patterns for name in fnmatch.filter(adapted.weights, pattern)}
    if not chosen:
        raise UsageError(
            f"no layer matches {', '.join(patterns) or 'nothing'}",
            where=str(adapted.space.path),
            next_step="see layers",
        )
    trained = {name: weight.trained for name, weight in adapted.weights.items()}
    if over == MODELS and leading is None:
        if any(layer.form is not None for layer in trained.values()):
            raise UsageError(
                f"over {MODELS!r} with low-rank cores",
                rule="sums of models are not of their rank",
                next_step=f"search over {COEFFICIENTS!r}",
            )
        rows_NA = torch.cat([_models_theta(adapted, name, name in chosen) for name in trained], 1)
        rows_NA = rows_NA / len(rows_NA) ** 0.5
        return _Numbers(len(rows_NA), lambda z_EN: z_EN @ rows_NA)
    if over != COEFFICIENTS or (leading is not None and leading < 1):
        raise UsageError(
            f"over {over!r}, leading {leading}",
            rule=f"choose {COEFFICIENTS} (leading: a number from 1, or all), or {MODELS} (leading does not apply)",
        )
    is_searched = torch.cat([_searched(layer, leading if name in chosen else 0) for name, layer in trained.items()])
    indices = is_searched.nonzero()[:, 0]

    def change(z_ED: Tensor) -> Tensor:
        theta_EA = z_ED.new_zeros(len(z_ED), is_searched.numel())
        theta_EA[:, indices] = z_ED
        return theta_EA

    return _Numbers(indices.numel(), change)


def _models_theta(adapted: Adapted, name: str, chosen: bool) -> Tensor:
    """Return θ of every model's difference from the mean (N, ·) in one layer; zero for coefficients that do not change."""
    layer = adapted.weights[name].trained
    values_NK = adapted.space.all_coefficients[name]
    padded = torch.zeros(len(values_NK), *layer.start.shape)
    if chosen:
        padded[(slice(None), *(slice(size) for size in values_NK.shape[1:]))] = values_NK
    return (padded / layer.scales.cpu()).flatten(1)


def _searched(layer: Coefficients, leading: int | None) -> Tensor:
    """Return which of a layer's coefficients are searched: the leading ones by spread, and of equal ones the first."""
    scales = layer.scales.cpu().flatten()
    order = torch.argsort(scales, descending=True, stable=True)
    is_searched = torch.zeros(scales.numel(), dtype=torch.bool)
    is_searched[order[:leading]] = True
    return is_searched


class _Evaluator:
    """Evaluates candidates θ (E, A) one by one or in batches. The metric is multiplied by −1 if larger is better."""

    def __init__(self, adapted: Adapted, metric: Metric, at_once: int | None, sign: float) -> None:
        if at_once is not None and at_once < 1:
            raise UsageError(f"{at_once} candidates at once", rule="a number from 1, or None")
        self._adapted, self._metric, self._at_once, self._sign = adapted, metric, at_once, sign

    def __call__(self, thetas_EA: Tensor) -> Floats:
        with torch.no_grad():
            values = self._singly(thetas_EA) if self._at_once is None else self._together(thetas_EA)
        return self._sign * np.array(values, dtype=np.float64)

    def _singly(self, thetas_EA: Tensor) -> list[float]:
        values = []
        for theta_A in thetas_EA:
            _put(self._adapted, theta_A)
            # The weights are made once, however often the metric calls the module.
            with parametrize.cached():
                values.append(float(self._metric(self._adapted.module)))
        return values

    def _together(self, thetas_EA: Tensor) -> list[float]:
        called = _Called(self._adapted.module, self._metric)
        names = {id(parameter): name for name, parameter in called.named_parameters()}
        parameters = _parameters(self._adapted)
        parts = torch.split(thetas_EA, [parameter.numel() for parameter in parameters], 1)
        stacked = {
            names[id(parameter)]: part.reshape(-1, *parameter.shape).to(parameter)
            for parameter, part in zip(parameters, parts, strict=True)
        }
        values: Tensor = vmap(lambda one: functional_call(called, one, ()), chunk_size=self._at_once)(stacked)
        if values.shape != (len(thetas_EA),):
            raise UsageError(
                f"the metric gives a tensor of shape {list(values.shape[1:])}", rule="one value for one module"
            )
        numbers: list[float] = values.double().tolist()
        return numbers


class _Called(nn.Module):
    """A metric wrapped as a module, so that `functional_call` can replace parameters."""

    def __init__(self, module: nn.Module, metric: Metric) -> None:
        super().__init__()
        self.module, self._metric = module, metric

    def forward(self) -> Tensor:
        """Return the metric."""
        return torch.as_tensor(self._metric(self.module))


def _parameters(adapted: Adapted) -> list[nn.Parameter]:
    return [weight.trained.theta for weight in adapted.weights.values()]


def _theta(adapted: Adapted) -> Tensor:
    """Return all layers' current θ (A,)."""
    return torch.cat([parameter.detach().cpu().float().flatten() for parameter in _parameters(adapted)])


def _put(adapted: Adapted, theta_A: Tensor) -> None:
    parameters = _parameters(adapted)
    with torch.no_grad():
        for parameter, part in zip(
            parameters, torch.split(theta_A, [each.numel() for each in parameters]), strict=True
        ):
            parameter.copy_(part.view(parameter.shape))


def _strategy(cma: Any, count: int, spread: float, seed: int) -> Any:
    """Return CMA-ES with its own random generator, because `cma` would use and seed numpy's global state."""
    draw = np.random.Generator(np.random.PCG64(seed))
    options = {
        "randn": lambda num, size: draw.standard_normal((num, size)),
        "seed": np.nan,
        "CMA_diagonal": count > DIAGONAL,
        "verbose": -10,
        "verb_log": 0,
    }
    return cma.CMAEvolutionStrategy(np.zeros(count), spread, options)


def _cma() -> Any:
    try:
        return importlib.import_module("cma")
    except ImportError as error:
        raise UsageError("the search without gradients needs the package cma", next_step=install("adapt")) from error
