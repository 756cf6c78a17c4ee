"""Collect moments with one read of a layer's weights and one symmetric product.

The spans of a layer depend only on its shape and the number of models. The sums of the spans are added in order, so the result has
the same bits for any number of threads or machines.

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
"""Longer sides are not truncated, because their moment would take gigabytes and its eigenvectors minutes."""


@dataclass(frozen=True)
class MomentRequest:
    """The moments that a pass collects.

    Attributes:
        axes, center: as in a fit.
        sketch: the sides to sketch.
    """

    axes: tuple[str, ...] = ("models",)
    center: str = "models"
    sketch: SketchPlan | None = None

    @property
    def columns(self) -> bool:
        """Whether column sums are needed."""
        return self.center in ("columns", "global")

    @property
    def mean(self) -> bool:
        """Whether the whole mean is needed, and not only its energy."""
        return self.columns or bool({"outputs", "inputs"} & set(self.axes))


@dataclass(frozen=True)
class SpanSums:
    """The sums of one span, and on request the models' mean over it."""

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
    """Collect a layer's moments in one pass, or in two if a side's moment is needed.

    Each block's mean is removed from its rows before they are multiplied. Products are in the stack's dtype and summed in float64.
    The relative error of the centred spectrum is about 1e-7 in float32. Cost: N²·D products and one read for the Gram, and N·D·O
    (or I) more for an output (input) moment. LoRA updates need P²·(O + I) products and no dense matrix.
    """
    request = MomentRequest(axes, center, sketch)
    if isinstance(stack, UpdateStack):
        return collect_updates(stack, axes, center, resources, sketch)
    spans = [sum_span(stack, *span, request, resources) for span in stack.spans()]
    return dense_moments(stack, spans, request, resources.device)


def sum_span(stack: DenseStack, start: int, stop: int, request: MomentRequest, resources: Resources) -> SpanSums:
    """Read one span block by block and sum it."""
    sums = _empty_sums(stack, request, resources.device)
    means: list[Tensor] = []
    for first, last in cut(stack, start, stop, resources):
        with loaded(stack, first, last, resources) as extended_ED:
            add_block(sums, extended_ED, stack.layer.shape[1], stack.precision)
            if request.mean:
                means.append(exact_mean(extended_ED, len(stack)))
    sums = sums.on_cpu()
    require_finite(stack, start, stop, sums)
    return SpanSums(sums, torch.cat(means).cpu() if means else None)


def sum_loaded(stack: DenseStack, start: int, stop: int, extended_ED: Tensor, request: MomentRequest) -> SpanSums:
    """Centre and sum a span in memory."""
    sums = _empty_sums(stack, request, str(extended_ED.device))
    add_block(sums, extended_ED, stack.layer.shape[1], stack.precision)
    sums = sums.on_cpu()
    require_finite(stack, start, stop, sums)
    return SpanSums(sums, exact_mean(extended_ED, len(stack)).cpu() if request.mean else None)


def _empty_sums(stack: DenseStack, request: MomentRequest, device: str) -> BlockSums:
    sides = side_form(stack, "inputs", request.axes) == DENSE and "inputs" not in sketched_ranks(stack, request.sketch)
    return empty_sums(len(stack), stack.layer.shape[1], columns=request.columns, sides=sides, device=device)


@contextmanager
def loaded(stack: DenseStack, start: int, stop: int, resources: Resources) -> Iterator[Tensor]:
    """Yield values start:stop as extended rows on the device, not yet centred."""
    on_cpu = resources.device == "cpu"
    with borrow(num_extended(len(stack)), stop - start, stack.dtype, pinned=not on_cpu) as extended_ED:
        stack.read(start, stop, extended_ED[: len(stack)])
        if on_cpu:
            yield extended_ED
            return
        moved_ED = extended_ED.to(resources.device, non_blocking=True)
    # Torch reuses pinned memory only after the copies from it have ended.
    yield moved_ED


@contextmanager
def loaded_spans(stack: DenseStack, resources: Resources) -> Iterator[Iterator[tuple[int, int, Tensor]]]:
    """Yield all spans of a layer. Each is read when the iterator reaches it and kept until the context ends."""
    with ExitStack() as lent:
        yield (
            (start, stop, lent.enter_context(loaded(stack, start, stop, resources))) for start, stop in stack.spans()
        )


