"""Fit all layers of a zoo: one task a layer, or a span of it, on the workers; bases go into the bundle in the layers' order.

A task is a function of plain values and an opened zoo, so that it runs in a thread here or in a process elsewhere alike. What goes
into the bundle comes back as tensors; `LayerPass` writes them.

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
from eigenzoo.linalg.block_sums import center_rows
from eigenzoo.passes.resources import Resources
from eigenzoo.passes.workers import Call, Workers
from eigenzoo.records import Progress
from eigenzoo.subspace.bases.basis import PARTS, STACKED, LayerBasis, Parts, Projection, form_of
from eigenzoo.subspace.bases.flat import SpanBasis, orthonormalized, span_basis, write_flat
from eigenzoo.subspace.bases.stacked import write_stacked
from eigenzoo.subspace.bundles.storage import layer_record, read_basis
from eigenzoo.subspace.fitting.models_fit import FittedLayer, fit_models
from eigenzoo.subspace.fitting.options import FitOptions
from eigenzoo.subspace.fitting.tucker_fit import fit_tucker
from eigenzoo.subspace.fitting.work import Work
from eigenzoo.subspace.moments.collecting import (
    Asked,
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
    """What a fit works with: workers, kept moments, what is finished already, and the folder that the basis is written into."""

    workers: Workers
    cache: MomentsCache
    work: Work
    folder: Path


@dataclass(frozen=True)
class FittedLayers:
    """All layers' fits and moments, their basis, and the folder that holds it and nothing else."""

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
    known: Mapping[str, LayerMoments] | None = None,
) -> FittedLayers:
    """Fit layer after layer. Moments that are `known` are not collected: with those of the sides where an axis needs them."""
    form = form_of({layer.kind for layer in zoo.layers.values()}, options.axes)
    writer = BasisWriter(fitting.folder, list(zoo.layers), PARTS[form], resume=fitting.work.lasts)
    try:
        layers = LayerPass(zoo, options, per_layer, fitting.workers, writer, known or {}, fitting.cache, fitting.work)
        fitted, moments = layers.run(progress)
        basis = writer.finish()
    finally:
        writer.close()
    if options.torch_dtype.itemsize < 4:
        fitted |= _as_stored(zoo, fitted, moments, options, basis, fitting.workers, progress)
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
    """Project all models anew onto bases that half precision has moved: what is stated is what is stored."""
    bases = {}
    for name, layer in fitted.items():
        # Stacked factors keep the dtype of their files, which moves nothing.
        if layer.form != STACKED:
            record = layer_record(zoo.layers[name], layer.form, layer.ranks, layer.has_mean)
            bases[name] = replace(read_basis(record, options.center, files), tensors=StoredLayer(files, name))
    task = partial(stored_task, zoo, options.precision_of_products)
    stage, layers = "projecting on stored bases", bases.items()
    projected = workers.each(stage, task, layers, progress, lambda layer: files.num_bytes(layer[0]), "layer")
    return {
        name: _stated_anew(fitted[name], moments[name], zoo.layers[name].kind, projections)
        for (name, _), projections in projected
    }


def _stated_anew(
    fitted: FittedLayer, moments: LayerMoments, kind: str, projections: Sequence[Projection]
) -> FittedLayer:
    """A fitted layer with the coefficients and the losses of these projections."""
    outside_N = torch.tensor([projection.outside for projection in projections], dtype=torch.float64)
    energy = float(moments.energies_N.sum())
    bound = fitted.record.bound
    if bound is not None:
        # What rounding has lost is what a better basis could hold too.
        total = energy if kind == "update" else moments.variance
        bound = max(bound + float(outside_N.sum() - fitted.outside_N.sum()) / total, 0.0)
    return replace(
        fitted,
        coefficients=torch.stack([projection.coefficients for projection in projections]),
        outside_N=outside_N,
        record=replace(
            fitted.record,
            residual=float(outside_N.sum()) / energy if energy > 0 else 0.0,
            captured=None if fitted.record.captured is None else _captured(fitted.record.captured, moments, outside_N),
            bound=bound,
        ),
    )


