"""The control "function, not only geometry": measure rebuilt models and simpler replacements with a user's metric.

A share of energy measures the distance of weights. A distant model may have the same function, and a close one may have lost it. So
the user's metric is computed for every held-out model and its replacements:

    original      the model itself, at its own path
    parent        the common start of all models; for adapters the base model alone (their updates zero)
    mean          the zoo's mean, without coefficients
    head_only     the parent (or else the mean) with the model's own task head, which may be all that matters
    rebuilt       the model from its first 1, 2, 4, … and all coefficients
    random_basis  the model projected on as many random directions around the mean
    secondary     the model without its first coefficients: do the leading directions carry the function?
    alone         the model cut to a low rank by its own SVD, without any sharing: at 1, 2, and at as many bytes as the bundle takes
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eigenzoo.display import counted, html_table, one_line
from eigenzoo.errors import DataError, EigenzooError, UsageError
from eigenzoo.evidence.refit import hold_out, is_known
from eigenzoo.evidence.variants import Variants, alone_ranks_of, check_parent
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.splitting import split_model
from eigenzoo.passes.process import single_threaded
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers
from eigenzoo.records import Progress, no_progress, plain
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.coefficients import Coefficients
from eigenzoo.subspace.fitting.fit import check_resources
from eigenzoo.subspace.rebuilt import RebuiltModel
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zoo import Zoo

Metric = Callable[[Path], float]
"""Called with the folder of one model in the zoo's own format, or with its file if the zoo's models are files."""


LARGEST = 1e150
"""Largest value of a metric whose averages and squares do not overflow."""


@dataclass(frozen=True)
class Measured:
    """One figure per variant, or None if there is no such variant. Mappings are from ranks to figures."""

    original: float | None
    parent: float | None
    mean: float | None
    head_only: float | None
    rebuilt: Mapping[int, float | None]
    random_basis: Mapping[int, float | None]
    secondary: float | None
    alone: Mapping[int, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class FunctionEvidence:
    """A user's metric of held-out models and their replacements.

    Attributes:
        metric: the metric's name.
        num_models: number of measured models.
        heldout: whether none of them was used to fit the subspace.
        num_fitted: number of models of the subspace.
        ranks: numbers of coefficients of rebuilt models; the last is all of them.
        secondary_rank: number of leading coefficients that `secondary` lacks; None for a subspace of rank 1.
        models: the metric of every variant of each model.
        mean: the averages over the models.
        spread: the standard errors of these averages; None for a single model.
        sentence: the conclusion.
        same_bytes_rank: the rank of models cut alone that takes no more bytes than the bundle; None where none does.
    """

    metric: str
    num_models: int
    heldout: bool
    num_fitted: int
    ranks: tuple[int, ...]
    secondary_rank: int | None
    models: Mapping[str, Measured]
    mean: Measured
    spread: Measured
    sentence: str
    same_bytes_rank: int | None = None

    @property
    def averages(self) -> list[tuple[str, float | None, float | None]]:
        """Return the replacements of a model with the average of the metric and its standard error."""
        mean, spread = self.mean, self.spread
        return [
            ("original", mean.original, spread.original),
            ("parent", mean.parent, spread.parent),
            ("mean only", mean.mean, spread.mean),
            ("head only", mean.head_only, spread.head_only),
            *((f"rebuilt, rank {rank}", value, spread.rebuilt[rank]) for rank, value in mean.rebuilt.items()),
            *(
                (f"random basis of {rank}", value, spread.random_basis[rank])
                for rank, value in mean.random_basis.items()
            ),
            (f"without the first {self.secondary_rank or '…'}", mean.secondary, spread.secondary),
            *((f"cut alone to rank {rank}", value, spread.alone[rank]) for rank, value in mean.alone.items()),
        ]

    def __repr__(self) -> str:
        whose = "held out" if self.heldout else "not all held out"
        size = f"{counted(self.num_models, 'model')}, {whose}; {self.num_fitted} fitted"
        return "\n".join(map(one_line, (f"FunctionEvidence({self.metric!r}, {size})", self.sentence)))

    def _repr_html_(self) -> str:
        rows = [(name, *("–" if each is None else f"{each:.4g}" for each in values)) for name, *values in self.averages]
        columns = ("variant", "average", "± standard error")
        return html_table(f"{self.metric} of {counted(self.num_models, 'model')}", columns, rows, note=self.sentence)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dict(plain(self))


def evaluate(
    space: Subspace,
    metric: Metric,
    models: Source | Zoo | None = None,
    *,
    ranks: Sequence[int] | None = None,
    parent: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    max_memory: int | None = None,
    workers: Workers | None = None,
    progress: Progress = no_progress,
) -> FunctionEvidence:
    """Measure held-out models with your own metric: rebuilt, and beside parent, mean, head alone and random directions.

    Args:
        space: a fitted subspace.
        metric: function that takes the path of one saved model and returns a finite number. The folder's name is the
            model's name. Originals are measured at their own paths and are never copied or changed.
        models: models that the subspace was not fitted to, as for `open_zoo`. By default one fold of five (by a
            seeded permutation) of the subspace's own models is held out, and the subspace is fitted again to the others
            with the same options. Their files must still exist.
        ranks: numbers of coefficients to rebuild from, at most what each layer has. Default: powers of two. The full rank is
            always measured too.
        parent: checkpoint from which the models were fine-tuned (view `weight` only). For view `delta` it is the base; for
            adapters it is the base model alone.
        seed: seed of the fold and of the random directions.
        device, max_memory, workers: where the second fit runs, as for `fit`. With `models` nothing is fitted: they are checked
            and not used.
        progress: called as progress(stage, done, total).

    Everything but the replaced weights is the model's own: names, dtypes, configs, metadata and carried files. The original, the
    parent and the head of `head_only` are exact, to the rounding of the files. All other variants come from float32
    coefficients. For cores (axes `outputs`, `inputs`) a rank is the leading corner with that many truncated rows and columns. With
    a center other than the models' mean, `mean` is the mean in the subspace.

    `parent` is None if it is not known completely: its head has another shape, or adapters carry tensors of their own.
    `head_only` is None if all models share one head.

    Each model is also cut alone to low ranks by its own SVD (full weights: its deviation from the mean, where that is
    cheap), without any sharing.

    Cost: up to 9 + log2(rank) calls of the metric per model. Disk: one model at a time, in a temporary folder. Memory: one layer
    and a block, with adapters a layer's factors. Random directions of full weights: two draws of rank · values numbers per model.

    Raises:
        UsageError: the metric raises or does not return a number, or the models' files no longer exist and `models` is not given.
        DataError: the metric returns NaN or Inf. Both errors name the model and the variant.
        MismatchError: models or parent have other layers.
    """
    checked, seed = _checked_ranks(ranks), check_seed(seed)
    if not callable(metric):
        raise UsageError(
            f"the metric {metric!r} is not callable",
            rule="a metric takes the path of a saved model and returns a number",
        )
    check_resources(workers, max_memory, device)
    ancestor = _open_parent(space, parent)
    if models is None:
        fitted, zoo = hold_out(space, seed, progress, device=device, max_memory=max_memory, workers=workers)
    else:
        fitted, zoo = space, space.open(models)
    projected = fitted.project_many(zoo, progress=progress)
    heldout = models is None or not is_known(fitted, projected.values())
    variants = Variants(fitted, zoo, ancestor, seed)
    full = variants.rank
    powers = [2**power for power in range(full.bit_length())]
    chosen = tuple(sorted({min(rank, full) for rank in (powers if checked is None else checked)} | {full}))
    alone_ranks, same_bytes = alone_ranks_of(fitted, zoo)
    measured = {}
    for number, (name, coefficients) in enumerate(projected.items()):
        measured[name] = _measure(variants, coefficients, metric, chosen, alone_ranks)
        progress("measuring models", number + 1, len(projected))
    return _record(metric, measured, chosen, heldout, len(fitted.names), same_bytes)


def _checked_ranks(ranks: Sequence[int] | None) -> list[int] | None:
    if ranks is None:
        return None
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise UsageError(f"rank {rank!r} is not valid", rule="ranks to rebuild at are whole numbers from 1")
    return list(ranks)


def _open_parent(space: Subspace, parent: str | os.PathLike[str] | None) -> Model | None:
    """Open the checkpoint for comparison, if there is one."""
    base = space.base if space.view == "delta" else None
    if parent is None:
        return base
    if base is not None and os.path.realpath(parent) == os.path.realpath(base.path):
        return base
    if space.view != "weight":
        whose = "the base" if space.view == "delta" else "the base model alone, with zero updates"
        raise UsageError(
            f"view {space.view!r} takes no parent",
            where=str(parent),
            rule=f"the models' parent is {whose}",
            next_step="leave the parent out",
        )
    checkpoint = split_model(open_model(Path(parent)), space.manifest.split)
    check_parent(space, checkpoint)
    return checkpoint


def _measure(
    variants: Variants, coefficients: Coefficients, metric: Metric, ranks: Sequence[int], alone_ranks: Sequence[int]
) -> Measured:
    """Measure every variant of one model, one after the other."""
    original = variants.zoo.models[variants.zoo.place(coefficients.name)].path

    def measured(variant: str, make: Callable[[], RebuiltModel | None]) -> float | None:
        where = f"model '{coefficients.name}', {variant}"
        with tempfile.TemporaryDirectory(prefix="eigenzoo-") as scratch:
            path = _saved(make, Path(scratch), original, where)
            return None if path is None else _value(metric, path, where)

    full = ranks[-1]
    half = secondary_rank(full)
    return Measured(
        original=_value(metric, original, f"model '{coefficients.name}', original"),
        parent=measured("parent", lambda: variants.parent(coefficients)),
        mean=measured("mean only", lambda: variants.mean(coefficients)),
        head_only=measured("head only", lambda: variants.head_only(coefficients)),
        rebuilt={
            rank: measured(f"rebuilt at rank {rank}", partial(variants.rebuilt, coefficients, rank)) for rank in ranks
        },
        random_basis={full: measured(f"random basis of {full}", lambda: variants.random(coefficients))},
        secondary=None
        if half is None
        else measured(f"without the first {half}", lambda: variants.secondary(coefficients, half)),
        alone={
            rank: measured(f"cut alone to rank {rank}", partial(variants.alone, coefficients, rank))
            for rank in alone_ranks
        },
    )


@own_settings()
def _saved(make: Callable[[], RebuiltModel | None], scratch: Path, original: Path, where: str) -> Path | None:
    """Save a variant under the original's name, and return the path for the metric: a file if the original is one."""
    try:
        with single_threaded():
            made = make()
            if made is None:
                return None
            # The name in the subspace is not used, because it may come from an untrusted bundle.
            name = original.stem if original.is_file() else Path(os.path.abspath(original)).name
            folder = made.save(scratch / name)
    except EigenzooError as error:
        raise error.at(where) from error
    return next(folder.glob("*.safetensors")) if original.is_file() else folder


