"""Form `flat`: PCA of flattened layers. X̂ = M + Σ c_k V_k with k whole-layer directions V_k and k numbers per model.

Legend: N models, D values of one flattened layer, K kept directions, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from eigenzoo.linalg import kernels
from eigenzoo.linalg.block_sums import exact_mean, parts
from eigenzoo.passes.buffers import borrow, lend
from eigenzoo.records import Layer
from eigenzoo.subspace.bases.basis import (
    FLAT,
    MODEL_BYTES,
    LayerBasis,
    Operator,
    Projection,
    TensorWriter,
    deviation_from_identity,
)
from eigenzoo.zoo.layers import widest
from eigenzoo.zoo.stack import BLOCK_BYTES, DenseStack, Stack

ORTHONORMAL = 1e-6
"""Deviation from orthonormality above which directions are corrected; float32 storage alone gives about 1e-7."""


@dataclass(frozen=True)
class SpanBasis:
    """The directions over one span that begins at value `start`, their Gram, and the models' mean if the bundle stores it."""

    start: int
    directions_KD: Tensor
    gram_KK: Tensor
    mean_D: Tensor | None


def span_basis(
    extended_ED: Tensor, start: int, inputs: int, weights_NK: Tensor, removed: Tensor | None, dtype: torch.dtype
) -> SpanBasis:
    """Return the directions V = Wᵀ(X − M) over one span of centred rows (`block_sums.center_rows`); K·N·D products."""
    num_models = len(weights_NK)
    rows_ND = extended_ED[:num_models]
    directions_KD, mean_D = _directions(weights_NK.T.to(rows_ND), rows_ND, inputs), None
    if removed is None:
        mean_D = exact_mean(extended_ED, num_models, _mean_dtype(dtype)).cpu()
    else:
        # The rows are centred about the models' mean and not about M, so their difference is added, times the sum of the weights.
        rounded_D = extended_ED[num_models].double()
        between_D = rounded_D - _center_values(removed, start, rounded_D.numel(), inputs).to(rounded_D.device)
        directions_KD += (weights_NK.sum(0).to(between_D.device)[:, None] * between_D).to(directions_KD.dtype)
    directions_KD = directions_KD.cpu().to(dtype)
    return SpanBasis(start, directions_KD, _gram(directions_KD), mean_D)


def _directions(weights_KN: Tensor, rows_ND: Tensor, inputs: int) -> Tensor:
    """Compute Wᵀ(X − M). On the CPU the products have a fixed width, so that the bits do not depend on the blocks of a span."""
    if rows_ND.device.type != "cpu":
        return kernels.product(weights_KN, rows_ND)
    directions_KD = lend(len(weights_KN), rows_ND.shape[1], rows_ND.dtype)
    for part in parts(rows_ND.shape[1], inputs):
        kernels.product(weights_KN, rows_ND[:, part], directions_KD[:, part])
    return directions_KD


def _gram(directions_KD: Tensor) -> Tensor:
    return kernels.long_gram(directions_KD.to(torch.promote_types(directions_KD.dtype, torch.float32)))


