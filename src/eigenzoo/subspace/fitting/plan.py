"""Plan: error against bytes for the axes and ranks that a user could choose, from the moments alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eigenzoo.errors import UsageError
from eigenzoo.linalg.heldout import cross_validated_capture
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, opened_workers
from eigenzoo.records import Progress, no_progress, plain
from eigenzoo.subspace.fitting.allocation import LayerSpectra, Overhead, collect_spectra, overhead
from eigenzoo.subspace.fitting.bytes import break_even
from eigenzoo.subspace.fitting.fit import opened
from eigenzoo.subspace.fitting.options import DTYPES
from eigenzoo.weights.views import AXES, CENTERS, check_axes, check_choice
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zoo import Zoo

CHOICES = (("models",), ("outputs",), ("inputs",), ("outputs", "inputs"), ("models", "outputs", "inputs"))


@dataclass(frozen=True)
class PlanRow:
    """One choice of axes and rank.

    Attributes:
        axes, rank: the choice; a rank above what a layer has means all of it.
        residual: share of the analysed energy that is lost, in-sample: exact for one axis, an upper bound for more.
        exact: whether `residual` is exact.
        captured, heldout: for axis and center `models`, the share of the variance about the mean that is kept, in-sample and
            of models left out of the fit (as many of five folds as hold 40 models); elsewhere None, since only a fit can tell.
        bytes: of the whole bundle, headers and carried tensors included, moments not; within a few percent of the saved one.
        ratio: bytes of the zoo's files over `bytes`.
        per_model: bytes that one more model adds.
        break_even_models: the number of models from which on the bundle is smaller than their files; None if never.
    """

    axes: tuple[str, ...]
    rank: int
    residual: float
    exact: bool
    captured: float | None
    heldout: float | None
    bytes: int
    ratio: float
    per_model: int
    break_even_models: int | None


@dataclass(frozen=True)
class Plan:
    """The zoo's size, the control (the mean alone), and the choices."""

    num_models: int
    num_layers: int
    view: str
    whole_zoo: int
    mean_only_residual: float
    rows: tuple[PlanRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dict(plain(self))


@own_settings()
def plan(
    zoo: Zoo | Source,
    *,
    axes: Sequence[str] | None = None,
    center: str = "models",
    dtype: str = "float32",
    device: str = "cpu",
    max_memory: int | None = None,
    workers: Workers | None = None,
    progress: Progress = no_progress,
) -> Plan:
    """Print-ready table of error against bytes; one pass over the weights, no basis.

    Args:
        zoo: an opened zoo, or what `open_zoo` takes.
        axes: one choice of axes to look at; by default all the useful ones. The outputs' and inputs' moments of large
            layers cost N·D·(O + I) products and an O³ eigendecomposition: name `models` alone to be spared them.
        center: what is removed first.
        dtype: what bases would be stored in.
        device: where products run: "cpu" or "cuda".
        max_memory: bytes that blocks of weights may take in all; by default a quarter of the machine's memory.
        workers: where tasks run instead of this process's threads.
        progress: called as progress(stage, done, total).
    """
    check_choice(center, CENTERS, "center")
    itemsize: int = getattr(torch, check_choice(dtype, DTYPES, "dtype")).itemsize
    source = opened(zoo)
    if source.view == "update" and center in ("columns", "global"):
        raise UsageError(
            f"center {center!r} with view 'update'", rule="updates are centered on the models' mean or not at all"
        )
    choices = CHOICES if axes is None else (check_axes(axes),)
    wanted = tuple(axis for axis in AXES if any(axis in choice for choice in choices))
    # The models' Gram is always collected: without it nothing is known of the mean.
    with opened_workers(workers, max_memory, device) as running:
        spectra = collect_spectra(
            source, ("models", *(axis for axis in wanted if axis != "models")), center, running, progress
        )
    energy = sum(layer.energy for layer in spectra.values())
    known = {choice: overhead(source, choice) for choice in choices}
    rows = [
        _row(spectra, choice, rank, source, itemsize, energy, known[choice], center)
        for choice in choices
        for rank in _ranks(spectra, choice)
    ]
    mean_only = sum(layer.about_mean for layer in spectra.values()) / energy if energy > 0 else 0.0
    return Plan(len(source), len(spectra), source.view, source.num_bytes, mean_only, tuple(rows))


def _ranks(spectra: Mapping[str, LayerSpectra], axes: Sequence[str]) -> list[int]:
    """Powers of two below the largest complete rank, and that one."""
    largest = max((layer.whole(axis) for layer in spectra.values() for axis in axes if axis in layer.values), default=1)
    powers = [2**power for power in range(32) if 2**power < largest]
    return [0, *powers, largest] if "models" in axes and len(axes) == 1 else [*powers, max(largest, 1)]


def _row(
    spectra: Mapping[str, LayerSpectra],
    axes: tuple[str, ...],
    rank: int,
    zoo: Zoo,
    itemsize: int,
    energy: float,
    known: Overhead,
    center: str,
) -> PlanRow:
    num_models, lost, whole, per_model = len(zoo), 0.0, known.shared, known.per_model
    for layer in spectra.values():
        ranks = {axis: min(rank, layer.whole(axis)) for axis in axes if axis in layer.values}
        lost += layer.error(ranks)
        whole += layer.num_bytes(ranks, num_models, itemsize)
        per_model += layer.coefficient_bytes(ranks)
    whole += known.per_model * num_models
    return PlanRow(
        axes,
        rank,
        lost / energy if energy > 0 else 0.0,
        len(axes) == 1,
        *_captures(spectra, axes, rank, center),
        whole,
        zoo.num_bytes / whole,
        per_model,
        break_even(whole - per_model * num_models, per_model, zoo.num_bytes / num_models),
    )


def _captures(
    spectra: Mapping[str, LayerSpectra], axes: tuple[str, ...], rank: int, center: str
) -> tuple[float | None, float | None]:
    """Shares of the variance kept in-sample and held out, over all layers weighted by their variance."""
    variance = sum(layer.about_mean for layer in spectra.values())
    if axes != ("models",) or center != "models" or variance <= 0:
        return None, None
    kept = sum(float(layer.values["models"][:rank].sum()) for layer in spectra.values())
    found = [
        (cross_validated_capture(layer.gram_NN, [rank]), layer.variance)
        for layer in spectra.values()
        if layer.variance > 0
    ]
    heldout = [(folds[0] * weight, weight) for folds, weight in found if folds is not None]
    whole = sum(weight for _, weight in heldout)
    return kept / variance, sum(part for part, _ in heldout) / whole if whole > 0 else None