def _captured(exact: float, moments: LayerMoments, outside_N: Tensor) -> float:
    """Share of the variance that a rounded basis holds: never more than the exact one, and none where the mean is no worse.

    The mean of updates lies in a basis of sides too: what is lost of it is no loss of variance.
    """
    return min(exact, max(1 - float(outside_N.sum()) / moments.variance, 0.0))


@dataclass(frozen=True)
class LayerPass:
    """One pass over the layers of a zoo that fits each and writes its basis.

    Attributes:
        zoo, options: what is fitted, and how; `per_layer` where a layer has options of its own.
        workers: where tasks run.
        writer: where bases go.
        known: moments that need not be collected, those of the sides with them where an axis needs these.
        cache: moments that an earlier pass has kept.
        work: layers that an interrupted fit has written already.
    """

    zoo: Zoo
    options: FitOptions
    per_layer: Mapping[str, FitOptions]
    workers: Workers
    writer: BasisWriter
    known: Mapping[str, LayerMoments]
    cache: MomentsCache
    work: Work

    def run(self, progress: Progress) -> tuple[dict[str, FittedLayer], dict[str, LayerMoments]]:
        """Fit all layers; only the Gram of a layer's moments outlives it."""
        fitted: dict[str, FittedLayer] = {}
        moments: dict[str, LayerMoments] = {}
        for (name, known), results in self.workers.in_order(self._jobs(), self._weight):
            if name in self.work:
                fitted[name], moments[name] = self.work.restore(name, self.writer)
            else:
                result = self._result(name, known, results)
                layer = replace(result.fitted, coefficients=self._write(name, result).float())
                fitted[name], moments[name] = layer, result.moments
                self.work.keep(layer, result.moments, self.writer)
            progress("fitting layers", len(fitted), len(self.zoo.layers))
        return fitted, moments

    def _options(self, name: str) -> FitOptions:
        return self.per_layer.get(name, self.options)

    def _known(self, name: str) -> LayerMoments | None:
        if name in self.known:
            return self.known[name]
        if self.options.axes != ("models",):
            return None
        return self.cache.get(name, self.options.center, self._options(name).precision_of_products)

    def _weight(self, key: tuple[str, LayerMoments | None]) -> int:
        """Bytes that a layer's basis may have before it is written; stacked factors are copied from the zoo's files."""
        name, _ = key
        layer, options = self.zoo.layers[name], self._options(name)

        def kept(axis: str, size: int) -> int:
            rule = options.rules.get(axis)
            return min(rule, size) if isinstance(rule, int) else size

        sizes = dict(zip(("outputs", "inputs"), layer.shape, strict=True))
        num_sides = sum(size * kept(axis, size) for axis, size in sizes.items() if axis in options.axes)
        if layer.kind == "update" and not num_sides:
            return 0
        num_shared = kept("models", len(self.zoo)) if "models" in options.axes else 0
        core_size = prod(kept(axis, size) for axis, size in sizes.items())
        # The mean stays float32 beside bases in half precision.
        return max(4, options.torch_dtype.itemsize) * (num_sides + (num_shared + 1) * core_size)

    def _jobs(self) -> Iterator[tuple[tuple[str, LayerMoments | None], list[Call]]]:
        """One task per layer, or per span of a layer that is too large to be kept; none for what is done or known already.

        What is known goes with the layer: another process may remove it from the cache meanwhile.
        """
        resources = self.workers.resources
        for name in self.zoo.layers:
            options = self._options(name)
            stack = self.zoo.stack(name, precision=options.precision_of_products)
            if name in self.work:
                yield (name, None), []
                continue
            known = self._known(name)
            if is_whole(stack, options, resources):
                yield (name, known), [partial(fit_task, self.zoo, name, options, resources, known)]
            else:
                assert isinstance(stack, DenseStack)
                asked = Asked(options.axes, options.center)
                spans = stack.spans() if known is None else []
                task = partial(span_task, self.zoo, name)
                precision = options.precision_of_products
                yield (name, known), [partial(task, span, asked, precision, resources) for span in spans]

    def _result(self, name: str, known: LayerMoments | None, results: list[object]) -> LayerResult:
        whole = results[0] if results and isinstance(results[0], LayerResult) else None
        result = whole or self._from_spans(name, known, results)
        if self.options.axes == ("models",) and name not in self.known:
            self.cache.put(name, self.options.center, self._options(name).precision_of_products, result.moments)
        return result

    def _from_spans(self, name: str, known: LayerMoments | None, sums: list[object]) -> LayerResult:
        """Put a large layer's spans together, and read them once more for the basis, which goes straight into the bundle."""
        options = self._options(name)
        stack = self.zoo.stack(name, precision=options.precision_of_products)
        assert isinstance(stack, DenseStack)
        moments = known or dense_moments(stack, sums, Asked(options.axes, options.center))  # type: ignore[arg-type]
        found = fit_models(stack.layer, moments, options)
        tasks = (
            (
                (name, span),
                [
                    partial(
                        basis_task,
                        self.zoo,
                        name,
                        span,
                        found.weights_NK,
                        moments.removed,
                        options,
                        self.workers.resources,
                    )
                ],
            )
            for start, stop in stack.spans()
            for span in cut(stack, start, stop, self.workers.resources)
        )
        width = options.torch_dtype.itemsize * (found.weights_NK.shape[1] + 1)
        spans = (results[0] for _, results in self.workers.in_order(tasks, lambda key: width * (key[1][1] - key[1][0])))
        coefficients_NK = write_flat(
            stack.layer, moments.removed, spans, found.fitted.coefficients, options.torch_dtype, self.writer
        )
        return LayerResult(replace(found.fitted, coefficients=coefficients_NK), moments)

    def _write(self, name: str, result: LayerResult) -> Tensor:
        """Write what is not written yet, and return the coefficients that belong to it."""
        kept = result.fitted.coefficients
        for part, tensor in result.parts.items():
            self.writer.append(part, tensor)
        if result.spans:
            layer, removed = self.zoo.layers[name], result.moments.removed
            kept = write_flat(layer, removed, result.spans, kept, self._options(name).torch_dtype, self.writer)
        if result.weights_NK is not None:
            stack = self.zoo.stack(name, precision=self._options(name).precision_of_products)
            assert isinstance(stack, UpdateStack)
            write_stacked(stack, result.moments, result.weights_NK, self.writer)
        return kept


