"""The control without sharing: what models weigh and lose if each layer is cut to a lower rank by its own SVD.

LoRA updates are cut as they are: the moments hold their singular values. For full weights, the deviation from the models' mean
is cut, and the mean is stored once. Differences from a base are also cut themselves. Singular values of full weights are not
in the moments. They are taken where that is cheap (`is_affordable`), and else the control is not measured.

Legend: N models, O outputs, I inputs, R singular values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from eigenzoo.display import counted, in_bytes, in_percent
from eigenzoo.records import AloneRow, Layer
from eigenzoo.zoo.stack import DenseStack, UpdateStack
from eigenzoo.zoo.zoo import Zoo

ZERO, MEAN = "zero", "mean"

Losses = Mapping[str, Sequence[float]]
"""Energy that all models of a layer lose at ranks 1, 2, 4, …, by what is cut: `zero` or `mean`. No loss after the last rank."""

MOST_PRODUCTS = 2 * 10**10
"""Products that the singular values of a zoo's full weights may take: a few seconds."""

SOLVER = 10
"""Products of an eigenvalue solver per m³, about."""


def is_affordable(zoo: Zoo) -> bool:
    """Tell from the shapes whether singular values of all models' full weights are cheap: N·m·(O·I + 10 m²) products a layer."""
    sides = [(layer.num_values, min(layer.shape)) for layer in zoo.layers.values() if layer.kind == "dense"]
    products = sum(small * (values + SOLVER * small**2) for values, small in sides if small > 1)
    return zoo.view in ("weight", "delta") and len(zoo) * products <= MOST_PRODUCTS


def update_losses(singular_NR: Tensor) -> Losses:
    """Return what updates lose at each rank, from their singular values."""
    energies_R = singular_NR.square().sum(0)
    return {ZERO: [float(energies_R[rank:].sum()) for rank in _powers(energies_R.numel())]}


def weight_losses(matrices: Iterable[Tensor], mean_OI: Tensor | None, layer: Layer) -> Losses:
    """Return what the deviations of full weights from their mean lose at each rank; with the mean, also what the models do.

    Float64. Memory: one matrix, and the Gram of its smaller side.
    """
    energies = {MEAN: torch.zeros(min(layer.shape), dtype=torch.float64)}
    if mean_OI is not None:
        energies[ZERO] = torch.zeros_like(energies[MEAN])
    for matrix in matrices if min(layer.shape) > 1 else ():
        deviation_OI = matrix.double()
        energies[MEAN] += _own_energies(deviation_OI)
        if mean_OI is not None:
            energies[ZERO] += _own_energies(deviation_OI + mean_OI)
    ranks = [rank for rank in _powers(min(layer.shape)) if is_cut(layer, rank)]
    return {about: [float(values_R[rank:].sum()) for rank in ranks] for about, values_R in energies.items()}


def _own_energies(matrix_OI: Tensor) -> Tensor:
    """Squared singular values, descending."""
    thin = matrix_OI if matrix_OI.shape[0] <= matrix_OI.shape[1] else matrix_OI.T
    values_R: Tensor = torch.linalg.eigvalsh(thin @ thin.T).flip(0).clamp_min(0)
    return values_R


def stack_losses(stack: DenseStack, view: str) -> Losses:
    """Read a layer's models one by one, twice: their mean, and what each loses."""
    mean_OI = torch.zeros(stack.layer.shape, dtype=torch.float64)
    for index in range(len(stack)):
        mean_OI += stack.matrix(index).double() / len(stack)
    deviations = (stack.matrix(index).double() - mean_OI for index in range(len(stack)))
    return weight_losses(deviations, mean_OI if view == "delta" else None, stack.layer)


def _powers(size: int) -> list[int]:
    return [2**power for power in range(32) if 2**power < size]


def is_cut(layer: Layer, rank: int) -> bool:
    """Whether two factors of that rank are smaller than the layer."""
    return rank * sum(layer.shape) < layer.num_values


