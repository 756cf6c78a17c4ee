"""Fit all layers of a zoo on the workers, one task per layer or span. Bases are written in the layers' order.

A task is a function of plain values and an opened zoo, so that it runs in a thread or in another process. It returns tensors, and
`LayerPass` writes them into the bundle.

Legend: N models, K kept directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenzoo.formats.bundle.basis_files import BasisFiles, BasisWriter
from eigenzoo.formats.bundle.coded_tensors import CodedWriter
from eigenzoo.linalg.block_sums import center_rows, exact_mean
from eigenzoo.passes.resources import Resources
from eigenzoo.passes.workers import Call, Workers
from eigenzoo.records import Progress
from eigenzoo.subspace.bases.basis import MAX_TENSORS, STACKED, BasisTensors, LayerBasis, Projection, form_of, rounded
from eigenzoo.subspace.bases.flat import SpanBasis, orthonormalized, span_basis, write_flat
from eigenzoo.subspace.bases.stacked import write_stacked
from eigenzoo.subspace.bases.tucker import LeadingCores
from eigenzoo.subspace.bundles.storage import layer_record, read_basis
from eigenzoo.subspace.fitting.alone import Losses, is_affordable, stack_losses, weight_losses
from eigenzoo.subspace.fitting.models_fit import FittedLayer, fit_models
from eigenzoo.subspace.fitting.options import FitOptions
from eigenzoo.subspace.fitting.tucker_fit import fit_tucker
from eigenzoo.subspace.fitting.work import Work
from eigenzoo.subspace.moments.collecting import (
    MomentRequest,
    SpanSums,
    collect,
    cut,
    dense_moments,
    loaded,
    loaded_spans,
    sum_loaded,
    sum_span,
)
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.moments.moments_cache import MomentsCache
from eigenzoo.zoo.stack import DenseStack, UpdateStack
from eigenzoo.zoo.zoo import Zoo


@dataclass(frozen=True)
class Fitting:
    """Resources of a fit: workers, the cache of moments, the finished work, and the folder of the basis."""

    workers: Workers
    cache: MomentsCache
    work: Work
    folder: Path


@dataclass(frozen=True)
class FittedLayers:
    """All layers' fits and moments, their basis, and the folder that contains only the basis."""

    fitted: dict[str, FittedLayer]
    moments: dict[str, LayerMoments]
    basis: BasisFiles
    folder: Path


def fit_layers(
    zoo: Zoo,
    options: FitOptions,
    per_layer: Mapping[str, FitOptions],
    progress: Progress,
    fitting: Fitting,
    collected: Mapping[str, LayerMoments] | None = None,
    leading: Mapping[str, LeadingCores] | None = None,
) -> FittedLayers:
    """Fit layer after layer. Moments in `collected`, which include needed sides, are not collected again.

    Neither are cores in `leading`, if they have at least the fitted ranks.
    """
    form = form_of({layer.kind for layer in zoo.layers.values()}, options.axes)
    names, num_tensors, resume = list(zoo.layers), MAX_TENSORS[form], fitting.work.lasts
    if options.coding:
        writer: BasisWriter = CodedWriter(fitting.folder, names, num_tensors, options.coding, resume=resume)
    else:
        writer = BasisWriter(fitting.folder, names, num_tensors, resume=resume)
    try:
        layers = LayerPass(
            zoo,
            options,
            per_layer,
            fitting.workers,
            writer,
            collected or {},
            fitting.cache,
            fitting.work,
            leading or {},
        )
        fitted, moments = layers.run(progress)
        basis = writer.finish()
    finally:
        writer.close()
    if options.coding or options.torch_dtype.itemsize < 4:
        fitted |= _as_stored(zoo, fitted, moments, options, basis, fitting.workers, progress)
    elif options.coefficients_dtype != "float32":
        fitted = {
            name: _rounded(layer, moments[name], zoo.layers[name].kind, options) for name, layer in fitted.items()
        }
    return FittedLayers(fitted, moments, basis, fitting.folder)


