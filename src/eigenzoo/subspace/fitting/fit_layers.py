"""All layers of a zoo through the workers, and their results, in the order of the layers, into the bundle.

Legend: N models, K kept directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from torch import Tensor

from eigenzoo.formats.bundle.basis_files import BasisWriter
from eigenzoo.passes.workers import Call, Workers
from eigenzoo.records import Progress
from eigenzoo.subspace.bases.flat import write_flat
from eigenzoo.subspace.bases.stacked import write_stacked
from eigenzoo.subspace.fitting.layer_tasks import LayerResult, basis_task, fit_task, is_whole, span_task
from eigenzoo.subspace.fitting.models_fit import FittedLayer, fit_models
from eigenzoo.subspace.fitting.options import FitOptions
from eigenzoo.subspace.fitting.work import Work
from eigenzoo.subspace.moments.collecting import Asked, cut, dense_moments
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.moments.moments_cache import MomentsCache
from eigenzoo.zoo.stack import DenseStack, UpdateStack
from eigenzoo.zoo.zoo import Zoo


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
