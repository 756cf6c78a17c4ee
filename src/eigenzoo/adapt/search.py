"""Coefficients found without gradients, by CMA-ES: a black-box metric, a budget of evaluations, and nothing else.

    found = search(adapted, lambda module: loss_of(module), budget=500, state="search.safetensors")

Every candidate is θ = θ₀ + R z: θ in units of the zoo's spread (see `trained`), z what CMA-ES draws (Hansen 2016, by the package
`cma`), θ₀ where the module stands. Two choices of R:

    over="coefficients"   z are coefficients themselves, all or the leading ones of each layer
    over="models"         one number a model of the zoo, shared by all layers: Σ_n w_n c_n with w = z/√N, so that a step of z moves
                          θ as far as above. LoRAHub (Huang et al. 2023) searches such weights of LoRA factors; here updates are
                          added, not factors, and without a penalty on the weights

Past `DIAGONAL` numbers the covariance is kept diagonal (sep-CMA-ES, Ros and Hansen 2008): a full one costs D² numbers and cannot
be learnt from a few thousand evaluations. Measured on held-out tasks: python -m bench.search.

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
"""Numbers above which the covariance is diagonal: at 598 both are as good, and this one costs no D²."""
SPREAD = 0.3
"""First standard deviation of θ; 0.1 is slower at first (after 250 evaluations a loss of 0.144 in the place of 0.096)."""


@dataclass(frozen=True)
class Found:
    """What a search ended with; the module holds it.

    Attributes:
        values: by layer, the best coefficients.
        best: their metric.
        start: the metric where the search began; `best` is never worse.
        evaluations: how often the metric was asked for, those of a search that this one went on with included.
        history: after each generation (evaluations, best metric so far).
        weights: over models, each model's weight w_n; else nothing.
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
    """Search for coefficients by a metric alone, and leave the best in the module.

    Args:
        adapted: an adapted module, in the mode that the metric wants (mostly `.eval()`). What is trained besides stays as it is.
        metric: gives one number for the module, smaller is better: a loss, an error rate, a judge's score. It runs without
            gradients. One that is NaN or Inf counts as worse than all others of its generation.
        budget: most evaluations. Whole generations are spent, the start and the last mean are one each.
        seed: of all that is drawn; nothing else is random.
        over: `coefficients` or `models`; see above.
        layers: patterns of the names of the layers that may change.
        leading: of each of them only so many coefficients, those in which the zoo varies most; for `coefficients`.
        spread: first standard deviation of θ.
        maximize: larger is better, as of an accuracy.
        at_once: None: candidates one by one, any metric. A number: so many in one batch by `torch.func.vmap`; the metric then is a
            function of torch tensors that returns a tensor of one value. On one core this gains little (1.3 times at 64
            images of a tiny ViT, nothing at 512); memory is that of so many models' weights and activations.
        state: a file that is written after each generation. A search that is started again with it goes on, and ends with the
            same bits; one that had ended goes on too, where the budget is larger. It must be the same metric: nobody can see that.
        device: where the module is moved to (`cpu`, `cuda`, `cuda:1`), and stays; None: it stays where it is. The metric brings its
            own data, and has them there.
        progress: called as progress(stage, done, total).

    Raises UsageError where `cma` is missing, for a device that is not there, fewer than two numbers, a budget below two
    generations' worth, patterns that match nothing, or a state of another search; DataError where the metric is not finite at
    the start. If the metric raises, the module is put back to where it was. Cost besides the metric: D numbers a candidate, or D²
    up to D = 100.
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
    kept = read_state(file, key, origin.numel(), numbers.count) if file and os.path.lexists(file) else None
    run = _Run(_strategy(cma, numbers.count, spread, seed), numbers, kept or SearchState(origin, [], np.zeros((0, 0))))
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
    """One search: CMA-ES, what it was told so far, and the best of it. Values are to be made small."""

    def __init__(self, strategy: Any, numbers: _Numbers, state: SearchState) -> None:
        self.strategy, self.numbers, self.state = strategy, numbers, state
        self.size: int = strategy.popsize
        self.done, self.best = 0, float("inf")
        self.best_z: Floats = np.zeros(numbers.count)
        self.best_theta = state.origin
        self.history: list[tuple[int, float]] = []

    def generations(self, evaluate: _Evaluator, budget: int) -> Iterator[bool]:
        """Run generation after generation, and yield whether it was evaluated or known from the state."""
        if not self.state.values:
            (start,) = evaluate(self.state.origin[None])
            if not np.isfinite(start):
                raise DataError("the metric is NaN or Inf", where="the start of the search")
            self.state.values.append(float(start))
        self._count(self.best_z[None], self.state.origin[None], np.array(self.state.values[:1]))
        while self.done + self.size + 1 <= budget:
            asked = self.strategy.ask()
            thetas_EA = self.numbers.thetas(self.state.origin, np.array(asked))
            known = self.state.values[self.done : self.done + self.size]
            if known:
                self._check(np.array(asked), len(known))
            else:
                known = evaluate(thetas_EA).tolist()
                self.state.values.extend(known)
                self.state.last = np.array(asked)
            grown = self.done + self.size == len(self.state.values)
            self.strategy.tell(asked, _comparable(np.array(known)).tolist())
            self._count(np.array(asked), thetas_EA, np.array(known))
            yield grown

    def ask_mean(self, evaluate: _Evaluator) -> None:
        """Ask for the mean of what is drawn, which of a flat or noisy metric is often better than any draw."""
        mean = np.array(self.strategy.mean)[None]
        thetas_EA = self.numbers.thetas(self.state.origin, mean)
        self._count(mean, thetas_EA, evaluate(thetas_EA))

    def _count(self, asked_ED: Floats, thetas_EA: Tensor, values_E: Floats) -> None:
        self.done += len(values_E)
        values_E = np.where(np.isfinite(values_E), values_E, np.inf)
        place = int(values_E.argmin())
        if values_E[place] < self.best:
            self.best, self.best_z, self.best_theta = float(values_E[place]), asked_ED[place], thetas_EA[place].clone()
        self.history.append((self.done, self.best))

    def _check(self, asked_ED: Floats, num_known: int) -> None:
        """The points of the last known generation are kept: where they are others now, so were all values."""
        last = self.done + self.size == len(self.state.values)
        if num_known < self.size or (last and not np.array_equal(asked_ED, self.state.last)):
            raise UsageError(
                "the state is of a search that drew other points",
                rule="it goes on with the same versions of cma and numpy, on the same kind of machine",
                next_step="start anew with another state",
            )


def _comparable(values_E: Floats) -> Floats:
    """Values that are not finite are worse than all others: CMA-ES asks for nothing but the order."""
    finite = np.isfinite(values_E)
    worst = values_E[finite].max() if finite.any() else 0.0
    return np.where(finite, values_E, worst + abs(worst) + 1)


@dataclass(frozen=True)
class _Numbers:
    """What is searched.

    Attributes:
        count: D.
        change: z (E, D) as a change of θ (E, A).
    """

    count: int
    change: Callable[[Tensor], Tensor]

    def thetas(self, origin_A: Tensor, asked_ED: Floats) -> Tensor:
        """Return θ (E, A), float32."""
        return origin_A + self.change(torch.from_numpy(asked_ED).float())


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
        rows_NA = torch.cat([_models_theta(adapted, name, name in chosen) for name in trained], 1)
        rows_NA = rows_NA / len(rows_NA) ** 0.5
        return _Numbers(len(rows_NA), lambda z_EN: z_EN @ rows_NA)
    if over != COEFFICIENTS or (leading is not None and leading < 1):
        raise UsageError(
            f"over {over!r}, leading {leading}",
            rule=f"choose {COEFFICIENTS} (leading: a number from 1, or all), or {MODELS} (leading does not apply)",
        )
    kept = torch.cat([_kept(layer, leading if name in chosen else 0) for name, layer in trained.items()])
    places = kept.nonzero()[:, 0]

    def change(z_ED: Tensor) -> Tensor:
        theta_EA = z_ED.new_zeros(len(z_ED), kept.numel())
        theta_EA[:, places] = z_ED
        return theta_EA

    return _Numbers(places.numel(), change)


def _models_theta(adapted: Adapted, name: str, chosen: bool) -> Tensor:
    """θ of every model's difference from the mean (N, ·) in one layer; zero where it may not change."""
    layer = adapted.weights[name].trained
    values_NK = adapted.space.all_coefficients[name]
    whole = torch.zeros(len(values_NK), *layer.start.shape)
    if chosen:
        whole[(slice(None), *(slice(size) for size in values_NK.shape[1:]))] = values_NK
    return (whole / layer.scales.cpu()).flatten(1)