def _as_stored(
    zoo: Zoo,
    fitted: Mapping[str, FittedLayer],
    moments: Mapping[str, LayerMoments],
    options: FitOptions,
    files: BasisFiles,
    workers: Workers,
    progress: Progress,
) -> dict[str, FittedLayer]:
    """Project all models again onto rounded bases, so that the stated errors are those of the stored bases."""
    bases = {}
    for name, layer in fitted.items():
        # Stacked factors keep the dtype of their files unless they are quantised, so that nothing is rounded.
        if layer.form != STACKED or options.coding:
            record = layer_record(zoo.layers[name], layer.form, layer.ranks, layer.has_mean)
            bases[name] = read_basis(record, options.center, files, options.stored_as, StoredLayer(files, name))
    task = partial(stored_task, zoo, options.precision_of_products)
    stage, layers = "projecting on stored bases", bases.items()
    projected = workers.each(stage, task, layers, progress, lambda layer: files.num_bytes(layer[0]), "layer")
    found = {
        name: _rounded(layer, moments[name], zoo.layers[name].kind, options)
        for name, layer in fitted.items()
        if name not in bases
    }
    for (name, _), projections in projected:
        outside_N = torch.tensor([projection.outside for projection in projections], dtype=torch.float64)
        coefficients = torch.stack([projection.stored for projection in projections])
        found[name] = _stated_anew(fitted[name], moments[name], zoo.layers[name].kind, coefficients, outside_N)
    return found


def _rounded(fitted: FittedLayer, moments: LayerMoments, kind: str, options: FitOptions) -> FittedLayer:
    """A fitted layer with its coefficients as they are stored: in an orthonormal basis their rounding adds to what is lost."""
    stored = rounded(fitted.coefficients, options.coefficients_dtype, fitted.name)
    if stored is fitted.coefficients:
        return fitted
    more_N = (stored.double() - fitted.coefficients.double()).flatten(1).square().sum(1)
    return _stated_anew(fitted, moments, kind, stored, fitted.outside_N + more_N)


def _stated_anew(
    fitted: FittedLayer, moments: LayerMoments, kind: str, coefficients: Tensor, outside_N: Tensor
) -> FittedLayer:
    """Return a fitted layer with these coefficients and residuals."""
    energy, lost_more = float(moments.energies_N.sum()), float(outside_N.sum() - fitted.outside_N.sum())
    bound = fitted.record.bound
    if bound is not None:
        # A better basis could also keep the energy that rounding has lost.
        total = energy if kind == "update" else moments.variance
        bound = max(bound + lost_more / total, 0.0)
    return replace(
        fitted,
        coefficients=coefficients,
        outside_N=outside_N,
        record=replace(
            fitted.record,
            residual=float(outside_N.sum()) / energy if energy > 0 else 0.0,
            captured=None if fitted.record.captured is None else _captured(fitted.record.captured, moments, lost_more),
            bound=bound,
        ),
    )


def _captured(exact: float, moments: LayerMoments, lost_more: float) -> float:
    """Return the share of the variance that is stored, when rounding has lost `lost_more` energy: at most the exact share.

    The whole loss would not do: for updates it also contains what the sides lose of the mean.
    """
    return min(exact, max(exact - lost_more / moments.variance, 0.0))


