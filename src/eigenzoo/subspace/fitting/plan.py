"""Compare error and bytes of all useful axes and ranks, from the moments alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from eigenzoo.display import counted, html_table, in_bytes, in_percent
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, opened_workers
from eigenzoo.records import AloneRow, Progress, no_progress, plain
from eigenzoo.subspace.bases.basis import CORES
from eigenzoo.subspace.fitting.allocation import (
    Collected,
    SpectraRequest,
    collect_spectra,
)
from eigenzoo.subspace.fitting.alone import alone_rows, named
from eigenzoo.subspace.fitting.bytes import ItemSizes, Overhead, break_even, contents, overhead
from eigenzoo.subspace.fitting.fit import check_resources, opened
from eigenzoo.subspace.fitting.heldout_sides import pooled_sides
from eigenzoo.subspace.fitting.layer_spectra import LayerSpectra
from eigenzoo.subspace.fitting.options import COEFFICIENT_DTYPES, DTYPES, check_center, item_sizes
from eigenzoo.subspace.moments.moments_cache import opened_cache
from eigenzoo.weights.views import AXES, CENTERS, check_axes, check_choice
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.stack import UpdateStack
from eigenzoo.zoo.zoo import Zoo

SIDES = ("outputs", "inputs")
CHOICES = (("models",), ("outputs",), ("inputs",), SIDES, ("models", "outputs", "inputs"))

BY_ENERGY = (
    "This is by energy; answers can differ, so measure them before you decide: eigenzoo evaluate BUNDLE --metric."
)
"""The end of every advice."""

ROUND_OFF = 1e-8
"""Shares of the energy that differ by less count as equal."""

MOST_ROWS = 12
"""Number of choices in a printed table: with its notes about one screen."""


@dataclass(frozen=True)
class PlanRow:
    """One choice of axes and rank.

    Attributes:
        axes, rank: the choice; a rank larger than a layer's dimension means the whole layer.
        residual: lost share of the analysed energy, in-sample; exact for one axis, and for outputs with inputs where the sides of
            updates have at most 2,048 values or full weights are small. An upper bound elsewhere.
        exact: whether `residual` is exact.
        captured, heldout: for center `models`, the share of the variance about the mean that is kept, in-sample and of models left
            out of the fit: for axis models all models in-sample, and as many of five folds as hold 40 models; for sides of LoRA
            updates one fold of five, as `fit` has it. Elsewhere None, since only a fit can tell.
        bytes: of the whole bundle with headers and carried tensors, without moments; within a few percent of the saved one.
        ratio: bytes of the zoo's files over `bytes`.
        per_model: bytes that one more model adds.
        break_even_models: the number of models from which on the bundle is smaller than their files; None if never.
        lora_rank: the largest rank at which `RebuiltModel.save` writes an update by default: at most that of the zoo's updates and
            that of the sides. None for full weights.
        core_rank: the rank that each model's core is cut to, where that takes fewer bytes; None for whole cores.
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
    core_rank: int | None = None