def _kept(layer: Coefficients, leading: int | None) -> Tensor:
    """Which of a layer's coefficients are searched; the leading ones by their spread, earlier ones first among equals."""
    scales = layer.scales.cpu().flatten()
    order = torch.argsort(scales, descending=True, stable=True)
    kept = torch.zeros(scales.numel(), dtype=torch.bool)
    kept[order[:leading]] = True
    return kept


class _Evaluator:
    """The metric of candidates θ (E, A): one by one, or in batches; times −1 where larger is better."""

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
            # However often the metric calls the module: its weights are made once.
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
        found: list[float] = values.double().tolist()
        return found


class _Called(nn.Module):
    """A metric of a module as a module, which is what `functional_call` can put other parameters into."""

    def __init__(self, module: nn.Module, metric: Metric) -> None:
        super().__init__()
        self.module, self._metric = module, metric

    def forward(self) -> Tensor:
        """Return the metric."""
        return torch.as_tensor(self._metric(self.module))


def _parameters(adapted: Adapted) -> list[nn.Parameter]:
    return [weight.trained.theta for weight in adapted.weights.values()]


def _theta(adapted: Adapted) -> Tensor:
    """All layers' θ (A,), as it is now."""
    return torch.cat([parameter.detach().cpu().float().flatten() for parameter in _parameters(adapted)])


def _put(adapted: Adapted, theta_A: Tensor) -> None:
    parameters = _parameters(adapted)
    with torch.no_grad():
        for parameter, part in zip(
            parameters, torch.split(theta_A, [each.numel() for each in parameters]), strict=True
        ):
            parameter.copy_(part.view(parameter.shape))


def _strategy(cma: Any, count: int, spread: float, seed: int) -> Any:
    """CMA-ES with numbers of its own: `cma` would draw from numpy's global state, and seed it."""
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
