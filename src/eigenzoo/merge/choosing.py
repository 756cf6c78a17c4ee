"""Choose a merge by a metric of the user's: search on one part of the data, report on another, beside controls.

    each method at four sizes ─► weights of the best, one model at a time ─► ranks of the best        (part `validation`)
    the winner, the base, the mean, the best single model, each model on its own task, a joint model  (part `test`)

Sizes are relative to the norm of the plain mean, and so mean the same for all methods: a sum of T updates is T times too long.
"""

from __future__ import annotations

import inspect
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eigenzoo.display import counted, one_line
from eigenzoo.errors import DataError, EigenzooError, UsageError
from eigenzoo.merge.checkpoints import MergedCheckpoint
from eigenzoo.merge.files import is_adapter
from eigenzoo.merge.merged import Merged
from eigenzoo.merge.merging import merge
from eigenzoo.merge.method import METHODS as ALL_METHODS
from eigenzoo.merge.method import Method
from eigenzoo.merge.methods import find_method
from eigenzoo.merge.request import CORE
from eigenzoo.records import Progress, no_progress, plain
from eigenzoo.zoo.zoo import Zoo

VALIDATION, TEST = "validation", "test"

PartMetric = Callable[[Path, str], float | Mapping[str, float]]
"""Called with the path of a model and `validation` or `test`. Returns a score, or scores by task; larger is better."""

METHODS = ("task_arithmetic", "ties", "tsv", "iso_c", "model_stock", "karcher", "cart")
"""Methods that are tried by default; with moments of inputs also `WITH_GRAMS`."""

WITH_GRAMS = "regmean"

SUMS = ("task_arithmetic", "linear", "mean")
"""Methods that are the same merge at the same size and equal weights. The first takes any weights, the last none."""

SIZES = (1.0, 0.5, 1.5, 2.0)
"""Multiples of the norm of the plain mean. The first one wins where scores are equal."""

STEPS = (0.0, 0.5, 1.5)
"""Factors that one model's weight is tried with."""

PAYS, DOES_NOT_PAY, UNDECIDED = "merging-pays", "merging-does-not-pay", "undecided"


@dataclass(frozen=True)
class Candidate:
    """A merge that was tried: its choices, and its mean score on the validation part."""

    method: str
    scale: float
    weights: tuple[float, ...] | None
    rank: int | None
    score: float