@dataclass(frozen=True)
class Plan:
    """The zoo's size, the controls (the mean alone, models cut alone), and the choices.

    `alone` is empty for updates of rank 1, and for full weights so large that their singular values are not cheap. Bytes are
    those of bases and coefficients in `dtype` and `coefficients_dtype`; losses are those before rounding.
    """

    num_models: int
    num_layers: int
    view: str
    whole_zoo: int
    mean_only_residual: float
    rows: tuple[PlanRow, ...]
    alone: tuple[AloneRow, ...] = ()
    dtype: str = "float32"
    coefficients_dtype: str = "float32"

    @property
    def rounded_to(self) -> tuple[str, ...]:
        """The dtypes of bundles that lose more than the rows say."""
        return tuple(sorted({self.dtype, self.coefficients_dtype} - {"float32", "float64"}))

    @property
    def better_alone(self) -> AloneRow | None:
        """The control that keeps more for its bytes than every choice, by the measure of `recommended`; None without one."""
        best = self.alone_for_bytes
        if best is None or self._gain(best) <= max((self._gain(row) for row in self.rows), default=0.0):
            return None
        return best

    @property
    def recommended(self) -> PlanRow | None:
        """The choice to try first: of bundles smaller than the zoo's files, the one that keeps the most for its bytes.

        It maximises the share of Σ‖X − mean‖² that is kept minus the bundle's share of the files' bytes. None where no choice
        keeps a larger share than it takes.
        """
        best, row = max(((self._gain(row), row) for row in self.rows), key=lambda pair: pair[0], default=(0.0, None))
        return row if best > 0 else None

    @property
    def for_many(self) -> PlanRow | AloneRow | None:
        """The choice, or the control, for many more models, whose common part costs nothing: the most kept for one model's bytes.

        The share that a bundle keeps is that of models left out of the fit. A choice for which it is not known is not considered.
        None where nothing keeps a larger share of the models' differences than it takes of their bytes.
        """
        measured = (row for row in self.rows if row.heldout is not None)
        rows: tuple[PlanRow | AloneRow, ...] = (*measured, *self.alone)
        kept, row = max(((self._gain_of_many(row), row) for row in rows), key=lambda pair: pair[0], default=(0.0, None))
        return row if kept > 0 else None

    @property
    def unmeasured_for_many(self) -> PlanRow | None:
        """A choice of sides that may be better than `for_many`: its share of models left out of the fit is not measured here.

        Its in-sample share is taken instead, which is too good. None where another choice is as good even so, or where sharing
        does not save bytes at all. For axis models in-sample shares say nothing: k directions always hold k + 1 models.
        """
        rows = [row for row in self.rows if row.heldout is None and "models" not in row.axes]
        row = max(rows, key=self._gain_of_many, default=None)
        known = self.for_many
        if row is None or self.better_alone is not None:
            return None
        return row if self._gain_of_many(row) > (0.0 if known is None else self._gain_of_many(known)) else None

    def _gain_of_many(self, row: PlanRow | AloneRow) -> float:
        kept = 1 - self._lost(row)
        if isinstance(row, PlanRow) and (row.heldout is not None or "models" in row.axes):
            kept = row.heldout or 0.0
        return kept - row.per_model * self.num_models / self.whole_zoo

    @property
    def alone_for_bytes(self) -> AloneRow | None:
        """The control that keeps the most for its bytes; None where none keeps a larger share than it takes."""
        best = max(self.alone, key=self._gain, default=None)
        return best if best is not None and self._gain(best) > 0 else None

    @property
    def advice(self) -> str:
        """One sentence: what to do for few bytes now, for many more models, and without sharing; empty where nothing helps."""
        alone, many, unmeasured = self.alone_for_bytes, self.for_many, self.unmeasured_for_many
        now = self.better_alone or self.recommended
        parts = (
            [] if now is None else [f"for bytes now, {_choice(now)}, {in_bytes(now.bytes)} in all ({self._loss(now)})"]
        )
        if unmeasured is not None:
            parts.append(
                f"for many more models, {_choice(unmeasured)}, {in_bytes(unmeasured.per_model)} for each, if the fit, which "
                "measures models left out of it, does not lose much more of them"
            )
        elif many is not None:
            parts.append(f"for many more models, {_choice(many)}, {in_bytes(many.per_model)} for each")
        if alone is not None and isinstance(now, PlanRow):
            parts.append(f"without sharing, {_choice(alone)}, {in_bytes(alone.bytes)} in all ({self._loss(alone)})")
        return f"Advice: {'; '.join(parts)}. {BY_ENERGY}" if parts else ""

    def _gain(self, row: PlanRow | AloneRow) -> float:
        return 1 - self._lost(row) - row.bytes / self.whole_zoo

    def _lost(self, row: PlanRow | AloneRow) -> float:
        """Share of Σ‖X − mean‖² that is lost."""
        return row.residual / self.mean_only_residual if self.mean_only_residual > 0 else 0.0

    def _loss(self, row: PlanRow | AloneRow) -> str:
        """Write the share of all energy that is lost, in-sample."""
        if isinstance(row, AloneRow):
            return f"{in_percent(row.residual)} of the energy lost"
        bound = "" if row.exact else "at most "
        rounding = f" before rounding to {' and '.join(self.rounded_to)}" if self.rounded_to else ""
        return f"{bound}{in_percent(row.residual)} of the energy lost{rounding}"

    def shortlist(self, most: int = MOST_ROWS) -> tuple[PlanRow, ...]:
        """Return the choices worth comparing, in order of their bytes; the recommended one is always among them.

        A row is left out if another one is not larger and does not lose more. So duplicates are left out too.
        If there are more than `most` rows, some between the smallest and the largest are left out.
        """
        front = _frontier(self.rows)
        steps = max(min(most, len(front)) - 1, 1)
        chosen = {round(step * (len(front) - 1) / steps) for step in range(steps + 1)} if front else set()
        best = self.recommended
        if best in front and (index := front.index(best)) not in chosen:
            # The first and the last row stay, and the closest of the others is removed.
            inner = sorted(chosen - {0, len(front) - 1}, key=lambda other: abs(other - index))
            chosen = (chosen - set(inner[:1])) | {index}
        return tuple(front[index] for index in sorted(chosen))

    def __repr__(self) -> str:
        size = f"{counted(self.num_models, 'model')}, {counted(self.num_layers, 'layer')}, view={self.view!r}"
        best = self.recommended
        advice = "no choice keeps a larger share of the models' differences than it takes of their bytes"
        if best is not None:
            advice = f"try {_choice(best)}: {in_bytes(best.bytes)}, {self._loss(best)}"
        return f"Plan({size}, {in_bytes(self.whole_zoo)} in files, {len(self.rows)} choices): {advice}"

    def _repr_html_(self) -> str:
        best = self.recommended
        rows = [
            (
                ", ".join(row.axes) + (" (recommended)" if row == best else ""),
                str(row.rank) + ("" if row.core_rank is None else f", cores {row.core_rank}"),
                ("" if row.exact else "≤ ") + in_percent(row.residual),
                in_bytes(row.bytes),
                f"{row.ratio:.2f}×",
            )
            for row in self.shortlist()
        ]
        return html_table(repr(self), ("axes", "rank", "lost", "bundle", "ratio"), rows)

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
    coefficients_dtype: str = "float32",
    device: str = "cpu",
    max_memory: int | None = None,
    workers: Workers | None = None,
    cache: bool = True,
    progress: Progress = no_progress,
) -> Plan:
    """Compare axes and ranks by error and bytes, with one pass over the weights and without a basis.

    One pass serves all choices of axes and ranks. Axis `models` alone needs no pass if its moments are in the cache. The error
    of rounding bases or coefficients is not included.

    Args:
        zoo: an opened zoo, or anything that `open_zoo` accepts.
        axes: one choice of axes. Default: all useful ones. The outputs' and inputs' moments of large layers cost N·D·(O + I)
            products and an O³ eigendecomposition; pass `models` alone to avoid them.
        center: what to subtract first.
        dtype: dtype of the stored bases.
        coefficients_dtype: dtype of the stored coefficients.
        device: device of products: "cpu" or "cuda".
        max_memory: bytes for blocks of weights in all tasks together. Default: a quarter of the machine's memory.
        workers: workers for the tasks instead of this process's threads.
        cache: read and write moments in the user's cache folder.
        progress: called as progress(stage, done, total).
    """
    choices = check_choices(axes, center, dtype, coefficients_dtype)
    itemsize = item_sizes(dtype, coefficients_dtype)
    check_resources(workers, max_memory, device)
    source = opened(zoo)
    check_center(center, source.view)
    sides = tuple(axis for axis in AXES if axis != "models" and any(axis in choice for choice in choices))
    heldout = any(choice == ("models",) or "models" not in choice for choice in choices) and center == "models"
    with (
        opened_workers(workers, max_memory, device) as running,
        opened_cache(source, cache, running.resources.device) as moments_cache,
    ):
        # The models' Gram is always collected, because the mean's energy is needed.
        request = SpectraRequest(("models", *sides), center, heldout=heldout, alone=True, cores=SIDES in choices)
        layers = collect_spectra(source, request, running, moments_cache, progress)
    spectra = {name: layer.spectra for name, layer in layers.items()}
    energy = sum(layer.energy for layer in spectra.values())
    carried = contents(source)
    overheads = {choice: overhead(source, choice, carried, itemsize.basis) for choice in choices}
    update_ranks = _update_ranks(source)
    row_of = partial(_row, layers, source, itemsize, energy, overheads, center, update_ranks)
    rows = [row_of(choice, rank) for choice in choices for rank in _ranks(spectra, choice)]
    if SIDES in choices:
        rows += _rows_with_cores(layers, row_of, [row for row in rows if row.axes == SIDES])
    mean_only = sum(layer.about_mean for layer in spectra.values()) / energy if energy > 0 else 0.0
    return Plan(
        len(source),
        len(spectra),
        source.view,
        source.num_bytes,
        mean_only,
        tuple(rows),
        alone_rows(source, {name: layer.alone for name, layer in layers.items()}, energy),
        dtype,
        coefficients_dtype,
    )


