"""Plan: error against bytes for the axes and ranks that a user could choose, from the moments alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, opened_workers
from eigenzoo.records import Progress, no_progress, plain
from eigenzoo.subspace.fitting.allocation import (
    Collected,
    LayerSpectra,
    Overhead,
    Wanted,
    collect_spectra,
    contents,
    overhead,
)
from eigenzoo.subspace.fitting.bytes import break_even
from eigenzoo.subspace.fitting.fit import check_place, opened
from eigenzoo.subspace.fitting.options import DTYPES, check_center
from eigenzoo.subspace.moments.moments_cache import opened_cache
from eigenzoo.weights.views import AXES, CENTERS, check_axes, check_choice
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.stack import UpdateStack
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
        lora_rank: the largest rank that a rebuilt LoRA update can have; None for full weights. Axes outputs and inputs bound
            it by their rank and by the rank of the model's own update; axis models adds up the ranks of all models.
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
    lora_rank: int | None


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
    cache: bool = True,
    progress: Progress = no_progress,
) -> Plan:
    """Print-ready table of error against bytes; one pass over the weights, no basis.

    All choices of axes and ranks are made from one pass, and for axis `models` from none where its moments are kept. What
    rounding of bases to half precision loses comes on top.

    Args:
        zoo: an opened zoo, or what `open_zoo` takes.
        axes: one choice of axes to look at; by default all the useful ones. The outputs' and inputs' moments of large
            layers cost N·D·(O + I) products and an O³ eigendecomposition: name `models` alone to be spared them.
        center: what is removed first.
        dtype: what bases would be stored in.
        device: where products run: "cpu" or "cuda".
        max_memory: bytes that blocks of weights may take in all; by default a quarter of the machine's memory.
        workers: where tasks run instead of this process's threads.
        cache: whether moments are kept in, and taken from, the user's cache folder.
        progress: called as progress(stage, done, total).
    """
    choices = check_choices(axes, center, dtype)
    itemsize: int = getattr(torch, dtype).itemsize
    check_place(workers, max_memory, device)
    source = opened(zoo)
    check_center(center, source.view)
    sides = tuple(axis for axis in AXES if axis != "models" and any(axis in choice for choice in choices))
    heldout = ("models",) in choices and center == "models"
    with (
        opened_workers(workers, max_memory, device) as running,
        opened_cache(source, cache, running.resources.device) as kept,
    ):
        # The models' Gram is always collected: without it nothing is known of the mean.
        wanted = Wanted(("models", *sides), center, heldout=heldout)
        layers = collect_spectra(source, wanted, running, kept, progress)
    spectra = {name: layer.spectra for name, layer in layers.items()}
    energy = sum(layer.energy for layer in spectra.values())
    carried = contents(source)
    known = {choice: overhead(source, choice, carried) for choice in choices}
    update_ranks = _update_ranks(source)
    rows = [
        _row(layers, choice, rank, source, itemsize, energy, known[choice], center, update_ranks)
        for choice in choices
        for rank in _ranks(spectra, choice)
    ]
    mean_only = sum(layer.about_mean for layer in spectra.values()) / energy if energy > 0 else 0.0
    return Plan(len(source), len(spectra), source.view, source.num_bytes, mean_only, tuple(rows))


def check_choices(axes: Sequence[str] | None, center: str, dtype: str) -> tuple[tuple[str, ...], ...]:
    """Return the choices of axes to look at; raises UsageError for what a plan does not take."""
    check_choice(center, CENTERS, "center")
    check_choice(dtype, DTYPES, "dtype")
    return CHOICES if axes is None else (check_axes(axes),)


def _ranks(spectra: Mapping[str, LayerSpectra], axes: Sequence[str]) -> list[int]:
    """Powers of two below the largest complete rank, and that one."""
    largest = max((layer.whole(axis) for layer in spectra.values() for axis in axes if axis in layer.values), default=1)
    powers = [2**power for power in range(32) if 2**power < largest]
    return [0, *powers, largest] if "models" in axes and len(axes) == 1 else [*powers, max(largest, 1)]


def _row(
    layers: Mapping[str, Collected],
    axes: tuple[str, ...],
    rank: int,
    zoo: Zoo,
    itemsize: int,
    energy: float,
    known: Overhead,
    center: str,
    update_ranks: Mapping[str, tuple[int, ...]],
) -> PlanRow:
    num_models, lost, whole, per_model = len(zoo), 0.0, known.shared, known.per_model
    lora_ranks = []
    for name, layer in ((name, layer.spectra) for name, layer in layers.items()):
        ranks = {axis: min(rank, layer.whole(axis)) for axis in axes if axis in layer.values}
        lost += layer.error(ranks)
        whole += layer.num_bytes(ranks, num_models, itemsize)
        per_model += layer.coefficient_bytes(ranks)
        if name in update_ranks:
            sides = [kept for axis, kept in ranks.items() if axis != "models"]
            own = sum(update_ranks[name]) if "models" in ranks else max(update_ranks[name])
            lora_ranks.append(max(1, min(*zoo.layers[name].shape, own, *sides)))
    whole += known.per_model * num_models
    return PlanRow(
        axes,
        rank,
        lost / energy if energy > 0 else 0.0,
        len(axes) == 1,
        *_captures(layers, axes, rank, center),
        whole,
        zoo.num_bytes / whole,
        per_model,
        break_even(whole - per_model * num_models, per_model, zoo.num_bytes / num_models),
        max(lora_ranks, default=None),
    )


def _update_ranks(zoo: Zoo) -> dict[str, tuple[int, ...]]:
    """The ranks of all models' LoRA updates, by layer."""
    stacks = {name: zoo.stack(name) for name, layer in zoo.layers.items() if layer.kind == "update"}
    return {name: stack.ranks for name, stack in stacks.items() if isinstance(stack, UpdateStack)}


def _captures(
    layers: Mapping[str, Collected], axes: tuple[str, ...], rank: int, center: str
) -> tuple[float | None, float | None]:
    """Shares of the variance kept in-sample and held out, over all layers weighted by their variance."""
    variance = sum(layer.spectra.about_mean for layer in layers.values())
    if axes != ("models",) or center != "models" or variance <= 0:
        return None, None
    kept = sum(float(layer.spectra.values["models"][:rank].sum()) for layer in layers.values())
    heldout = [
        (layer.heldout[min(rank, len(layer.heldout) - 1)], layer.spectra.variance)
        for layer in layers.values()
        if layer.heldout is not None
    ]
    whole = sum(weight for _, weight in heldout)
    return kept / variance, sum(share * weight for share, weight in heldout) / whole if whole > 0 else None