@dataclass(frozen=True)
class LayerPass:
    """One pass over the layers of a zoo that fits each and writes its basis.

    Attributes:
        zoo, options: of the fit; `per_layer` has the options of single layers.
        workers: run the tasks.
        writer: writes the bases.
        collected: moments that need not be collected again, including those of the sides if an axis needs them.
        cache: moments of earlier passes.
        work: layers that an interrupted fit has already written.
        leading: cores that were collected for the choice of ranks.
    """

    zoo: Zoo
    options: FitOptions
    per_layer: Mapping[str, FitOptions]
    workers: Workers
    writer: BasisWriter
    collected: Mapping[str, LayerMoments]
    cache: MomentsCache
    work: Work
    leading: Mapping[str, LeadingCores]

    def run(self, progress: Progress) -> tuple[dict[str, FittedLayer], dict[str, LayerMoments]]:
        """Fit all layers. Only the Grams of their moments are kept."""
        fitted: dict[str, FittedLayer] = {}
        moments: dict[str, LayerMoments] = {}
        for (name, collected), results in self.workers.in_order(self._jobs(), self._weight):
            if name in self.work:
                fitted[name], moments[name] = self.work.restore(name, self.writer)
            else:
                result = self._result(name, collected, results)
                layer = replace(result.fitted, coefficients=self._write(name, result).float())
                fitted[name], moments[name] = layer, result.moments
                self.work.keep(layer, result.moments, self.writer)
            progress("fitting layers", len(fitted), len(self.zoo.layers))
        return fitted, moments

    def _options(self, name: str) -> FitOptions:
        return self.per_layer.get(name, self.options)

    def _collected(self, name: str) -> LayerMoments | None:
        if name in self.collected:
            return self.collected[name]
        if self.options.axes != ("models",):
            return None
        return self.cache.get(name, self.options.center, self._options(name).precision_of_products)

    def _weight(self, key: tuple[str, LayerMoments | None]) -> int:
        """Return the largest size of a layer's basis in memory. Stacked factors do not count: they are copied from files."""
        name, _ = key
        layer, options = self.zoo.layers[name], self._options(name)

        def rank_of(axis: str, size: int) -> int:
            rule = options.rules.get(axis)
            return min(rule, size) if isinstance(rule, int) else size

        sizes = dict(zip(("outputs", "inputs"), layer.shape, strict=True))
        num_sides = sum(size * rank_of(axis, size) for axis, size in sizes.items() if axis in options.axes)
        if layer.kind == "update" and not num_sides:
            return 0
        num_shared = rank_of("models", len(self.zoo)) if "models" in options.axes else 0
        core_size = prod(rank_of(axis, size) for axis, size in sizes.items())
        # The mean is float32 even if bases are in half precision.
        return max(4, options.torch_dtype.itemsize) * (num_sides + (num_shared + 1) * core_size)

    def _jobs(self) -> Iterator[tuple[tuple[str, LayerMoments | None], list[Call]]]:
        """Yield the tasks of each layer: one, or one per span of a large layer, or none for finished layers and known moments.

        Cached moments are read here and passed on, because another process may remove them from the cache meanwhile.
        """
        resources = self.workers.resources
        for name in self.zoo.layers:
            options = self._options(name)
            stack = self.zoo.stack(name, precision=options.precision_of_products)
            if name in self.work:
                yield (name, None), []
                continue
            collected = self._collected(name)
            if is_one_task(stack, options, resources):
                leading = self.leading.get(name)
                yield (name, collected), [partial(fit_task, self.zoo, name, options, resources, collected, leading)]
            else:
                assert isinstance(stack, DenseStack)
                request = MomentRequest(options.axes, options.center)
                spans = stack.spans() if collected is None else []
                task = partial(span_task, self.zoo, name)
                precision = options.precision_of_products
                yield (name, collected), [partial(task, span, request, precision, resources) for span in spans]

    def _result(self, name: str, collected: LayerMoments | None, results: list[object]) -> LayerResult:
        layer_result = results[0] if results and isinstance(results[0], LayerResult) else None
        result = layer_result or self._from_spans(name, collected, results)
        if self.options.axes == ("models",) and name not in self.collected:
            self.cache.put(name, self.options.center, self._options(name).precision_of_products, result.moments)
        return result

    def _from_spans(self, name: str, collected: LayerMoments | None, sums: list[object]) -> LayerResult:
        """Combine the sums of a large layer's spans, read the spans a second time, and write the basis directly into the bundle."""
        options = self._options(name)
        stack = self.zoo.stack(name, precision=options.precision_of_products)
        assert isinstance(stack, DenseStack)
        moments = collected or dense_moments(stack, sums, MomentRequest(options.axes, options.center))  # type: ignore[arg-type]
        models_fit = fit_models(stack.layer, moments, options)
        tasks = (
            (
                (name, span),
                [
                    partial(
                        basis_task,
                        self.zoo,
                        name,
                        span,
                        models_fit.weights_NK,
                        moments.removed,
                        options,
                        self.workers.resources,
                    )
                ],
            )
            for start, stop in stack.spans()
            for span in cut(stack, start, stop, self.workers.resources)
        )
        width = options.torch_dtype.itemsize * (models_fit.weights_NK.shape[1] + 1)
        spans = (results[0] for _, results in self.workers.in_order(tasks, lambda key: width * (key[1][1] - key[1][0])))
        coefficients_NK = write_flat(
            stack.layer,
            moments.removed,
            spans,
            models_fit.fitted.coefficients,
            options.torch_dtype,
            self.writer,
            orthonormal=not options.coding,
        )
        return LayerResult(replace(models_fit.fitted, coefficients=coefficients_NK), moments)

    def _write(self, name: str, result: LayerResult) -> Tensor:
        """Write the tensors that are not written yet, and return the coefficients that belong to them."""
        coefficients = result.fitted.coefficients
        for part, tensor in result.tensors.items():
            self.writer.append(part, tensor)
        if result.spans:
            layer, removed = self.zoo.layers[name], result.moments.removed
            dtype, exact = self._options(name).torch_dtype, not self.options.coding
            coefficients = write_flat(layer, removed, result.spans, coefficients, dtype, self.writer, orthonormal=exact)
        if result.weights_NK is not None:
            stack = self.zoo.stack(name, precision=self._options(name).precision_of_products)
            assert isinstance(stack, UpdateStack)
            write_stacked(stack, result.moments, result.weights_NK, self.writer, self.options.coding)
        return coefficients