def _center_values(removed: Tensor, start: int, count: int, inputs: int) -> Tensor:
    """Return the values of M over whole output rows. M is constant along one axis or both."""
    return (
        removed.expand(count // inputs, inputs).reshape(-1)
        if removed.shape[0] == 1
        else removed.view(-1)[start : start + count]
    )


def orthonormalized(
    spans: Sequence[SpanBasis], coefficients_NK: Tensor, dtype: torch.dtype
) -> tuple[list[SpanBasis], Tensor]:
    """Make the directions of a layer orthonormal whose spans are all in memory; see `write_flat`."""
    gram_KK = torch.stack([span.gram_KK for span in spans]).sum(0)
    if deviation_from_identity(gram_KK) <= _orthonormal(dtype):
        return list(spans), coefficients_NK
    lower_KK = torch.linalg.cholesky(gram_KK)
    inverse_KK = torch.linalg.inv(lower_KK)
    orthonormal = []
    for span in spans:
        exact = torch.promote_types(dtype, torch.float32)
        directions_KD = kernels.product(inverse_KK.to(exact), span.directions_KD.to(exact)).to(dtype)
        orthonormal.append(replace(span, directions_KD=directions_KD, gram_KK=_gram(directions_KD)))
    return orthonormal, coefficients_NK @ lower_KK


def write_flat(
    layer: Layer,
    removed: Tensor | None,
    spans: Iterable[SpanBasis],
    coefficients_NK: Tensor,
    dtype: torch.dtype,
    writer: TensorWriter,
    *,
    orthonormal: bool = True,
) -> Tensor:
    """Write the center and the directions span by span, and return the coefficients.

    Round-off of the Gram makes the directions of small eigenvalues not orthogonal. One Cholesky step makes them orthonormal again.
    The coefficients are multiplied by the inverse, so that C·V does not change. Not if `orthonormal` is false: a reader
    orthonormalises quantised directions.
    """
    num_kept = coefficients_NK.shape[1]
    if removed is not None and float(removed.abs().max()) > 0:
        writer.append(f"{layer.name}/mean", removed.to(_mean_dtype(dtype)))
    if removed is None:
        writer.begin(f"{layer.name}/mean", _mean_dtype(dtype), layer.shape)
    if num_kept:
        writer.begin(f"{layer.name}/models", dtype, (num_kept, *layer.shape))
    gram_KK = torch.zeros(num_kept, num_kept, dtype=torch.float64)
    for span in spans:
        gram_KK += span.gram_KK
        if span.mean_D is not None:
            writer.write_flat(f"{layer.name}/mean", span.start, span.mean_D)
        if span.directions_KD.shape[1] == layer.num_values and num_kept:
            writer.write_flat(f"{layer.name}/models", 0, span.directions_KD.reshape(-1))
            continue
        for number, direction in enumerate(span.directions_KD):
            writer.write_flat(f"{layer.name}/models", number * layer.num_values + span.start, direction)
    if not orthonormal or deviation_from_identity(gram_KK) <= _orthonormal(dtype):
        return coefficients_NK
    return _orthonormalize(writer, f"{layer.name}/models", gram_KK, coefficients_NK, layer.num_values, dtype)


def _mean_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the mean: at least float32, because half precision would lose more than the directions gain."""
    return torch.promote_types(dtype, torch.float32)


def _orthonormal(dtype: torch.dtype) -> float:
    return max(ORTHONORMAL, 4 * torch.finfo(dtype).eps)


def _orthonormalize(
    writer: TensorWriter,
    name: str,
    gram_KK: Tensor,
    coefficients_NK: Tensor,
    num_values: int,
    dtype: torch.dtype,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Replace V by L⁻¹V in place, with LLᵀ = VVᵀ, and return C·L (CholeskyQR, Yamamoto et al. 2015)."""
    lower_KK: Tensor = torch.linalg.cholesky(gram_KK)
    num_kept = gram_KK.shape[0]
    per_block = max(1, block_bytes // (8 * num_kept))
    for start in range(0, num_values, per_block):
        stop = min(start + per_block, num_values)
        block = torch.empty(num_kept, stop - start, dtype=torch.float64)
        for number in range(num_kept):
            block[number] = writer.read_flat(name, number * num_values + start, number * num_values + stop)
        block = torch.linalg.solve_triangular(lower_KK, block, upper=False).to(dtype)
        for number in range(num_kept):
            writer.write_flat(name, number * num_values + start, block[number])
    return coefficients_NK @ lower_KK


@dataclass(frozen=True)
class FlatBasis(LayerBasis):
    """A layer as a center plus whole-layer directions."""

    form: ClassVar[str] = FLAT
    has_mean: bool = True

    @property
    def coefficient_shape(self) -> tuple[int, ...]:
        """(K,)."""
        return (self.ranks["models"],)

    def project_all(self, stack: Stack) -> list[Projection]:
        """Project every model's layer: one sweep over the values for the coefficients, and one for the residuals.

        A sweep reads each block of the basis once for all models. A basis of up to `BLOCK_BYTES` is read once and kept in memory,
        and so are models of up to `MODEL_BYTES`. Larger ones are read block by block in each sweep. Products are in float32 and
        sums in float64, unless the layer or its basis is float64. Cost: 2·N·K·D products.
        """
        assert isinstance(stack, DenseStack)
        dtype, num_models, num_values = self._working_dtype(), len(stack), self.layer.num_values
        width = min(num_values, max(1, MODEL_BYTES // (dtype.itemsize * num_models)))
        ranges = [(first, min(first + width, num_values)) for first in range(0, num_values, width)]
        mean_D = None
        if self.has_mean:
            mean_D = self.tensors.read(self._name("mean")).to(dtype).expand(self.layer.shape).reshape(-1)
        small = self.ranks["models"] * num_values * dtype.itemsize <= BLOCK_BYTES
        whole_basis = next(self._blocks(dtype), None) if small else None
        energies_N, outside_N = torch.zeros(2, num_models, dtype=torch.float64)
        coefficients_NK = torch.zeros(num_models, self.ranks["models"], dtype=torch.float64)
        with borrow(1, num_models * width, dtype) as memory:

            def read(first: int, last: int) -> Tensor:
                values_NR = memory[0, : num_models * (last - first)].view(num_models, last - first)
                stack.read(first, last, values_NR)
                return values_NR

            def center(values_NR: Tensor, first: int, last: int) -> None:
                if mean_D is not None:
                    kernels.subtract(values_NR, mean_D[first:last])

            def blocks(first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
                pieces = (
                    self._blocks(dtype, first, last)
                    if whole_basis is None
                    else [(first, last, whole_basis[2][:, first:last])]
                )
                return ((slice(start - first, stop - first), directions_KB) for start, stop, directions_KB in pieces)

            for first, last in ranges:
                values_NR = read(first, last)
                block_N = kernels.row_energies(values_NR)
                if not bool(torch.isfinite(block_N).all()):
                    stack.check_finite(first, last)
                energies_N += block_N
                center(values_NR, first, last)
                for part, directions_KB in blocks(first, last):
                    coefficients_NK += kernels.long_product(values_NR[:, part], directions_KB)
            coefficients_NK, weights_NK = self._of_products(coefficients_NK)
            for first, last in ranges:
                if len(ranges) > 1:
                    values_NR = read(first, last)
                    center(values_NR, first, last)
                for part, directions_KB in blocks(first, last):
                    kernels.subtract(values_NR[:, part], kernels.product(weights_NK.to(dtype), directions_KB))
                outside_N += kernels.row_energies(values_NR)
        return [
            Projection(coefficients_K, outside, energy)
            for coefficients_K, outside, energy in zip(
                coefficients_NK, outside_N.tolist(), energies_N.tolist(), strict=True
            )
        ]

    def rebuild(self, coefficients: Tensor) -> Tensor:
        """Return M + Σ c_k V_k."""
        matrix_OI = self.removed().expand(self.layer.shape).clone()
        flat = matrix_OI.view(-1)
        weights = coefficients.double()
        weights = weights if self._upright is None else weights @ self._upright
        for start, stop, directions in self._blocks():
            flat[start:stop] += weights @ directions
        return matrix_OI

    def orthonormality(self) -> float:
        """Largest entry of |VVᵀ − 1|, with V as it is stored."""
        return deviation_from_identity(self._gram())

    def _gram(self) -> Tensor:
        """VVᵀ of the directions as they are stored."""
        num_kept = self.ranks["models"]
        gram_KK = torch.zeros(num_kept, num_kept, dtype=torch.float64)
        for _, _, directions in self._blocks():
            gram_KK += directions @ directions.T
        return gram_KK

    @cached_property
    def _upright(self) -> Tensor | None:
        """Matrix that makes stored directions orthonormal, or None if they are not quantised. Reads the basis once."""
        return self._orthonormalizer(self._gram()) if self.stored.coding else None

    def _of_products(self, products_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return coefficients of products with stored directions, as they are stored, and the weights of stored directions."""
        upright_KK = self._upright
        if upright_KK is None:
            rounded_NK = self._rounded(products_NK)
            return rounded_NK, rounded_NK
        rounded_NK = self._rounded(products_NK @ upright_KK.T)
        return rounded_NK, rounded_NK @ upright_KK

    def operator(self) -> Operator:
        """Return the whole-layer directions in their stored dtype (quantised ones in float32), and the mean."""
        directions = torch.zeros(0, *self.layer.shape)
        if self.ranks["models"]:
            directions = self.tensors.read(self._name("models"))
            if self._upright is not None:
                directions = torch.tensordot(self._upright.to(directions.dtype), directions, 1)
        return Operator(table=directions, offset=self.removed())

    def removed(self) -> Tensor:
        """Return the center."""
        if not self.has_mean:
            return torch.zeros(1, 1, dtype=torch.float64)
        return self.tensors.read(self._name("mean")).double()

    def _blocks(
        self, dtype: torch.dtype = torch.float64, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, directions (K, stop − start)) over values first:last of the layer. Each block reuses the memory."""
        num_kept, num_values, name = self.ranks["models"], self.layer.num_values, self._name("models")
        last = num_values if last is None else last
        if not num_kept:
            return
        per_block = min(self._per_block(dtype), last - first)
        memory = lend(1, num_kept * per_block, dtype)[0]
        for start in range(first, last, per_block):
            stop = min(start + per_block, last)
            directions = memory[: num_kept * (stop - start)].view(num_kept, stop - start)
            if stop - start == num_values:
                self.tensors.read_flat(name, 0, memory.numel(), out=memory)
            else:
                for number, row in enumerate(directions):
                    self.tensors.read_flat(name, number * num_values + start, number * num_values + stop, out=row)
            yield start, stop, directions

    def _per_block(self, dtype: torch.dtype) -> int:
        return max(1, BLOCK_BYTES // (dtype.itemsize * max(1, self.ranks["models"])))

    def _working_dtype(self) -> torch.dtype:
        parts = ["models"] * bool(self.ranks["models"]) + ["mean"] * self.has_mean
        dtypes = [self.tensors.read_flat(self._name(part), 0, 0).dtype for part in parts]
        return widest(torch.float32, getattr(torch, self.layer.dtype), *dtypes)