def _choice(row: PlanRow | AloneRow) -> str:
    if isinstance(row, AloneRow):
        return f"each model cut alone to {named(row)}"
    cores = "" if row.core_rank is None else f" with cores of rank {row.core_rank}"
    return f"axes {', '.join(row.axes)} at rank {row.rank}{cores}"


def check_choices(
    axes: Sequence[str] | None, center: str, dtype: str, coefficients_dtype: str = "float32"
) -> tuple[tuple[str, ...], ...]:
    """Return the choices of axes to compare. Raises UsageError for axes that a plan does not support."""
    check_choice(center, CENTERS, "center")
    check_choice(dtype, DTYPES, "dtype")
    check_choice(coefficients_dtype, COEFFICIENT_DTYPES, "coefficients dtype")
    return CHOICES if axes is None else (check_axes(axes),)


def _ranks(spectra: Mapping[str, LayerSpectra], axes: Sequence[str]) -> list[int]:
    """Return the powers of two below the largest complete rank, and that rank."""
    largest = max(
        (layer.full_rank(axis) for layer in spectra.values() for axis in axes if axis in layer.values), default=1
    )
    powers = [2**power for power in range(32) if 2**power < largest]
    return [0, *powers, largest] if "models" in axes and len(axes) == 1 else [*powers, max(largest, 1)]


