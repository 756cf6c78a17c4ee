"""Form `flat`: PCA of flattened layers. X̂ = M + Σ c_k V_k with k whole-layer directions V_k and k numbers per model.

Legend: N models, D values of one flattened layer, K kept directions, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eigenzoo.subspace.basis import FLAT, LayerBasis, Projection, TensorWriter, deviation_from_identity
from eigenzoo.subspace.moments import LayerMoments, centered_rows
from eigenzoo.zoo.stack import BLOCK_BYTES, DenseStack, Stack

ORTHONORMAL = 1e-6
"""Deviation from orthonormality above which directions are corrected; float32 storage alone gives about 1e-7."""


def write_flat(
    stack: DenseStack,
    moments: LayerMoments,
    weights_NK: Tensor,
    coefficients_NK: Tensor,
    dtype: torch.dtype,
    writer: TensorWriter,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Write the center and the directions V = Wᵀ(X − M) in one pass over the weights; returns the coefficients.

    Directions of small eigenvalues inherit the Gram's round-off and lean on each other; one Cholesky step makes them
    orthonormal again and hands the coefficients the inverse, so that C·V stays what it was.
    """
    layer, num_kept = stack.layer, weights_NK.shape[1]
    removed = moments.removed
    mean_dtype = torch.promote_types(dtype, torch.float32)
    if removed is None:
        writer.begin(f"{layer.name}/mean", mean_dtype, layer.shape)
    elif float(removed.abs().max()) > 0:
        writer.append(f"{layer.name}/mean", removed.to(mean_dtype))
    if num_kept:
        writer.begin(f"{layer.name}/models", dtype, (num_kept, *layer.shape))
    gram_KK = torch.zeros(num_kept, num_kept, dtype=torch.float64)
    for block in stack.blocks(block_bytes):
        if removed is None:
            rows, mean_D = centered_rows(block)
            writer.write_flat(f"{layer.name}/mean", block.start, mean_D.to(mean_dtype))
        else:
            rows = block.rows
            rows.view(len(stack), -1, layer.shape[1]).sub_(removed.to(rows.dtype))
        if num_kept:
            directions = (weights_NK.T.to(rows.dtype) @ rows).to(dtype)
            gram_KK += (directions.to(rows.dtype) @ directions.T.to(rows.dtype)).double()
            for number, direction in enumerate(directions):
                writer.write_flat(f"{layer.name}/models", number * layer.num_values + block.start, direction)
    if deviation_from_identity(gram_KK) <= max(ORTHONORMAL, 4 * torch.finfo(dtype).eps):
        return coefficients_NK
    return _orthonormalize(
        writer, f"{layer.name}/models", gram_KK, coefficients_NK, layer.num_values, dtype, block_bytes
    )


def _orthonormalize(
    writer: TensorWriter,
    name: str,
    gram_KK: Tensor,
    coefficients_NK: Tensor,
    num_values: int,
    dtype: torch.dtype,
    block_bytes: int,
) -> Tensor:
    """Replace V by L⁻¹V in place, with LLᵀ = VVᵀ, and return C·L (CholeskyQR, Yamamoto et al. 2015)."""
    lower_KK: Tensor = torch.linalg.cholesky(gram_KK)
    num_kept = gram_KK.shape[0]
    per_block = max(1, block_bytes // (8 * num_kept))
    for start in range(0, num_values, per_block):
        stop = min(start + per_block, num_values)
        run = torch.empty(num_kept, stop - start, dtype=torch.float64)
        for number in range(num_kept):
            run[number] = writer.read_flat(name, number * num_values + start, number * num_values + stop)
        run = torch.linalg.solve_triangular(lower_KK, run, upper=False).to(dtype)
        for number in range(num_kept):
            writer.write_flat(name, number * num_values + start, run[number])
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

    def project(self, stack: Stack, place: int) -> Projection:
        """Project one model's layer; two passes over the basis, block by block."""
        assert isinstance(stack, DenseStack)
        matrix_OI = stack.matrix(place).double()
        centered = (matrix_OI - self.removed()).view(-1)
        coefficients = torch.zeros(self.ranks["models"], dtype=torch.float64)
        for start, stop, directions in self._blocks():
            coefficients += directions @ centered[start:stop]
        for start, stop, directions in self._blocks():
            centered[start:stop] -= coefficients @ directions
        return Projection(coefficients, float(centered.square().sum()), float(matrix_OI.square().sum()))

    def rebuild(self, coefficients: Tensor) -> Tensor:
        """Return M + Σ c_k V_k."""
        matrix_OI = self.removed().expand(self.layer.shape).clone()
        flat = matrix_OI.view(-1)
        for start, stop, directions in self._blocks():
            flat[start:stop] += coefficients.double() @ directions
        return matrix_OI

    def orthonormality(self) -> float:
        """Largest entry of |VVᵀ − 1|."""
        num_kept = self.ranks["models"]
        gram_KK = torch.zeros(num_kept, num_kept, dtype=torch.float64)
        for _, _, directions in self._blocks():
            gram_KK += directions @ directions.T
        return deviation_from_identity(gram_KK)

    def removed(self) -> Tensor:
        """The center; of updates its core."""
        if not self.has_mean:
            return torch.zeros(1, 1, dtype=torch.float64)
        return self.tensors.read(self._name("mean")).double()

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, directions (K, stop − start) in float64) over the flattened layer."""
        num_kept, num_values = self.ranks["models"], self.layer.num_values
        if not num_kept:
            return
        per_block = max(1, BLOCK_BYTES // (8 * num_kept))
        for start in range(0, num_values, per_block):
            stop = min(start + per_block, num_values)
            directions = torch.empty(num_kept, stop - start, dtype=torch.float64)
            for number in range(num_kept):
                self.tensors.read_flat(
                    self._name("models"),
                    number * num_values + start,
                    number * num_values + stop,
                    out=directions[number],
                )
            yield start, stop, directions
