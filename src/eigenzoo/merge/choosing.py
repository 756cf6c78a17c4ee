"""Choose a merge by a metric of the user's: search on one part of the data, report on another, beside controls.

    each method at four sizes ─► weights of the best, one model at a time ─► ranks of the best        (part `validation`)
    the winner, the base, the mean, the best single model, each model on its own task, a joint model  (part `test`)

Sizes are relative to the norm of the plain mean, and so mean the same for all methods: a sum of T updates is T times too long.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eigenzoo.display import counted, one_line
from eigenzoo.errors import DataError, UsageError
from eigenzoo.merge.checkpoints import MergedCheckpoint
from eigenzoo.merge.merged import Merged
from eigenzoo.merge.merging import merge
from eigenzoo.merge.methods import find_method
from eigenzoo.records import Progress, no_progress, plain
from eigenzoo.zoo.zoo import Zoo

VALIDATION, TEST = "validation", "test"

PartMetric = Callable[[Path, str], float | Mapping[str, float]]
"""Called with the path of a model and `validation` or `test`. Returns a score, or scores by task; larger is better."""

METHODS = ("mean", "task_arithmetic", "ties", "tsv", "iso_c", "model_stock")
SIZES = (0.5, 1.0, 1.5, 2.0)
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
    """

    best: Candidate
    tried: tuple[Candidate, ...]
    controls: Mapping[str, Scores]
    verdict: str
    text: str
    nai: float | None

    def __repr__(self) -> str:
        return one_line(f"ChosenMerge({self.best.method}, scale={self.best.scale:.3g}, {self.verdict}): {self.text}")

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        controls = {name: {"mean": scores.mean, "tasks": dict(scores.tasks)} for name, scores in self.controls.items()}
        return {**plain(self), "controls": controls}


def choose(
    zoo: Zoo,
    metric: PartMetric,
    *,
    methods: Sequence[str] = METHODS,
    parent: str | os.PathLike[str] | None = None,
    joint: str | os.PathLike[str] | None = None,
    ranks: Sequence[int] = (),
    progress: Progress = no_progress,
    **options: Any,
) -> ChosenMerge:
    """Search a merge of a zoo's models, and report how it does on data that the search has not seen.

    Args:
        metric: see `PartMetric`. It is called once for each merge that is tried, and a few times for the controls.
        methods: the methods to try.
        parent: the base model, as a control. Default: the base of a zoo that has one.
        joint: a model that was trained on all tasks, as a control.
        ranks: ranks that the best merge of adapters is also tried at.
        options: further options of `merge`, the same for every merge.

    Raises:
        UsageError: for unknown methods.
        DataError: for a metric that does not return numbers, or different tasks for different models.
    """
    if not methods:
        raise UsageError("no methods are given")
    for name in methods:
        find_method(name)
    search = _Search(zoo, metric, options, progress, len(methods), len(ranks))
    for name in methods:
        search.try_sizes(name)
    search.try_weights()
    search.try_ranks(ranks)
    return _report(search, parent, joint)


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
        merged = merge(self.zoo, candidate.method, **choices, **self._options)
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
    """Return a metric's scores by task; raises DataError for anything but numbers."""
    found = metric(path, part)
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
