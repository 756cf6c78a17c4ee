"""Collecting moments: one read of a layer's weights and one symmetric product.

A layer is cut into spans by its shape and the number of models alone. Each span gives sums, and sums of spans are added in their
order: so the result is the same to the last bit however many threads or machines take part.

Legend: N models, E extended rows (`block_sums`), D values of one span, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigenzoo.errors import DataError
from eigenzoo.linalg import kernels
from eigenzoo.linalg.block_sums import BlockSums, add_block, empty_sums, exact_mean, num_extended
from eigenzoo.linalg.side import SideMoment
from eigenzoo.passes.buffers import borrow
from eigenzoo.passes.resources import Resources
from eigenzoo.subspace.moments.layer_moments import (
    LayerMoments,
    center_of,
    entry_dimensions,
    recentered,
    round_off,
    shifted_to_zero,
)
from eigenzoo.subspace.moments.sketched import SketchPlan, sketch_sides, sketched_ranks
from eigenzoo.subspace.moments.update_moments import collect_updates
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack

DENSE, FACTOR = "dense", "factor"

LARGEST_SIDE = 16384
"""More outputs or inputs than this are kept whole: their moment would take gigabytes, and its eigenvectors minutes."""


@dataclass(frozen=True)
class Asked:
    """What moments a pass is to collect.

    Attributes:
        axes, center: as of a fit.
        sketch: which sides are sketched.
    """

    axes: tuple[str, ...] = ("models",)
    center: str = "models"
    sketch: SketchPlan | None = None

    @property
    def columns(self) -> bool:
        """Whether the sums of columns are needed."""
        return self.center in ("columns", "global")

    @property
    def mean(self) -> bool:
        """Whether the mean itself is needed, and not only its energy."""
        return self.columns or bool({"outputs", "inputs"} & set(self.axes))


@dataclass(frozen=True)
class SpanSums:
    """The sums of one span, and the models' mean there where it is asked for."""

    sums: BlockSums
    mean_D: Tensor | None


def collect(
    stack: Stack,
    axes: tuple[str, ...] = ("models",),
    center: str = "models",
    resources: Resources = Resources(),  # noqa: B008 - frozen
    *,
    sketch: SketchPlan | None = None,
) -> LayerMoments:
    """Collect a layer's moments in one pass (one more where a side's moment is asked).

    Products run in the stack's dtype on rows whose mean has been removed inside the block, and are summed in float64:
    relative error of the centred spectrum about 1e-7 in float32. Cost N²·D products and one read for the Gram, and
    N·D·O (or I) more for an output (input) moment. For LoRA updates nothing dense is formed: P²·(O + I) products.
    """
    asked = Asked(axes, center, sketch)
    if isinstance(stack, UpdateStack):
        return collect_updates(stack, axes, center, resources, sketch)
    spans = [sum_span(stack, *span, asked, resources) for span in stack.spans()]
    return dense_moments(stack, spans, asked, resources.device)


def sum_span(stack: DenseStack, start: int, stop: int, asked: Asked, resources: Resources) -> SpanSums:
    """Read one span, block by block, and sum it."""
    sums = _empty_sums(stack, asked, resources.device)
    means: list[Tensor] = []
    for first, last in cut(stack, start, stop, resources):
        with loaded(stack, first, last, resources) as extended_ED:
            add_block(sums, extended_ED, stack.layer.shape[1], stack.precision)
            if asked.mean:
                means.append(exact_mean(extended_ED, len(stack)))
    sums = sums.on_cpu()
    require_finite(stack, start, stop, sums)
    return SpanSums(sums, torch.cat(means).cpu() if means else None)


def sum_loaded(stack: DenseStack, start: int, stop: int, extended_ED: Tensor, asked: Asked) -> SpanSums:
    """Centre a span that is in memory, and sum it."""
    sums = _empty_sums(stack, asked, str(extended_ED.device))
    add_block(sums, extended_ED, stack.layer.shape[1], stack.precision)
    sums = sums.on_cpu()
    require_finite(stack, start, stop, sums)
    return SpanSums(sums, exact_mean(extended_ED, len(stack)).cpu() if asked.mean else None)


def _empty_sums(stack: DenseStack, asked: Asked, device: str) -> BlockSums:
    sides = side_form(stack, "inputs", asked.axes) == DENSE and "inputs" not in sketched_ranks(stack, asked.sketch)
    return empty_sums(len(stack), stack.layer.shape[1], columns=asked.columns, sides=sides, device=device)


@contextmanager
def loaded(stack: DenseStack, start: int, stop: int, resources: Resources) -> Iterator[Tensor]:
    """Lend a run of values as extended rows on the device, not centred yet."""
    on_cpu = resources.device == "cpu"
    with borrow(num_extended(len(stack)), stop - start, stack.dtype, pinned=not on_cpu) as extended_ED:
        stack.read(start, stop, extended_ED[: len(stack)])
        if on_cpu:
            yield extended_ED
            return
        moved_ED = extended_ED.to(resources.device, non_blocking=True)
    # Torch lends pinned memory again only when the copies from it have ended.
    yield moved_ED


@contextmanager
def loaded_spans(stack: DenseStack, resources: Resources) -> Iterator[Iterator[tuple[int, int, Tensor]]]:
    """Lend all spans of a layer, read when they are first asked for, and kept until the context is left."""
    with ExitStack() as lent:
        yield (
            (start, stop, lent.enter_context(loaded(stack, start, stop, resources))) for start, stop in stack.spans()
        )


