"""Get the moments for evidence from a zoo's weights, read once, or from a bundle without reading anything else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from eigenzoo.errors import UsageError
from eigenzoo.evidence.alpha_score import OwnSpectra, own_spectra
from eigenzoo.formats.remote.hub_bundle import names_a_bundle
from eigenzoo.linalg.block_sums import DEFAULT
from eigenzoo.linalg.nulls import axis_null
from eigenzoo.linalg.side import SideMoment
from eigenzoo.passes.resources import Resources, check_memory, check_name
from eigenzoo.passes.workers import Workers, check_workers, opened_workers
from eigenzoo.records import Layer, Progress
from eigenzoo.subspace.bundles.loading import load
from eigenzoo.subspace.fitting.heldout_sides import SideShares, heldout_sides, hold_out_sides
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.moments.moments_cache import MomentsCache, opened_cache
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.runs import run_paths, training_runs
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.stack import DenseStack, UpdateStack
from eigenzoo.zoo.zoo import Zoo, open_zoo

LARGE_SIDE = 2048
"""Above this size one draw of the null is enough, because its spread is small, and a draw costs size³."""


@dataclass(frozen=True)
class AxisSpectrum:
    """Spectrum of a layer's outputs or inputs, its null of unrelated noise, and its center.

    Attributes:
        explained_variance_ratio: eigenvalues over their total.
        null: the same for independent noise with the models' energies.
        center: the removed center; `none` for LoRA updates, whose sides contain the mean.
        heldout: shares of the variance about the mean that the leading directions keep, of models left out of the fit; None
            where it was not measured.
    """

    explained_variance_ratio: tuple[float, ...]
    null: tuple[float, ...]
    center: str
    heldout: SideShares | None = None


class MomentSource(Protocol):
    """Models, layers and their moments."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the models."""

    @property
    def view(self) -> str:
        """How a layer becomes a matrix."""

    @property
    def center(self) -> str:
        """The center that is removed before the spectrum."""

    @property
    def layers(self) -> Mapping[str, Layer]:
        """Every layer by name."""

    @property
    def zoo(self) -> Zoo | None:
        """The models, if they are available."""

    @property
    def warnings(self) -> Sequence[str]:
        """Warnings that apply to all figures."""

    @property
    def runs(self) -> tuple[tuple[str, ...], ...]:
        """Groups of models that are checkpoints of one training run."""

    def moments(self, layer: str) -> LayerMoments:
        """Return a layer's moments."""

    def axes(self, layer: str) -> Mapping[str, AxisSpectrum]:
        """Return the spectra of the layer's requested sides."""

    def sides(self, layer: str) -> Mapping[str, SideShares]:
        """Return the shares of held-out models that the sides keep, by axis and for both together."""

    def spectra(self, layer: str) -> OwnSpectra | None:
        """Return every model's own singular values, if they are available."""


class ZooMoments:
    """The moments of a zoo by one pass over the weights. Moments of sides are reduced to spectra at once."""

    def __init__(
        self,
        zoo: Zoo,
        axes: Sequence[str],
        center: str,
        seed: int,
        progress: Progress,
        workers: Workers,
        cache: MomentsCache,
        suitability: bool = False,
    ) -> None:
        self.names, self.view, self.layers, self.warnings = zoo.names, zoo.view, zoo.layers, zoo.warnings
        self.center, self.zoo = center, zoo
        self.runs = training_runs(run_paths(zoo.models, zoo.names))
        self._moments: dict[str, LayerMoments] = {}
        self._axes: dict[str, dict[str, AxisSpectrum]] = {}
        self._sides: dict[str, dict[str, SideShares]] = {}
        self._spectra: dict[str, OwnSpectra] = {}
        task = partial(_layer_moments, zoo, tuple(axes), center, seed, workers.resources)
        known = {} if axes else {name: kept for name in zoo.layers if (kept := cache.get(name, center, DEFAULT))}
        # The moments of updates contain their own spectra.
        wanted = {name for name, layer in zoo.layers.items() if suitability and layer.kind != "update"}
        spectra = partial(_own_spectra, zoo, workers.resources)
        for name, found in workers.in_order(
            (
                name,
                [
                    *([] if name in known else [partial(task, name)]),
                    *([partial(spectra, name)] if name in wanted else []),
                ],
            )
            for name in zoo.layers
        ):
            self._moments[name], self._axes[name], self._sides[name] = (
                (known[name], {}, {}) if name in known else found[0]
            )
            if name in wanted:
                self._spectra[name] = found[-1]
            if not axes:
                cache.put(name, center, DEFAULT, self._moments[name])
            progress("collecting moments", len(self._moments), len(zoo.layers))

    def moments(self, layer: str) -> LayerMoments:
        """Return a layer's moments."""
        return self._moments[layer]

    def axes(self, layer: str) -> Mapping[str, AxisSpectrum]:
        """Return the spectra of the requested sides."""
        return self._axes[layer]

    def sides(self, layer: str) -> Mapping[str, SideShares]:
        """Return the shares of held-out models that the sides keep."""
        return self._sides[layer]

    def spectra(self, layer: str) -> OwnSpectra | None:
        """Return every model's own singular values: always for updates, else on request."""
        return self._spectra.get(layer) or _of_updates(self._moments[layer])


def _own_spectra(zoo: Zoo, resources: Resources, name: str) -> OwnSpectra:
    stack = zoo.stack(name, precision="high")
    assert isinstance(stack, DenseStack)
    return own_spectra(stack, resources.device)


