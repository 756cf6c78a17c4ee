"""Test a zoo for a shared subspace beyond chance, the mean and a common origin."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenzoo.display import counted, html_table, one_line
from eigenzoo.errors import UsageError
from eigenzoo.evidence import growth as growing
from eigenzoo.evidence.controls import controls
from eigenzoo.evidence.document import document
from eigenzoo.evidence.layer_evidence import LayerEvidence, measure_layer
from eigenzoo.evidence.lineage import Cosines, Lineage, as_lineages, lineage
from eigenzoo.evidence.record import EvidenceRecord
from eigenzoo.evidence.source import MomentSource, open_source
from eigenzoo.evidence.suitability import Thresholds
from eigenzoo.evidence.summary import decide, summarize
from eigenzoo.linalg.gram import center_gram
from eigenzoo.linalg.heldout import make_grouped_folds
from eigenzoo.linalg.rank import AUTO, RankRule, check_rule
from eigenzoo.linalg.spectrum import eigenpairs
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, local_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.fitting.heldout_sides import pooled_sides
from eigenzoo.subspace.moments.duplicates import find_duplicates
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.views import CENTERS, check_axes, check_choice
from eigenzoo.zoo.runs import say_runs
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zero_models import zero_models
from eigenzoo.zoo.zoo import Zoo

MAX_LINEAGE_FOLDS = 10
"""Largest number of folds of lineages."""

SMALLEST_GROUP, MOST_GROUPS = 8, 5
"""Largest number of groups with their own controls, the largest ones that are large enough to hold models out."""

ONE_LINEAGE = 0.8
"""From this share of models in one group on the zoo has one lineage and is judged by it, because too few others are left to fit."""

MAP_DIMENSIONS = 3

MOST_WARNINGS = 5
"""Number of warnings in `repr`."""


@dataclass(frozen=True)
class Evidence(EvidenceRecord):
    """Results of all controls on a zoo, with its verdict. Frozen.

    Attributes:
        names: names of the N models.
        view, center: how layers become matrices, and what is subtracted before the spectra.
        layers: the controls of each layer, by its name.
        axes: spectra of the requested axes, by layer and axis.
        lineage: groups with a common origin, duplicates, N × N cosines.
        growth: results for growing numbers of models; None for fewer than five models.
        summary: averages over all layers, weighted by their number of values, and the rule's test on all layers together.
        map: N × 3, the models' first coefficients, for all layers together; `map_shares`: their three shares of all variance.
        thresholds: thresholds of layer suitability.
        verdict: the verdict on the zoo.
        warnings: warnings that apply to all figures.
        runs: groups of models that are checkpoints of one training run.
        sides: shares of held-out models that the sides keep, over all layers by their variance; for axes that were asked for.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values. docs/evidence.md lists the keys."""
        return document(self)

    def __repr__(self) -> str:
        size = f"{counted(len(self.names), 'model')}, {counted(len(self.layers), 'layer')}, view={self.view!r}"
        lines = [f"Evidence({size}): {self.verdict.code}", self.verdict.text]
        return "\n".join(map(one_line, [*lines, *(f"Warning: {warning}" for warning in self.warnings[:MOST_WARNINGS])]))

    def _repr_html_(self) -> str:
        rows = [
            (each.name, each.statistic, _number(each.value), each.control, _number(each.control_value))
            for each in controls(self)
        ]
        columns = ("control", "statistic", "value", "compared with", "value there")
        return html_table(self.verdict.code, columns, rows, note=self.verdict.text)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


@own_settings()
def evidence(
    source: Zoo | Subspace | Source,
    *,
    axes: str | Iterable[str] = (),
    rank: RankRule = AUTO,
    center: str = "models",
    seed: int = 0,
    thresholds: Thresholds | None = None,
    suitability: bool = False,
    view: str | None = None,
    base: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_memory: int | None = None,
    device: str = "cpu",
    workers: Workers | None = None,
    cache: bool = True,
    progress: Progress = no_progress,
) -> Evidence:
    """Test a zoo for a shared subspace with all controls, and give a verdict.

    Args:
        source: an opened zoo, anything that `open_zoo` accepts, a subspace, or the folder of a bundle. For a bundle only its
            moments are read.
        axes: also compute spectra of these axes: `outputs`, `inputs` or both (zoos only; an O³ or I³ eigendecomposition each).
        rank: rank for the controls universality and secondary: a number, a share of the variance, or "auto" (directions above
            the null). At least one direction is taken. The verdict and the other controls do not depend on it.
        center: the center to subtract before the spectra. Held-out figures are always about the models' mean.
        seed: seed of draws, folds and halves.
        thresholds: thresholds of layer suitability, an `eigenzoo.evidence.suitability.Thresholds(low=2, high=6, spread=1,
            share=0.5, q=0.2)`; these are the defaults.
        suitability: also compute every model's own spectrum for the authors' alpha score (`alpha_score`). For full weights this
            takes one more read of the zoo and an SVD per model and layer, N·min(O, I)²·max(O, I) operations. LoRA updates always
            have it.
        view, base, include, exclude: as in `open_zoo`.
        max_memory: bytes for blocks of weights in all tasks together. Default: a quarter of the machine's memory.
        device: device of the pass over the weights: "cpu" or "cuda".
        workers: workers for its tasks instead of this process's threads, such as a cluster.
        cache: read and write moments in the user's cache folder.
        progress: called as progress(stage, done, total).

    Returns:
        A frozen record with `.verdict.code`, `.verdict.text` and `.to_dict()`, which holds every number of the text.
        docs/evidence.md defines them and reproduces some with numpy.

    Cost: one pass over the weights (none for a bundle), then about forty N × N eigendecompositions per layer, with layers in
    parallel on as many threads as torch has. Memory: the layers' Grams.
    """
    started = time.perf_counter()
    sides = check_axes(axes) if (axes := (axes,) if isinstance(axes, str) else tuple(axes)) else ()
    if "models" in sides:
        sides = tuple(axis for axis in sides if axis != "models")
    check_choice(center, CENTERS, "center")
    if not isinstance(thresholds, Thresholds | None):
        raise UsageError(
            f"thresholds {thresholds!r} are not Thresholds",
            next_step="pass eigenzoo.evidence.suitability.Thresholds(low=2, high=6, spread=1, share=0.5, q=0.2)",
        )
    rule, seed = check_rule(rank), check_seed(seed)
    measured = open_source(
        source,
        sides,
        center,
        seed,
        progress,
        max_memory=max_memory,
        device=device,
        workers=workers,
        cache=cache,
        view=view,
        base=base,
        include=include,
        exclude=exclude,
        suitability=suitability,
    )
    if len(measured.names) < 2:
        raise UsageError("one model", rule="evidence compares models", next_step="name two or more")
    origin, pooled = _gather(measured)
    places = {name: place for place, name in enumerate(measured.names)}
    lineages = as_lineages(measured.names, origin.groups)
    large = [torch.tensor([places[name] for name in group]) for group in origin.groups if len(group) >= SMALLEST_GROUP]
    core = large[0] if large and len(large[0]) >= ONE_LINEAGE * len(places) else None
    several = core is None and origin.groups and len(lineages) > 1
    folds = make_grouped_folds(lineages, MAX_LINEAGE_FOLDS) if several else None
    # A group of all or nearly all models would repeat the controls of the zoo.
    groups = large[:MOST_GROUPS] if several else []
    layers = _measure_all(measured, folds, core, groups, rule, seed, progress)
    grown = [(layer.growth, layer.layer.num_values) for layer in layers.values() if layer.growth is not None]
    summary = summarize(list(layers.values()))
    coordinates, shares = _map(pooled)
    return Evidence(
        names=tuple(measured.names),
        view=measured.view,
        center=measured.center,
        seed=seed,
        layers=layers,
        axes={name: dict(measured.axes(name)) for name in layers},
        lineage=origin,
        growth=growing.growth(grown, len(measured.names)),
        summary=summary,
        map=coordinates,
        map_shares=shares,
        thresholds=thresholds or Thresholds(),
        verdict=decide(
            layers, summary, origin, len(measured.names), measured.view, say_runs(measured.runs, len(places))
        ),
        runs=measured.runs,
        sides=pooled_sides((measured.sides(name), layer.variance) for name, layer in layers.items()),
        warnings=(*measured.warnings, *_zero(measured)),
        seconds=time.perf_counter() - started,
    )


def _zero(measured: MomentSource) -> list[str]:
    """Name the models that are zero, for a zoo. A bundle's warnings already name them."""
    if measured.zoo is None:
        return []
    return zero_models(measured.zoo, {name: measured.moments(name).energies_N for name in measured.layers})