@dataclass(frozen=True)
class LayerResult:
    """A fitted layer, its moments without the sides, and what goes into the bundle.

    Attributes:
        parts: of form `tucker`, its tensors.
        spans: of form `flat`, its directions and mean, span by span.
        weights_NK: of form `stacked`, the directions' weights; its tensors are the zoo's own factors, which whoever writes copies.
    """

    fitted: FittedLayer
    moments: LayerMoments
    parts: dict[str, Tensor] = field(default_factory=dict)
    spans: tuple[SpanBasis, ...] = ()
    weights_NK: Tensor | None = None


def is_whole(stack: object, options: FitOptions, resources: Resources) -> bool:
    """Tell whether a layer is one task: unless its basis is of whole layers, and its rows are too many to be kept in memory."""
    return not isinstance(stack, DenseStack) or options.axes != ("models",) or stack.num_bytes <= resources.layer_bytes


def fit_task(
    zoo: Zoo, name: str, options: FitOptions, resources: Resources, known: LayerMoments | None = None
) -> LayerResult:
    """Fit one layer whole: moments, ranks, basis and coefficients, from one read of the weights where axis `models` is alone.

    With `known` moments of that axis only the basis is left to make.
    """
    stack = zoo.stack(name, precision=options.precision_of_products)
    if isinstance(stack, DenseStack) and options.axes == ("models",):
        return _fit_dense(stack, options, resources, known)
    moments = known or collect(stack, options.axes, options.center, resources, sketch=options.sketch)
    if options.axes == ("models",):
        found = fit_models(stack.layer, moments, options)
        return LayerResult(found.fitted, _without_sides(moments), weights_NK=found.weights_NK)
    parts = Parts()
    fitted = fit_tucker(stack, moments, options, resources, parts)
    return LayerResult(fitted, _without_sides(moments), parts.tensors)