def secondary_rank(rank: int) -> int | None:
    """Return how many leading directions `secondary` leaves out: half of them; None for fewer than two."""
    return rank // 2 if rank > 1 else None


def _value(metric: Metric, path: Path, where: str) -> float:
    """Call the metric. Its errors and results that are not finite numbers are raised with model and variant."""
    try:
        value = float(metric(path))
    except EigenzooError as error:
        raise error.at(where) from error
    # The metric is the user's code, and any of its errors needs the model and the variant.
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the metric failed with {type(error).__name__}: {error}",
            where=where,
            rule="a metric takes the path of a saved model and returns a number",
            next_step="read only the model there: rebuilt models have the original's name, not its other files",
        ) from error
    if not abs(value) <= LARGEST:
        raise DataError(f"the metric returned {value}", where=where, rule="a metric is a finite number")
    return value


def _record(
    metric: Metric,
    measured: Mapping[str, Measured],
    ranks: tuple[int, ...],
    heldout: bool,
    num_fitted: int,
    same_bytes: int | None = None,
) -> FunctionEvidence:
    models = list(measured.values())
    function = getattr(metric, "func", metric)  # the function that functools.partial wraps
    name = getattr(function, "__name__", None) or type(function).__name__
    mean, spread = _combined(models, statistics.fmean), _combined(models, _standard_error)
    half = secondary_rank(ranks[-1])
    which = f"{len(models)} model{'s' if len(models) > 1 else ''}"
    known = f"held out of a fit to {num_fitted}" if heldout else "not all held out (some are in the subspace)"
    sentence = _sentence(models, mean, name, ranks[-1], f"{which} {known}") + _alone_sentence(
        models, ranks[-1], same_bytes
    )
    return FunctionEvidence(
        name, len(models), heldout, num_fitted, ranks, half, measured, mean, spread, sentence, same_bytes
    )


