"""All layers of a zoo through the workers, and their results, in the order of the layers, into the bundle.

Legend: N models, K kept directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from eigenzoo.formats.basis_files import BasisWriter
from eigenzoo.records import Progress
from eigenzoo.subspace.collecting import Asked, dense_moments
from eigenzoo.subspace.flat import write_flat
from eigenzoo.subspace.layer_tasks import LayerResult, basis_task, fit_task, is_whole, span_task
from eigenzoo.subspace.models_fit import FittedLayer, fit_models
from eigenzoo.subspace.moments import LayerMoments
from eigenzoo.subspace.moments_cache import MomentsCache
from eigenzoo.subspace.options import FitOptions
from eigenzoo.subspace.stacked import write_stacked
from eigenzoo.subspace.work import Work
from eigenzoo.subspace.workers import Call, Workers
from eigenzoo.zoo.stack import DenseStack, UpdateStack
from eigenzoo.zoo.zoo import Zoo


@dataclass(frozen=True)
class LayerPass:
    """One pass over the layers of a zoo that fits each and writes its basis.

    Attributes:
        zoo, options: what is fitted, and how; `per_layer` where a layer has options of its own.
        workers: where tasks run.
        writer: where bases go.
        known: moments of the models axis that need not be collected.
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
        for name, results in self.workers.in_order(self._jobs()):
            if name in self.work:
                fitted[name], moments[name] = self.work.restore(name, self.writer)
            else:
                result = self._result(name, results)
                self._write(name, result)
                layer = replace(result.fitted, coefficients=result.fitted.coefficients.float())
                fitted[name], moments[name] = layer, result.moments
                self.work.keep(layer, result.moments, self.writer)
            progress("fitting layers", len(fitted), len(self.zoo.layers))
        return fitted, moments

    def _options(self, name: str) -> FitOptions:
        return self.per_layer.get(name, self.options)

    def _known(self, name: str) -> LayerMoments | None:
        if self.options.axes != ("models",):
            return None
        if name in self.known:
            return self.known[name]
        return self.cache.get(name, self.options.center, self._options(name).precision_of_products)

    def _jobs(self) -> Iterator[tuple[str, list[Call]]]:
        """One task per layer, or per span of a layer that is too large to be kept; none for what is done already."""
        resources = self.workers.resources
        for name in self.zoo.layers:
            options = self._options(name)
            stack = self.zoo.stack(name, precision=options.precision_of_products)
            if name in self.work:
                yield name, []
            elif is_whole(stack, options, resources):
                yield name, [partial(fit_task, self.zoo, name, options, resources, self._known(name))]
            else:
                assert isinstance(stack, DenseStack)
                asked = Asked(options.axes, options.center)
                spans = stack.spans() if self._known(name) is None else []
                task = partial(span_task, self.zoo, name)
                yield name, [partial(task, span, asked, options.precision_of_products, resources) for span in spans]

    def _result(self, name: str, results: list[object]) -> LayerResult:
        whole = results[0] if results and isinstance(results[0], LayerResult) else None
        result = whole or self._from_spans(name, results)
        if self.options.axes == ("models",) and name not in self.known:
            self.cache.put(name, self.options.center, self._options(name).precision_of_products, result.moments)
        return result

    def _from_spans(self, name: str, sums: list[object]) -> LayerResult:
        """Put a large layer's spans together, and read them once more for the basis, which goes straight into the bundle."""
        options = self._options(name)
        stack = self.zoo.stack(name, precision=options.precision_of_products)
        assert isinstance(stack, DenseStack)
        moments = self._known(name) or dense_moments(stack, sums, Asked(options.axes, options.center))  # type: ignore[arg-type]
        found = fit_models(stack.layer, moments, options)
        tasks = (
            (
                span,
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
            for span in stack.spans()
        )
        spans = (results[0] for _, results in self.workers.in_order(tasks))
        coefficients_NK = write_flat(
            stack.layer, moments.removed, spans, found.fitted.coefficients, options.torch_dtype, self.writer
        )
        return LayerResult(replace(found.fitted, coefficients=coefficients_NK), moments, {})

    def _write(self, name: str, result: LayerResult) -> None:
        for part, tensor in result.parts.items():
            self.writer.append(part, tensor)
        if result.weights_NK is not None:
            stack = self.zoo.stack(name, precision=self._options(name).precision_of_products)
            assert isinstance(stack, UpdateStack)
            write_stacked(stack, result.moments, result.weights_NK, self.writer)