@dataclass(frozen=True)
class Scores:
    """Scores of one model on the test part, by task ("all" for a metric without tasks)."""

    tasks: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The mean over tasks."""
        return statistics.fmean(self.tasks.values())


@dataclass(frozen=True)
class ChosenMerge:
    """The merge that a search has chosen, and its controls on data that the search has not seen.

    Attributes:
        best: the choices.
        tried: all merges that were tried, in their order.
        controls: scores on the test part: `merged`, `mean`, `best single` (the model that was best on the validation part), and, if
            there are such, `base`, `own` (each model on the task of its name) and `joint`.
        verdict: `merging-pays`, `merging-does-not-pay` or `undecided`.
        text: the reason, with figures.
        nai: (merged − base) / (own − base), the mean over tasks where the two differ; None without these controls.
        notes: controls that were not measured, and why.
    """

    best: Candidate
    tried: tuple[Candidate, ...]
    controls: Mapping[str, Scores]
    verdict: str
    text: str
    nai: float | None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return one_line(f"ChosenMerge({self.best.method}, scale={self.best.scale:.3g}, {self.verdict}): {self.text}")

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        controls = {name: {"mean": scores.mean, "tasks": dict(scores.tasks)} for name, scores in self.controls.items()}
        return {**plain(self), "controls": controls, "notes": list(self.notes)}


def choose(
    zoo: Zoo,
    metric: PartMetric,
    *,
    methods: Sequence[str] | None = None,
    parent: str | os.PathLike[str] | None = None,
    joint: str | os.PathLike[str] | None = None,
    ranks: Sequence[int] = (),
    progress: Progress = no_progress,
    **options: Any,
) -> ChosenMerge:
    """Search a merge of a zoo's models, and report how it does on data that the search has not seen.

    Args:
        metric: see `PartMetric`. It is called once for each merge that is tried, and a few times for the controls.
        methods: the methods to try. Default: `METHODS`, and with `grams` also regmean. One of those that are the same merge
            (`SUMS`) is tried.
        parent: the base model, as a control. Default: the base of a zoo that has one.
        joint: a model that was trained on all tasks, as a control.
        ranks: ranks that the best merge of adapters is also tried at.
        options: further options of `merge`, the same for every merge. Those of methods go to the methods that have them.

    Raises:
        UsageError: for unknown methods, options that no method has, an adapter as `parent`, and a metric that fails.
        DataError: for a metric that does not return numbers, or different tasks for different models.
    """
    if methods is None:
        methods = (*METHODS, WITH_GRAMS) if options.get("grams") else METHODS
    if not methods:
        raise UsageError("no methods are given")
    _check_options([find_method(name) for name in methods], options)
    _check_metric(metric)
    _check_parent(zoo, parent)
    methods = _without_twins(methods)
    search = _Search(zoo, metric, options, progress, len(methods), len(ranks))
    for name in methods:
        search.try_sizes(name)
    search.try_weights()
    search.try_ranks(ranks)
    return _report(search, parent, joint)


def _of_methods(options: Mapping[str, Any]) -> list[str]:
    """Return the names of options that belong to methods, the space and the moments among them."""
    return [
        name
        for name, value in options.items()
        if value is not None and any(_takes(method, name) for method in ALL_METHODS.values())
    ]


def _takes(method: Method, name: str) -> bool:
    """Tell whether a method has an option."""
    if name == "space":
        return method.has_spaces
    return method.kind == "factors" if name == "grams" else name in method.parameters


def _check_options(methods: Sequence[Method], options: Mapping[str, Any]) -> None:
    """Raise UsageError for an option that none of the methods has."""
    for name in _of_methods(options):
        if not any(_takes(method, name) for method in methods) and not (name == "space" and options[name] == CORE):
            raise UsageError(
                f"none of the methods {', '.join(method.name for method in methods)} has the option {name!r}",
                next_step="leave it out, or name a method that has it (docs/merge.md lists them)",
            )


def _without_twins(methods: Sequence[str]) -> list[str]:
    """Return the methods, each once, and of `SUMS` only the one that takes the most weights."""
    sums = [name for name in SUMS if name in methods][1:]
    return [name for name in dict.fromkeys(methods) if name not in sums]


def _check_metric(metric: PartMetric) -> None:
    """Raise UsageError for a function of another form, before any merge is made."""
    try:
        inspect.signature(metric).bind(Path(), VALIDATION)
    except TypeError as error:
        name = getattr(metric, "__name__", type(metric).__name__)
        raise UsageError(
            f"the metric {name} cannot be called with a path and a part: {error}",
            rule=f"merge calls def {name}(path, part) with the part {VALIDATION!r} or {TEST!r}; evaluate calls its metric with "
            "the path alone",
            next_step="add the second argument; give a function that makes the metric its own argument with --metric-arg",
        ) from None
    except ValueError:  # some functions of C have no signature
        return


def _check_parent(zoo: Zoo, parent: str | os.PathLike[str] | None) -> None:
    """Raise UsageError for an adapter as the base, which would be a rival and not the control."""
    if parent is not None and zoo.view == "update" and is_adapter(parent):
        raise UsageError(
            f"{parent} is an adapter",
            where="--parent (parent=)",
            rule="the base is the model without an update",
            next_step="name the model that the adapters were trained on",
        )


class _Search:
    """The merges that were tried, each measured on the validation part."""

    def __init__(
        self, zoo: Zoo, metric: PartMetric, options: Mapping[str, Any], progress: Progress, methods: int, ranks: int
    ) -> None:
        self.zoo, self.metric, self._options, self._progress = zoo, metric, options, progress
        self.tried: list[Candidate] = []
        self._most = methods * len(SIZES) + len(zoo) * len(STEPS) + ranks
        self._size = self.merged(Candidate("mean", 1.0, None, None, 0.0)).certificate.norm

    @property
    def best(self) -> Candidate:
        """The first of those with the largest score."""
        return max(self.tried, key=lambda candidate: candidate.score)

    def merged(self, candidate: Candidate) -> Merged | MergedCheckpoint:
        """Return a merge, unsaved."""
        choices: dict[str, Any] = {"scale": candidate.scale, "weights": candidate.weights}
        if candidate.rank is not None:
            choices["rank"] = candidate.rank
        method, given = find_method(candidate.method), dict(self._options)
        for name in _of_methods(given):
            if not _takes(method, name):
                del given[name]
        merged = merge(self.zoo, candidate.method, **choices, **given)
        assert isinstance(merged, Merged | MergedCheckpoint)
        return merged

    def measured(self, candidate: Candidate, part: str) -> dict[str, float]:
        """Save a merge for a moment, and measure it."""
        with tempfile.TemporaryDirectory(prefix="eigenzoo-") as folder:
            path = self.merged(candidate).save(Path(folder) / "merged")
            return scores_of(self.metric, path, part)

    def tries(self, candidate: Candidate) -> None:
        """Measure a merge on the validation part, and keep it."""
        scores = self.measured(candidate, VALIDATION)
        self.tried.append(replace(candidate, score=statistics.fmean(scores.values())))
        self._progress("trying merges", min(len(self.tried), self._most), self._most)

    def try_sizes(self, method: str) -> None:
        """Try a method at several sizes of its result."""
        one = Candidate(method, 1.0, None, None, 0.0)
        norm = self.merged(one).certificate.norm
        for size in SIZES:
            self.tries(replace(one, scale=size * self._size / norm if norm > 0 else size))

    def try_weights(self) -> None:
        """Change one model's weight after another, and keep what is better."""
        if not find_method(self.best.method).weighted or len(self.zoo) < 2:
            return
        for index in range(len(self.zoo)):
            best = self.best
            weights = best.weights or (1.0,) * len(self.zoo)
            for step in STEPS:
                changed = (*weights[:index], weights[index] * step, *weights[index + 1 :])
                if any(changed):
                    self.tries(replace(best, weights=changed))

    def try_ranks(self, ranks: Sequence[int]) -> None:
        """Cut the best merge to other ranks."""
        best = self.best
        for rank in ranks:
            self.tries(replace(best, rank=rank))