def _combined(models: Sequence[Measured], combine: Callable[[list[float]], float | None]) -> Measured:
    """Combine every variant's figures over the models; None if a model has none."""

    def over(figures: Iterable[float | None]) -> float | None:
        known = [figure for figure in figures if figure is not None]
        return combine(known) if len(known) == len(models) else None

    return Measured(
        original=over(model.original for model in models),
        parent=over(model.parent for model in models),
        mean=over(model.mean for model in models),
        head_only=over(model.head_only for model in models),
        rebuilt={rank: over(model.rebuilt[rank] for model in models) for rank in models[0].rebuilt},
        random_basis={rank: over(model.random_basis[rank] for model in models) for rank in models[0].random_basis},
        secondary=over(model.secondary for model in models),
        alone={rank: over(model.alone[rank] for model in models) for rank in models[0].alone},
    )


def _standard_error(figures: Sequence[float]) -> float | None:
    return statistics.stdev(figures) / math.sqrt(len(figures)) if len(figures) > 1 else None


def _sentence(models: Sequence[Measured], mean: Measured, metric: str, rank: int, fitted_models: str) -> str:
    """Compare rebuilt models with the originals, and first name the controls that they do not clearly beat.

    Rebuilt models are clearly better than a control if the paired difference is more than twice its standard error. With
    few models a large difference can miss this, so the sentence does not call the control as good. Which side is better is
    read off the control that is farthest from the originals.
    """
    originals, rebuilt = [_some(model.original) for model in models], [_some(model.rebuilt[rank]) for model in models]
    figures_by_control = {
        "the mean alone": [model.mean for model in models],
        "a random basis": [model.random_basis[rank] for model in models],
        "the head alone": [model.head_only for model in models],
        "the parent alone": [model.parent for model in models],
    }
    controls = {
        name: [_some(figure) for figure in figures]
        for name, figures in figures_by_control.items()
        if None not in figures
    }
    gaps = [statistics.fmean(originals) - statistics.fmean(figures) for figures in controls.values()]
    better = math.copysign(1, max(gaps, key=abs))
    not_beaten = [name for name, figures in controls.items() if not _is_better(rebuilt, figures, better)]
    first = (
        f"Rebuilt models are not clearly better than {_listed(not_beaten, 'or')} (by two standard errors). "
        if not_beaten
        else ""
    )
    shown = [
        f"{_some(mean.original):.3g} for the originals",
        f"{_some(mean.rebuilt[rank]):.3g} rebuilt at rank {rank}",
        *(f"{statistics.fmean(figures):.3g} with {name}" for name, figures in controls.items()),
    ]
    last = "The mean alone leaves no gap to recover"
    if _is_better(originals, controls["the mean alone"], better):
        of_mean = statistics.fmean(controls["the mean alone"])
        share = (statistics.fmean(rebuilt) - of_mean) / (statistics.fmean(originals) - of_mean)
        last = f"Rebuilt models recover {100 * share:.0f} % of the gap between the mean alone and the originals"
    return f"{first}On {fitted_models}, the average of {metric} is {_listed(shown)}. {last}."