def _frontier(rows: Iterable[PlanRow]) -> list[PlanRow]:
    """Return the rows that no other makes useless by being as small and losing as little, in order of their bytes."""
    front: list[PlanRow] = []
    for row in sorted(rows, key=lambda row: (row.bytes, row.residual, len(row.axes))):
        if not front or row.residual < front[-1].residual - ROUND_OFF:
            front.append(row)
    return front


def _rows_with_cores(
    layers: Mapping[str, Collected], row_of: Callable[..., PlanRow], whole: Sequence[PlanRow]
) -> list[PlanRow]:
    """Return the rows with cut cores that are worth comparing with those of `whole` cores, at powers of two.

    Where every side is whole nothing is shared: that is the control, each model cut alone.
    """
    known = [layer.cores for layer in layers.values() if layer.cores is not None]
    if len(known) < len(layers):
        return []
    rows = [
        row_of(SIDES, row.rank, core_rank)
        for row in whole
        if any(_truncates(layer.spectra, row.rank) for layer in layers.values())
        for core_rank in (2**power for power in range(32))
        if any(cores.cuts(row.rank, core_rank) for cores in known)
    ]
    front = _frontier([*whole, *rows])
    return [row for row in rows if row in front]


def _truncates(layer: LayerSpectra, rank: int) -> bool:
    return any(min(rank, layer.full_rank(axis)) < size for axis, size in zip(SIDES, layer.layer.shape, strict=True))


