"""Tasks of a fit: what is done with one layer, or one span of it, on one worker.

Each is a function of plain values and an opened zoo, so that it runs in a thread here or in a process elsewhere alike. What
goes into the bundle comes back as tensors; whoever collects results writes them, in the order of the layers.

Legend: N models, K kept directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from eigenzoo.formats.bundle.basis_files import BasisFiles
from eigenzoo.linalg.block_sums import center_rows
from eigenzoo.passes.resources import Resources
from eigenzoo.subspace.bases.basis import LayerBasis, Projection
from eigenzoo.subspace.bases.flat import SpanBasis, orthonormalized, span_basis
from eigenzoo.subspace.fitting.models_fit import FittedLayer, fit_models
from eigenzoo.subspace.fitting.options import FitOptions
from eigenzoo.subspace.fitting.tucker_fit import fit_tucker
from eigenzoo.subspace.moments.collecting import (
    Asked,
    SpanSums,
    collect,
    dense_moments,
    loaded,
    loaded_spans,
    sum_loaded,
    sum_span,
)
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.stack import DenseStack
from eigenzoo.zoo.zoo import Zoo


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


class Parts:
    """Holds what is written, tensor by tensor: a basis on its way from a worker to the bundle."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def append(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor whole."""
        self.tensors[name] = tensor


def is_whole(stack: object, options: FitOptions, resources: Resources) -> bool:
    """Tell whether a layer is one task: unless its basis is of whole layers, and its rows are too many to be kept in memory."""
    return not isinstance(stack, DenseStack) or options.axes != ("models",) or stack.num_bytes <= resources.kept_bytes


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


def stored_task(zoo: Zoo, name: str, basis: LayerBasis, precision: str) -> list[Projection]:
    """Project all models of a layer onto its basis as it is stored."""
    return basis.project_all(zoo.stack(name, precision=precision))


def _without_sides(moments: LayerMoments) -> LayerMoments:
    return replace(moments, outputs=None, inputs=None)