def _of_updates(moments: LayerMoments) -> OwnSpectra | None:
    """Return the updates' singular values in moments."""
    return None if moments.singular_NR is None else OwnSpectra(moments.singular_NR, moments.round_off)


def _layer_moments(
    zoo: Zoo, axes: tuple[str, ...], center: str, seed: int, resources: Resources, name: str
) -> tuple[LayerMoments, dict[str, AxisSpectrum], dict[str, SideShares]]:
    """Collect one layer's moments, take the spectra of its sides before they are let go, and hold models out of them."""
    stack = zoo.stack(name)
    whole = collect(stack, axes, center, resources)
    about = "none" if isinstance(stack, UpdateStack) else center
    columns = sum(stack.ranks) / len(stack) if isinstance(stack, UpdateStack) else None
    shares = heldout_sides(stack, hold_out_sides(stack, whole, axes, resources, seed)) if center == "models" else {}
    spectra = {
        axis: replace(_axis_spectrum(side, whole, axis, about, columns, seed), heldout=shares.get(axis))
        for axis, side in (("outputs", whole.outputs), ("inputs", whole.inputs))
        if side is not None
    }
    return replace(whole, outputs=None, inputs=None), spectra, shares


class BundleMoments:
    """The stored moments of a bundle. No weight file is read."""

    def __init__(self, space: Subspace) -> None:
        self.names, self.view, self.center = space.names, space.view, space.manifest.center
        self.layers = {name: basis.layer for name, basis in space.layers.items()}
        self.warnings = (*space.report.get("warnings", ()), *_inexact(space))
        self._space, self.zoo = space, None
        self.runs = training_runs((model.name, model.source.path, model.not_carried) for model in space.manifest.models)

    def moments(self, layer: str) -> LayerMoments:
        """Return a layer's moments."""
        return self._space.moments(layer)

    def axes(self, layer: str) -> Mapping[str, AxisSpectrum]:
        """Return {}: a bundle has the models' Gram only."""
        return {}

    def sides(self, layer: str) -> Mapping[str, SideShares]:
        """Return nothing: for held-out shares of sides, models are read."""
        return {}

    def spectra(self, layer: str) -> OwnSpectra | None:
        """Return every update's own singular values, if the bundle's moments have them."""
        return _of_updates(self._space.moments(layer))


def _inexact(space: Subspace) -> list[str]:
    """Warn if models were added without the old ones' files, because their relations outside the old subspace are unknown."""
    if space.report.get("growth", {}).get("exact", True):
        return []
    return [
        "models were added from the bundle alone: what they have in common with the others outside the kept subspace counts as "
        "nothing here, so that held-out shares are too small; fit the zoo again, or add with the old files at hand"
    ]


def open_source(
    source: Zoo | Subspace | Source,
    axes: Sequence[str],
    center: str,
    seed: int,
    progress: Progress,
    *,
    view: str | None = None,
    base: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_memory: int | None = None,
    device: str = "cpu",
    workers: Workers | None = None,
    cache: bool = True,
    suitability: bool = False,
) -> MomentSource:
    """Open the source of evidence: a zoo (opened, or anything that `open_zoo` accepts), a subspace, or the folder of a bundle."""
    if workers is None:
        # Evidence of a bundle runs no task, so a missing device does not matter.
        check_name(device)
        check_memory(max_memory)
    if isinstance(source, str | os.PathLike) and names_a_bundle(source):
        source = load(source)
    chosen = view is not None or base is not None or bool(include) or bool(exclude)
    if isinstance(source, Subspace):
        if suitability and source.view != "update":
            raise UsageError(
                "suitability needs every model's own spectra, which this bundle does not have",
                rule="a bundle stores them for LoRA updates only",
                next_step="name the zoo instead",
            )
        if axes or chosen or center != "models":
            raise UsageError(
                "axes, center, view, base, include and exclude do not apply to a bundle",
                rule="a bundle stores the models' Gram of its own layers, about their mean",
                next_step="name the zoo instead",
            )
        return BundleMoments(source)
    check_workers(workers, max_memory, device)
    if isinstance(source, Zoo):
        if chosen:
            raise UsageError(
                "view, base, include and exclude do not apply to an opened zoo", next_step="pass them to open_zoo"
            )
        zoo = source
    else:
        zoo = open_zoo(source, view=view, base=base, include=include, exclude=exclude, progress=progress)
    with (
        opened_workers(workers, max_memory, device) as running,
        opened_cache(zoo, cache, running.resources.device) as kept,
    ):
        return ZooMoments(zoo, axes, center, seed, progress, running, kept, suitability)


def _axis_spectrum(
    side: SideMoment, moments: LayerMoments, axis: str, center: str, columns: float | None, seed: int
) -> AxisSpectrum:
    total = side.trace
    values = side.eigenvectors().values_K / total if total > 0 else side.eigenvectors().values_K
    energies_N = moments.energies_N if center == "none" else moments.centered_NN.diagonal()
    width = columns if columns is not None else moments.num_values / side.size
    null = axis_null(
        side.size,
        energies_N,
        width,
        centered=center == "models",
        draws=1 if side.size > LARGE_SIDE else None,
        seed=seed,
    )
    padding = (0.0,) * (side.size - values.numel())
    return AxisSpectrum((*values.tolist(), *padding), tuple(null.mean(0).tolist()), center)