def _alone_sentence(models: Sequence[Measured], rank: int, same_bytes: int | None) -> str:
    """Compare rebuilt models with models cut alone at as many bytes: which is nearer to the originals, by two standard errors."""
    found = [model.alone.get(same_bytes) for model in models] if same_bytes is not None else [None]
    if None in found:
        return ""
    alone = [_some(figure) for figure in found]
    originals = [_some(model.original) for model in models]
    gaps, own_gaps = (
        [abs(original - figure) for original, figure in zip(originals, figures, strict=True)]
        for figures in ([_some(model.rebuilt[rank]) for model in models], alone)
    )
    verdict = "Neither is clearly nearer to the originals"
    if _is_better(gaps, own_gaps, 1.0):
        verdict = "So cutting each model alone is better"
    elif _is_better(own_gaps, gaps, 1.0):
        verdict = "Rebuilt models are nearer to the originals"
    return (
        f" Each model cut alone to rank {same_bytes}, which takes no more bytes than this bundle, has "
        f"{statistics.fmean(alone):.3g}. {verdict}."
    )


def _is_better(figures: Sequence[float], others: Sequence[float], better: float) -> bool:
    differences = [better * (figure - other) for figure, other in zip(figures, others, strict=True)]
    return statistics.fmean(differences) > 2 * (_standard_error(differences) or 0.0)


def _some(figure: float | None) -> float:
    assert figure is not None
    return figure


def _listed(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