def cut(stack: DenseStack, start: int, stop: int, resources: Resources) -> Iterator[tuple[int, int]]:
    """Cut a span into blocks of whole products that fit into the memory given, one at least; a span that fits is one block."""
    if (stop - start) * len(stack) * stack.dtype.itemsize <= resources.block_bytes:
        return iter([(start, stop)])
    inputs = stack.layer.shape[1]
    step = max(1, kernels.PRODUCT_COLUMNS // inputs) * inputs
    row_bytes = num_extended(len(stack)) * stack.dtype.itemsize
    width = max(1, resources.block_bytes // (row_bytes * step)) * step
    return ((first, min(first + width, stop)) for first in range(start, stop, width))


def require_finite(stack: DenseStack, start: int, stop: int, sums: BlockSums) -> None:
    """Raise DataError, naming the model, where a value was not finite or a product overflowed."""
    if sums.is_finite:
        return
    stack.check_finite(start, stop)
    raise DataError(
        "the products of its values overflow",
        where=f"layer '{stack.layer.name}'",
        rule="squares of weights are finite in the precision of the products",
        next_step="use precision 'high', or --exclude the layer so that it is carried unchanged",
    )


def dense_moments(stack: DenseStack, spans: Sequence[SpanSums], asked: Asked, device: str = "cpu") -> LayerMoments:
    """Put the sums of all spans, in their order, together to moments."""
    num_models, layer = len(stack), stack.layer
    total = spans[0].sums
    for span in spans[1:]:
        total.add(span.sums)
    # About the rounded mean that was subtracted, and then, exactly, about the mean.
    about_rounded = LayerMoments(
        total.gram_NN, total.cross_N, total.energy, layer.num_values, num_models, round_off(stack)
    )
    entries = entry_dimensions(total.gram_NN, float(total.squares))
    moments = replace(recentered(about_rounded), sums_N=total.sums_N, entries=entries)
    if not asked.mean:
        return moments if asked.center == "models" else shifted_to_zero(moments)
    mean_OI = torch.cat([span.mean_D for span in spans if span.mean_D is not None]).view(layer.shape)
    removed = center_of(mean_OI, asked.center)
    shift_OI = mean_OI - removed
    if total.inputs_II is not None:
        # Σ(Y + d)ᵀ(Y + d) = ΣYᵀY + N·dᵀd, for Σ Y = 0.
        moments = replace(moments, inputs=SideMoment(total.inputs_II + num_models * shift_OI.T @ shift_OI))
    sketched = sketch_sides(
        stack,
        sketched_ranks(stack, asked.sketch),
        removed,
        seed=asked.sketch.seed if asked.sketch else 0,
        device=device,
    )
    moments = replace(
        moments,
        inputs=moments.inputs or sketched.get("inputs") or _side_moment(stack, "inputs", removed, asked, device),
        outputs=sketched.get("outputs") or _side_moment(stack, "outputs", removed, asked, device),
    )
    return moments if asked.center == "models" else _shifted(moments, mean_OI, shift_OI, total.columns_NI, asked.center)


def side_form(stack: DenseStack, axis: str, axes: tuple[str, ...]) -> str:
    """Say how a side's moment is held: dense, as a factor where all columns together are fewer than the side, or not at all."""
    if axis not in axes:
        return ""
    side, other = stack.layer.shape if axis == "outputs" else stack.layer.shape[::-1]
    if len(stack) * other < side:
        return FACTOR
    return DENSE if side <= LARGEST_SIDE else ""


def _side_moment(stack: DenseStack, axis: str, removed: Tensor, asked: Asked, device: str) -> SideMoment | None:
    """Σ (X_n − M)(X_n − M)ᵀ or its mirror, model by model: rows of one block see only their own outputs."""
    form = side_form(stack, axis, asked.axes)
    if not form or (form == DENSE and axis == "inputs"):
        return None
    matrices = ((stack.matrix(place) - removed).to(stack.dtype) for place in range(len(stack)))
    if form == FACTOR:
        columns = [(matrix if axis == "outputs" else matrix.T).double() for matrix in matrices]
        return SideMoment(factor_SP=torch.cat(columns, 1))
    moment_OO = torch.zeros(stack.layer.shape[0], stack.layer.shape[0], dtype=torch.float64, device=device)
    for matrix_OI in matrices:
        moment_OO += kernels.gram(matrix_OI.to(device))
    return SideMoment(moment_OO.cpu())


def _shifted(
    moments: LayerMoments, mean_OI: Tensor, shift_OI: Tensor, columns_NI: Tensor | None, center: str
) -> LayerMoments:
    """Say where the center lies from the mean: ⟨R − M, Y⟩ from the sums of Y's columns, since M is constant along them."""
    if columns_NI is None:
        return shifted_to_zero(moments)
    removed = center_of(mean_OI, center)
    # Y is about the mean as it was rounded; columns about the mean itself have no sum over models.
    columns_NI = columns_NI - columns_NI.mean(0)
    shift_N = moments.cross_N - columns_NI @ removed.expand(1, mean_OI.shape[1])[0]
    return replace(moments, removed=removed, shift_N=shift_N, shift_energy=float(shift_OI.square().sum()))