def scores_of(metric: PartMetric, path: Path, part: str) -> dict[str, float]:
    """Return a metric's scores by task; raises DataError for anything but numbers, UsageError for a metric that fails."""
    try:
        found = metric(path, part)
    except EigenzooError as error:
        raise error.at(str(path)) from error
    # The metric is the user's code, and any of its errors needs the model and the part.
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the metric failed with {type(error).__name__}: {error}",
            where=f"{path}, part {part!r}",
            rule="a metric takes the path of a saved model and a part, and returns a score or scores by task",
            next_step="call it yourself with this part and the path of one of the models",
        ) from error
    scores = dict(found) if isinstance(found, Mapping) else {"all": found}
    wrong = [name for name, value in scores.items() if not isinstance(value, int | float) or not math.isfinite(value)]
    if wrong or not scores:
        shown = f"{wrong[0]}: {scores[wrong[0]]!r}"[:80] if wrong else "nothing"
        raise DataError(
            f"the metric returned {shown}", where=str(path), rule="a score, or scores by task, are finite numbers"
        )
    return {name: float(value) for name, value in scores.items()}


def _report(
    search: _Search, parent: str | os.PathLike[str] | None, joint: str | os.PathLike[str] | None
) -> ChosenMerge:
    zoo, metric, best = search.zoo, search.metric, search.best
    if parent is None and zoo.base is not None:
        parent = zoo.base.path
    on_validation = {
        name: scores_of(metric, model.path, VALIDATION) for name, model in zip(zoo.names, zoo.models, strict=True)
    }
    single = max(on_validation, key=lambda name: statistics.fmean(on_validation[name].values()))
    controls = {
        "merged": search.measured(best, TEST),
        "mean": search.measured(Candidate("mean", 1.0, None, None, 0.0), TEST),
        "best single": scores_of(metric, zoo.models[zoo.place(single)].path, TEST),
    }
    for name, path in (("base", parent), ("joint", joint)):
        if path is not None:
            controls[name] = scores_of(metric, Path(path), TEST)
    tasks = controls["merged"]
    notes = []
    if parent is None:
        notes.append(
            "the base was not measured, and the verdict is against the best single model alone: name it (--parent)"
        )
    others = sorted(set(tasks) - set(zoo.names)) if set(tasks) != {"all"} else []
    if others:
        notes.append(
            f"each model on its own task was not measured: no model is called {others[0]!r}, the name of a task"
        )
    if set(tasks) <= set(zoo.names):
        controls["own"] = {task: scores_of(metric, zoo.models[zoo.place(task)].path, TEST)[task] for task in tasks}
    for name, scores in controls.items():
        if scores.keys() != tasks.keys():
            raise DataError(f"the metric returned other tasks for {name}", rule="every model is asked the same tasks")
    verdict, text = _verdict(controls)
    return ChosenMerge(
        best,
        tuple(search.tried),
        {name: Scores(scores) for name, scores in controls.items()},
        verdict,
        text,
        nai(controls),
        tuple(notes),
    )


def _verdict(controls: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """Compare the merge with the better of base and best single model: paired differences over tasks."""
    rivals = [name for name in ("base", "best single") if name in controls]
    rival = max(rivals, key=lambda name: statistics.fmean(controls[name].values()))
    merged, other = controls["merged"], controls[rival]
    differences = [merged[task] - other[task] for task in merged]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    figures = (
        f"merged {statistics.fmean(merged.values()):.4g}, {rival} {statistics.fmean(other.values()):.4g}: difference {mean:+.3g}, "
        f"standard error {error:.2g} over {counted(len(differences), 'task')}"
    )
    if mean <= 0:
        return DOES_NOT_PAY, f"merging does not pay: {figures}"
    if mean <= 2 * error or len(differences) < 2:
        return UNDECIDED, f"undecided, since the difference is within two standard errors: {figures}"
    return PAYS, f"merging pays: {figures}"


def nai(controls: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return (merged − base) / (own − base), the mean over tasks on which own and base differ; None without these."""
    if "base" not in controls or "own" not in controls:
        return None
    base, own, merged = controls["base"], controls["own"], controls["merged"]
    shares = [(merged[task] - base[task]) / (own[task] - base[task]) for task in merged if own[task] != base[task]]
    return statistics.fmean(shares) if shares else None