def _gather(measured: MomentSource) -> tuple[Lineage, Tensor]:
    """Return cosines and duplicates over all layers, and the Gram of all layers together."""
    num_models = len(measured.names)
    cosines = Cosines(num_models, measured.view)
    pooled = torch.zeros(num_models, num_models, dtype=torch.float64)

    def each() -> Iterable[Any]:
        for name, layer in measured.layers.items():
            moments = measured.moments(name)
            cosines.add(layer, moments)
            if moments.variance > 0:
                pooled.add_(moments.gram_NN)
            yield moments

    pairs = find_duplicates(measured.names, each(), measured.zoo)
    return lineage(measured.names, cosines, pairs), pooled


def _measure_all(
    measured: MomentSource,
    folds: list[Tensor] | None,
    core: Tensor | None,
    groups: list[Tensor],
    rule: RankRule,
    seed: int,
    progress: Progress,
) -> dict[str, LayerEvidence]:
    """Measure layers in parallel. Each needs about forty small eigendecompositions, which torch's own threads slow down."""

    def measure(name: str) -> LayerEvidence:
        layer, moments = measured.layers[name], measured.moments(name)
        return measure_layer(layer, moments, folds, core, groups, rule, seed, measured.spectra(name))

    with local_workers() as workers:
        return dict(workers.each("weighing layers", measure, measured.layers, progress, what="layer"))


def _map(pooled_NN: Tensor) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
    """Return the models' first coefficients for all layers together."""
    centered = center_gram(pooled_NN)
    values, vectors = eigenpairs(centered)
    kept = min(MAP_DIMENSIONS, values.numel())
    coordinates = torch.zeros(centered.shape[0], MAP_DIMENSIONS, dtype=torch.float64)
    coordinates[:, :kept] = vectors[:, :kept] * values[:kept].sqrt()
    total = float(centered.diagonal().sum())
    shares = (values[:kept] / total).tolist() if total > 0 else []
    return tuple(tuple(row) for row in coordinates.tolist()), (*shares, *(0.0,) * (MAP_DIMENSIONS - len(shares)))