def alone_rows(zoo: Zoo, losses: Mapping[str, Losses | None], energy: float) -> tuple[AloneRow, ...]:
    """Return the control at powers of two below the largest rank; nothing where a layer was not measured, or models have no files.

    `energy` is Σ‖X‖² of all layers. Factors have the dtype of the files; the mean is at least float32.
    """
    known = {name: layer for name, layer in losses.items() if layer is not None}
    has_files = all(model.weight_files() for model in zoo.models)
    if energy <= 0 or len(known) < len(zoo.layers) or not has_files:
        return ()
    rows = []
    for about in (ZERO, MEAN):
        if any(about not in layer for layer in known.values()):
            continue
        for place in range(max(len(layer[about]) for layer in known.values())):
            rank = 2**place
            lost = sum(layer[about][place] if place < len(layer[about]) else 0.0 for layer in known.values())
            saved, shared = _bytes(zoo, rank, about)
            whole = zoo.num_bytes - saved + shared
            rows.append(AloneRow(rank, lost / energy, whole, (whole - shared) // len(zoo), about))
    return tuple(rows)


def _bytes(zoo: Zoo, rank: int, about: str) -> tuple[int, int]:
    """Bytes that a cut saves over all models, and bytes of what is then stored once."""
    saved, shared, values, kept = 0, 0, 0, 0
    for name, layer in zoo.layers.items():
        itemsize = torch.finfo(getattr(torch, layer.dtype)).bits // 8
        stack = zoo.stack(name)
        if isinstance(stack, UpdateStack):
            values += sum(layer.shape) * sum(stack.ranks)
            kept += sum(layer.shape) * sum(min(rank, each) for each in stack.ranks)
        elif is_cut(layer, rank):
            saved += len(zoo) * itemsize * (layer.num_values - rank * sum(layer.shape))
            shared += layer.num_values * max(itemsize, 4) if about == MEAN else 0
    saved += round(zoo.layer_bytes * (1 - kept / values)) if values else 0
    return saved, shared


@dataclass(frozen=True)
class AgainstAlone:
    """A bundle beside models that are cut alone.

    Attributes:
        num_models, per_model_now: N, and the bytes of the bundle over N.
        residual: share of the energy that the bundle loses, in-sample.
        same_bytes: the largest own rank that costs no more bytes than the bundle does; None where every rank costs more.
        as_good: the cheapest own rank that loses no more than the bundle; None where only the models' own files do.
        better: `bundle` or `alone`: which is smaller at N models and the same loss.
        better_from: the least number of models from which the bundle is smaller than models cut to `as_good`; None if never.
        unseen_residual: share of the energy of models left out of the fit that the bundle loses; None where it was not measured.
        unseen_as_good, unseen_better_from: the same two for that loss.
    """

    num_models: int
    per_model_now: int
    residual: float
    same_bytes: AloneRow | None
    as_good: AloneRow | None
    better: str
    better_from: int | None
    unseen_residual: float | None
    unseen_as_good: AloneRow | None
    unseen_better_from: int | None

    @property
    def sentences(self) -> list[str]:
        """The comparison in words: at the bundle's bytes, at its loss, and at its loss of models left out of the fit."""
        better = "this bundle is smaller" if self.better == "bundle" else "models cut alone are smaller"
        found = [
            self._at_same_bytes(),
            f"To lose no more than this bundle, {self._needed(self.as_good, self.better_from)}. At the "
            f"{counted(self.num_models, 'model')} of this bundle, {better}.",
        ]
        if self.unseen_residual is not None:
            found.append(
                f"Of models left out of the fit, this subspace loses {in_percent(self.unseen_residual)}. To lose no more, "
                f"{self._needed(self.unseen_as_good, self.unseen_better_from)}."
            )
        return found

    def _at_same_bytes(self) -> str:
        beside = (
            f"this bundle takes {in_bytes(self.per_model_now)} a model and loses {in_percent(self.residual)}, in-sample"
        )
        if self.same_bytes is None:
            return f"No model cut alone by its own SVD is as small as in this bundle: {beside}."
        return (
            f"Each model cut alone by its own SVD to {named(self.same_bytes)} takes "
            f"{in_bytes(self.same_bytes.bytes / self.num_models)} and loses {in_percent(self.same_bytes.residual)}: {beside}."
        )

    def _needed(self, row: AloneRow | None, num: int | None) -> str:
        needs = "its whole file" if row is None else f"{named(row)}, {in_bytes(row.bytes / self.num_models)}"
        smaller = "never smaller" if num is None else f"smaller from {counted(num, 'model')} on"
        return f"a model alone needs {needs}: the bundle is {smaller}"


def named(row: AloneRow) -> str:
    """Name a row.

    >>> named(AloneRow(2, 0.1, 100)), named(AloneRow(2, 0.1, 100, 10, MEAN))
    ('rank 2', 'rank 2 about the mean')
    """
    return f"rank {row.rank}" + (" about the mean" if row.about == MEAN else "")


def alone_of(report: Mapping[str, Any]) -> list[AloneRow]:
    """Return the control from the report of a fit."""
    return [AloneRow(**row) for row in report.get("alone") or ()]


def against_alone(report: Mapping[str, Any]) -> AgainstAlone | None:
    """Compare a fitted bundle with the control, from the report of its fit; None where the control was not measured.

    More models are taken to lose as much, in the same basis.
    """
    rows, num_models = alone_of(report), report.get("num_models")
    # A bundle is a stranger's file, of which a manifest checks the rows and the bytes.
    if not rows or not isinstance(num_models, int) or num_models < 1:
        return None
    sizes = report["bytes"]
    unseen = _unseen_residual(report)
    same = [row for row in rows if row.bytes <= sizes["whole_bundle"]]
    as_good, better_from = _as_good(rows, report["residual"], sizes, num_models)
    unseen_as_good, unseen_from = _as_good(rows, unseen, sizes, num_models) if unseen is not None else (None, None)
    return AgainstAlone(
        num_models,
        sizes["whole_bundle"] // num_models,
        report["residual"],
        min(same, key=lambda row: (row.residual, row.bytes), default=None),
        as_good,
        "alone" if better_from is None or better_from > num_models else "bundle",
        better_from,
        unseen,
        unseen_as_good,
        unseen_from,
    )


def _as_good(
    rows: Sequence[AloneRow], residual: float, sizes: Mapping[str, Any], num_models: int
) -> tuple[AloneRow | None, int | None]:
    """The cheapest row that loses no more, and from how many models on a bundle is smaller; the models' files stand for no row."""
    row = min((row for row in rows if row.residual <= residual), key=lambda row: row.bytes, default=None)
    whole, per_model = sizes["whole_zoo"], sizes["whole_zoo"] / num_models
    if row is not None and row.bytes < whole:
        whole, per_model = row.bytes, row.per_model
    else:
        row = None
    fixed = sizes["whole_bundle"] - num_models * sizes["per_model"] - (whole - num_models * per_model)
    saved = per_model - sizes["per_model"]
    return row, max(1, ceil(fixed / saved + 1e-9)) if saved > 0 else None


def _unseen_residual(report: Mapping[str, Any]) -> float | None:
    """Share of the energy that models left out of the fit lose: that of the fitted ones, and the difference in variance kept."""
    layers = [layer for layer in report["layers"].values() if layer["captured"] is not None]
    if not layers or report["energy"] <= 0 or any(layer["heldout"] is None for layer in layers):
        return None
    more = sum((layer["captured"] - layer["heldout"]) * layer["variance"] for layer in layers)
    return float(report["residual"] + more / report["energy"])