@dataclass(frozen=True)
class LayerResult:
    """A fitted layer, its moments without the sides, and the tensors for the bundle.

    Attributes:
        tensors: the tensors of form `tucker`.
        spans: directions and mean of each span of form `flat`.
        weights_NK: the directions' weights of form `stacked`. The writer copies the other tensors, the zoo's own factors.
    """

    fitted: FittedLayer
    moments: LayerMoments
    tensors: dict[str, Tensor] = field(default_factory=dict)
    spans: tuple[SpanBasis, ...] = ()
    weights_NK: Tensor | None = None


def is_one_task(stack: object, options: FitOptions, resources: Resources) -> bool:
    """Tell whether a layer is fitted in one task. Only a layer of form `flat` that does not fit into memory is split into spans."""
    return not isinstance(stack, DenseStack) or options.axes != ("models",) or stack.num_bytes <= resources.layer_bytes


def fit_task(
    zoo: Zoo,
    name: str,
    options: FitOptions,
    resources: Resources,
    collected: LayerMoments | None = None,
    leading: LeadingCores | None = None,
) -> LayerResult:
    """Fit one whole layer: moments, ranks, basis and coefficients. Axis `models` alone needs one read of the weights.

    If the moments of that axis are given, only the basis is computed.
    """
    stack = zoo.stack(name, precision=options.precision_of_products)
    alone = isinstance(stack, DenseStack) and is_affordable(zoo)
    if isinstance(stack, DenseStack) and options.axes == ("models",):
        return _fit_dense(stack, options, resources, collected, zoo.view if alone else None)
    moments = collected or collect(stack, options.axes, options.center, resources, sketch=options.sketch)
    if options.axes == ("models",):
        models_fit = fit_models(stack.layer, moments, options)
        return LayerResult(models_fit.fitted, _without_sides(moments), weights_NK=models_fit.weights_NK)
    tensors = BasisTensors()
    fitted = fit_tucker(stack, moments, options, resources, tensors, leading)
    if alone and isinstance(stack, DenseStack):
        fitted = replace(fitted, alone=stack_losses(stack, zoo.view))
    return LayerResult(fitted, _without_sides(moments), tensors.tensors)