def _row(
    layers: Mapping[str, Collected],
    zoo: Zoo,
    itemsize: ItemSizes,
    energy: float,
    overheads: Mapping[tuple[str, ...], Overhead],
    center: str,
    update_ranks: Mapping[str, tuple[int, ...]],
    axes: tuple[str, ...],
    rank: int,
    core_rank: int | None = None,
) -> PlanRow:
    num_models, lost, num_bytes, per_model = len(zoo), 0.0, overheads[axes].shared, overheads[axes].per_model
    lora_ranks = []
    exact = len(axes) == 1 or (axes == SIDES and all(layer.cores is not None for layer in layers.values()))
    for name, layer in ((name, layer.spectra) for name, layer in layers.items()):
        ranks = {axis: min(rank, layer.full_rank(axis)) for axis in axes if axis in layer.values}
        cores = layers[name].cores if axes == SIDES else None
        lost += layer.error(ranks) if cores is None else cores.lost(rank, core_rank)
        if cores is not None and core_rank is not None and cores.cuts(rank, core_rank):
            ranks[CORES] = core_rank
        num_bytes += layer.num_bytes(ranks, num_models, itemsize)
        per_model += layer.coefficient_bytes(ranks, itemsize)
        if name in update_ranks:
            sides = [side_rank for axis, side_rank in ranks.items() if axis != "models"]
            lora_ranks.append(max(1, min(*zoo.layers[name].shape, max(update_ranks[name]), *sides)))
    num_bytes += overheads[axes].per_model * num_models
    return PlanRow(
        axes,
        rank,
        lost / energy if energy > 0 else 0.0,
        exact,
        *_captures(layers, axes, rank, center, core_rank),
        num_bytes,
        zoo.num_bytes / num_bytes,
        per_model,
        break_even(num_bytes - per_model * num_models, per_model, zoo.num_bytes / num_models),
        max(lora_ranks, default=None),
        core_rank,
    )


def _update_ranks(zoo: Zoo) -> dict[str, tuple[int, ...]]:
    """Return the ranks of all models' LoRA updates, by layer."""
    stacks = {name: zoo.stack(name) for name, layer in zoo.layers.items() if layer.kind == "update"}
    return {name: stack.ranks for name, stack in stacks.items() if isinstance(stack, UpdateStack)}


def _captures(
    layers: Mapping[str, Collected], axes: tuple[str, ...], rank: int, center: str, core_rank: int | None
) -> tuple[float | None, float | None]:
    """Return the kept shares of the variance, in-sample and held out, over all layers weighted by their variance."""
    variance = sum(layer.spectra.about_mean for layer in layers.values())
    if center == "models" and "models" not in axes:
        pooled = pooled_sides((layer.sides, layer.spectra.variance) for layer in layers.values()).get(",".join(axes))
        if pooled is None:
            return None, None
        lost = (0.0, 0.0) if core_rank is None else _captures_lost(layers, rank, core_rank)
        return pooled.at("in_sample", rank) - lost[0], pooled.at("captured", rank) - lost[1]
    if axes != ("models",) or center != "models" or variance <= 0:
        return None, None
    captured = sum(float(layer.spectra.values["models"][:rank].sum()) for layer in layers.values())
    heldout = [
        (layer.heldout[min(rank, len(layer.heldout) - 1)], layer.spectra.variance)
        for layer in layers.values()
        if layer.heldout is not None
    ]
    heldout_variance = sum(weight for _, weight in heldout)
    heldout_captured = sum(share * weight for share, weight in heldout)
    return captured / variance, heldout_captured / heldout_variance if heldout_variance > 0 else None


def _captures_lost(layers: Mapping[str, Collected], rank: int, core_rank: int) -> tuple[float, float]:
    """Return the shares of the variance that the cut of cores loses, of a fold's fitted models and of those held out."""
    known = [
        (layer.cores.cut_shares(rank, core_rank), layer.spectra.variance) for layer in layers.values() if layer.cores
    ]
    having = [(shares, variance) for shares, variance in known if shares is not None and variance > 0]
    total = sum(variance for _, variance in having)
    fitted, heldout = (sum(shares[part] * variance for shares, variance in having) / total for part in (0, 1))
    return fitted, heldout