def cut(stack: DenseStack, start: int, stop: int, resources: Resources) -> Iterator[tuple[int, int]]:
    """Split a span into blocks of whole products that fit into `block_bytes`. A span that fits is one block."""
    if (stop - start) * len(stack) * stack.dtype.itemsize <= resources.block_bytes:
        return iter([(start, stop)])
    inputs = stack.layer.shape[1]
    step = max(1, kernels.PRODUCT_COLUMNS // inputs) * inputs
    row_bytes = num_extended(len(stack)) * stack.dtype.itemsize
    width = max(1, resources.block_bytes // (row_bytes * step)) * step
    return ((first, min(first + width, stop)) for first in range(start, stop, width))


def require_finite(stack: DenseStack, start: int, stop: int, sums: BlockSums) -> None:
    """Raise DataError, naming the model, if a value was not finite or a product overflowed."""
    if sums.is_finite:
        return
    stack.check_finite(start, stop)
    raise DataError(
        "the products of its values overflow",
        where=f"layer '{stack.layer.name}'",
        rule="squares of weights are finite in the precision of the products",
        next_step="use precision 'high', or --exclude the layer so that it is carried unchanged",
    )


def dense_moments(
    stack: DenseStack, spans: Sequence[SpanSums], request: MomentRequest, device: str = "cpu"
) -> LayerMoments:
    """Add the sums of all spans in order, and return the moments."""
    num_models, layer = len(stack), stack.layer
    total = spans[0].sums
    for span in spans[1:]:
        total.add(span.sums)
    # First about the rounded mean that was subtracted, then exactly about the mean.
    about_rounded = LayerMoments(
        total.gram_NN, total.cross_N, total.energy, layer.num_values, num_models, round_off(stack)
    )
    entries = entry_dimensions(total.gram_NN, float(total.squares))
    moments = replace(recentered(about_rounded), sums_N=total.sums_N, entries=entries)
    if not request.mean:
        return moments if request.center == "models" else shifted_to_zero(moments)
    mean_OI = torch.cat([span.mean_D for span in spans if span.mean_D is not None]).view(layer.shape)
    removed = center_of(mean_OI, request.center)
    shift_OI = mean_OI - removed
    if total.inputs_II is not None:
        # Σ(Y + d)ᵀ(Y + d) = ΣYᵀY + N·dᵀd, for Σ Y = 0.
        moments = replace(moments, inputs=SideMoment(total.inputs_II + num_models * shift_OI.T @ shift_OI))
    sketched = sketch_sides(
        stack,
        sketched_ranks(stack, request.sketch),
        removed,
        seed=request.sketch.seed if request.sketch else 0,
        device=device,
    )
    moments = replace(
        moments,
        inputs=moments.inputs or sketched.get("inputs") or _side_moment(stack, "inputs", removed, request, device),
        outputs=sketched.get("outputs") or _side_moment(stack, "outputs", removed, request, device),
    )
    return (
        moments
        if request.center == "models"
        else _shifted(moments, mean_OI, shift_OI, total.columns_NI, request.center)
    )


def side_form(stack: DenseStack, axis: str, axes: tuple[str, ...]) -> str:
    """Choose the form of a side's moment: dense, a factor if all columns together are fewer than the side, or none."""
    if axis not in axes:
        return ""
    side, other = stack.layer.shape if axis == "outputs" else stack.layer.shape[::-1]
    if len(stack) * other < side:
        return FACTOR
    return DENSE if side <= LARGEST_SIDE else ""


def _side_moment(
    stack: DenseStack, axis: str, removed: Tensor, request: MomentRequest, device: str
) -> SideMoment | None:
    """Compute Σ (X_n − M)(X_n − M)ᵀ or its mirror from whole models, since rows of a block contain only some of the outputs."""
    form = side_form(stack, axis, request.axes)
    if not form or (form == DENSE and axis == "inputs"):
        return None
    matrices = ((stack.matrix(index) - removed).to(stack.dtype) for index in range(len(stack)))
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
    """Add the center's shift from the mean: ⟨R − M, Y⟩ from the sums of Y's columns, since M is constant along them."""
    if columns_NI is None:
        return shifted_to_zero(moments)
    removed = center_of(mean_OI, center)
    # Y is about the rounded mean. About the exact mean, column sums add up to zero over the models.
    columns_NI = columns_NI - columns_NI.mean(0)
    shift_N = moments.cross_N - columns_NI @ removed.expand(1, mean_OI.shape[1])[0]
    return replace(moments, removed=removed, shift_N=shift_N, shift_energy=float(shift_OI.square().sum()))