def _fit_dense(
    stack: DenseStack,
    options: FitOptions,
    resources: Resources,
    collected: LayerMoments | None,
    alone: str | None = None,
) -> LayerResult:
    """Read a layer once, and compute the moments and the basis from the same rows in memory.

    With `alone`, the zoo's view, the rows also give what each model loses if it is cut alone.
    """
    request = MomentRequest(options.axes, options.center)
    inputs = stack.layer.shape[1]
    with loaded_spans(stack, resources) as spans:
        if collected is None:
            rows: Iterable[tuple[int, int, Tensor]] = list(spans)
            sums = [sum_loaded(stack, start, stop, rows_ED, request) for start, stop, rows_ED in rows]
            moments = dense_moments(stack, sums, request, resources.device)
        else:
            moments, rows = collected, _centered(spans, stack)
        losses = None
        if alone is not None:
            rows = list(rows)
            losses = _losses_of_rows(stack, [rows_ED for _, _, rows_ED in rows], alone)
        models_fit = fit_models(stack.layer, moments, options)
        dtype = options.torch_dtype
        bases = [
            span_basis(rows_ED, start, inputs, models_fit.weights_NK, moments.removed, dtype)
            for start, _, rows_ED in rows
        ]
    orthonormal, coefficients_NK = orthonormalized(bases, models_fit.fitted.coefficients, dtype)
    fitted = replace(models_fit.fitted, coefficients=coefficients_NK, alone=losses)
    return LayerResult(fitted, _without_sides(moments), spans=tuple(orthonormal))


def _losses_of_rows(stack: DenseStack, spans: Sequence[Tensor], view: str) -> Losses:
    """Return the losses of models that are cut alone, from the centred rows of all spans of a layer."""
    shape, num_models = stack.layer.shape, len(stack)
    deviations = (torch.cat([rows_ED[index] for rows_ED in spans]).cpu().view(shape) for index in range(num_models))
    mean_OI = None
    if view == "delta":
        mean_OI = torch.cat([exact_mean(rows_ED, num_models) for rows_ED in spans]).cpu().view(shape)
    return weight_losses(deviations, mean_OI, stack.layer)


def _centered(spans: Iterable[tuple[int, int, Tensor]], stack: DenseStack) -> Iterator[tuple[int, int, Tensor]]:
    """Centre spans one by one."""
    for start, stop, rows_ED in spans:
        center_rows(rows_ED, len(stack), stack.layer.shape[1])
        yield start, stop, rows_ED


def span_task(
    zoo: Zoo, name: str, span: tuple[int, int], request: MomentRequest, precision: str, resources: Resources
) -> SpanSums:
    """Read and sum one span of a layer of full weights."""
    stack = zoo.stack(name, precision=precision)
    assert isinstance(stack, DenseStack)
    return sum_span(stack, *span, request, resources)


def basis_task(
    zoo: Zoo,
    name: str,
    span: tuple[int, int],
    weights_NK: Tensor,
    removed: Tensor | None,
    options: FitOptions,
    resources: Resources,
) -> SpanBasis:
    """Read one span, or a block of it, a second time, and return the directions over it."""
    stack = zoo.stack(name, precision=options.precision_of_products)
    assert isinstance(stack, DenseStack)
    with loaded(stack, *span, resources) as rows_ED:
        center_rows(rows_ED, len(stack), stack.layer.shape[1])
        return span_basis(rows_ED, span[0], stack.layer.shape[1], weights_NK, removed, options.torch_dtype)


class StoredLayer:
    """Reads one layer's tensors from their files. Its pickle contains the values, because another process may not see the files."""

    def __init__(self, files: BasisFiles, layer: str) -> None:
        self._files, self._layer = files, layer

    def read(self, name: str) -> Tensor:
        """Read a tensor whole."""
        return self._files.read(name)

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read values start:stop of a flattened tensor."""
        return self._files.read_flat(name, start, stop, out)

    def __reduce__(self) -> tuple[Any, ...]:
        names = [f"{self._layer}/{part}" for part in self._files.dtypes(self._layer)]
        return TensorsInMemory, ({name: self._files.read(name) for name in names},)


@dataclass(frozen=True)
class TensorsInMemory:
    """A basis in memory."""

    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self.tensors[name]

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return values start:stop of a flattened tensor."""
        values = self.tensors[name].view(-1)[start:stop]
        return values if out is None else out.copy_(values)


def stored_task(zoo: Zoo, precision: str, layer: tuple[str, LayerBasis]) -> list[Projection]:
    """Project all models' layer `name` onto its stored basis."""
    name, basis = layer
    return basis.project_all(zoo.stack(name, precision=precision))


def _without_sides(moments: LayerMoments) -> LayerMoments:
    return replace(moments, outputs=None, inputs=None)