def _fit_dense(stack: DenseStack, options: FitOptions, resources: Resources, known: LayerMoments | None) -> LayerResult:
    """Read a layer once: the rows that gave the moments, still in memory, give the basis."""
    asked = Asked(options.axes, options.center)
    inputs = stack.layer.shape[1]
    with loaded_spans(stack, resources) as spans:
        if known is None:
            held: Iterable[tuple[int, int, Tensor]] = list(spans)
            sums = [sum_loaded(stack, start, stop, rows_ED, asked) for start, stop, rows_ED in held]
            moments = dense_moments(stack, sums, asked, resources.device)
        else:
            moments, held = known, _centered(spans, stack)
        found = fit_models(stack.layer, moments, options)
        dtype = options.torch_dtype
        bases = [
            span_basis(rows_ED, start, inputs, found.weights_NK, moments.removed, dtype) for start, _, rows_ED in held
        ]
    turned, coefficients_NK = orthonormalized(bases, found.fitted.coefficients, dtype)
    fitted = replace(found.fitted, coefficients=coefficients_NK)
    return LayerResult(fitted, _without_sides(moments), spans=tuple(turned))


def _centered(spans: Iterable[tuple[int, int, Tensor]], stack: DenseStack) -> Iterator[tuple[int, int, Tensor]]:
    """Centre spans as they come."""
    for start, stop, rows_ED in spans:
        center_rows(rows_ED, len(stack), stack.layer.shape[1])
        yield start, stop, rows_ED


def span_task(
    zoo: Zoo, name: str, span: tuple[int, int], asked: Asked, precision: str, resources: Resources
) -> SpanSums:
    """Read and sum one span of a layer of full weights."""
    stack = zoo.stack(name, precision=precision)
    assert isinstance(stack, DenseStack)
    return sum_span(stack, *span, asked, resources)


def basis_task(
    zoo: Zoo,
    name: str,
    span: tuple[int, int],
    weights_NK: Tensor,
    removed: Tensor | None,
    options: FitOptions,
    resources: Resources,
) -> SpanBasis:
    """Read one span, or a block of it, again, and return the directions over it."""
    stack = zoo.stack(name, precision=options.precision_of_products)
    assert isinstance(stack, DenseStack)
    with loaded(stack, *span, resources) as rows_ED:
        center_rows(rows_ED, len(stack), stack.layer.shape[1])
        return span_basis(rows_ED, span[0], stack.layer.shape[1], weights_NK, removed, options.torch_dtype)


class StoredLayer:
    """Reads one layer's tensors from their files. Pickled for another process, which may not see it, it holds their values."""

    def __init__(self, files: BasisFiles, layer: str) -> None:
        self._files, self._layer = files, layer

    def read(self, name: str) -> Tensor:
        """Read a tensor whole."""
        return self._files.read(name)

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read a run of a flattened tensor."""
        return self._files.read_flat(name, start, stop, out)

    def __reduce__(self) -> tuple[Any, ...]:
        names = [f"{self._layer}/{part}" for part in self._files.dtypes(self._layer)]
        return HeldTensors, ({name: self._files.read(name) for name in names},)


@dataclass(frozen=True)
class HeldTensors:
    """A basis in memory."""

    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self.tensors[name]

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return a run of a flattened tensor."""
        found = self.tensors[name].view(-1)[start:stop]
        return found if out is None else out.copy_(found)


def stored_task(zoo: Zoo, precision: str, layer: tuple[str, LayerBasis]) -> list[Projection]:
    """Project all models of a layer, by its name, onto its basis as it is stored."""
    name, basis = layer
    return basis.project_all(zoo.stack(name, precision=precision))


def _without_sides(moments: LayerMoments) -> LayerMoments:
    return replace(moments, outputs=None, inputs=None)
