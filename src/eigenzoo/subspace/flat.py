"""Form `flat`: PCA of flattened layers. X̂ = M + Σ c_k V_k with k whole-layer directions V_k and k numbers per model.

Legend: N models, D values of one flattened layer, K kept directions, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from eigenzoo.linalg import kernels
from eigenzoo.records import Layer
from eigenzoo.subspace.basis import FLAT, LayerBasis, Projection, TensorWriter, deviation_from_identity
from eigenzoo.zoo.buffers import lend
from eigenzoo.zoo.stack import BLOCK_BYTES, DenseStack, Stack

ORTHONORMAL = 1e-6
"""Deviation from orthonormality above which directions are corrected; float32 storage alone gives about 1e-7."""


@dataclass(frozen=True)
class SpanBasis:
    """A run of the directions from value `start` on, their Gram, and the models' mean there where it goes into the bundle."""

    start: int
    directions_KD: Tensor
    gram_KK: Tensor
    mean_D: Tensor | None


def span_basis(
    extended_ED: Tensor, start: int, inputs: int, weights_NK: Tensor, removed: Tensor | None, dtype: torch.dtype
) -> SpanBasis:
    """Return the directions V = Wᵀ(X − M) over one span of centred rows (`block_sums.center_rows`); K·N·D products."""
    num_models, num_kept = weights_NK.shape
    rows_ND, rounded_D = extended_ED[:num_models], extended_ED[num_models]
    # One row more: the mean that rounding left in the rows.
    weights = torch.cat([weights_NK.T, torch.full((1, num_models), 1 / num_models, dtype=torch.float64)])
    room = lend(num_kept + 1, rows_ND.shape[1], rows_ND.dtype) if rows_ND.device.type == "cpu" else None
    found = kernels.product(weights.to(rows_ND), rows_ND, room)
    directions_KD, mean_D = found[:num_kept], None
    if removed is None:
        mean_dtype = _mean_dtype(dtype)
        mean_D = (rounded_D.to(mean_dtype) + found[num_kept].to(mean_dtype)).cpu()
    else:
        # The rows are about the models' mean, M is not: what lies between them comes as often as the weights add up to.
        between = rounded_D.double() - _run(removed, start, rounded_D.numel(), inputs).to(rounded_D.device)
        directions_KD += (weights_NK.sum(0).to(between.device)[:, None] * between).to(directions_KD.dtype)
    directions_KD = directions_KD.cpu().to(dtype)
    return SpanBasis(start, directions_KD, _own_gram(directions_KD), mean_D)


def _own_gram(directions_KD: Tensor) -> Tensor:
    return kernels.long_gram(directions_KD.to(torch.promote_types(directions_KD.dtype, torch.float32)))


def _run(removed: Tensor, start: int, count: int, inputs: int) -> Tensor:
    """Values of M, which is constant along one axis or both, over a run of whole output rows."""
    return (
        removed.expand(count // inputs, inputs).reshape(-1)
        if removed.shape[0] == 1
        else removed.view(-1)[start : start + count]
    )


def orthonormalized(
    spans: Sequence[SpanBasis], coefficients_NK: Tensor, dtype: torch.dtype
) -> tuple[list[SpanBasis], Tensor]:
    """Return the spans of a layer that are all in memory with directions that do not lean on each other; see `write_flat`."""
    gram_KK = torch.stack([span.gram_KK for span in spans]).sum(0)
    if deviation_from_identity(gram_KK) <= _orthonormal(dtype):
        return list(spans), coefficients_NK
    lower_KK = torch.linalg.cholesky(gram_KK)
    inverse_KK = torch.linalg.inv(lower_KK)
    turned = []
    for span in spans:
        exact = torch.promote_types(dtype, torch.float32)
        directions_KD = kernels.product(inverse_KK.to(exact), span.directions_KD.to(exact)).to(dtype)
        turned.append(replace(span, directions_KD=directions_KD, gram_KK=_own_gram(directions_KD)))
    return turned, coefficients_NK @ lower_KK


def write_flat(
    layer: Layer,
    removed: Tensor | None,
    spans: Iterable[SpanBasis],
    coefficients_NK: Tensor,
    dtype: torch.dtype,
    writer: TensorWriter,
) -> Tensor:
    """Write the center and the directions, span by span as they come; returns the coefficients.

    Directions of small eigenvalues inherit the Gram's round-off and lean on each other; one Cholesky step makes them
    orthonormal again and hands the coefficients the inverse, so that C·V stays what it was.
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
        for number, direction in enumerate(span.directions_KD):
            writer.write_flat(f"{layer.name}/models", number * layer.num_values + span.start, direction)
    if deviation_from_identity(gram_KK) <= _orthonormal(dtype):
        return coefficients_NK
    return _orthonormalize(writer, f"{layer.name}/models", gram_KK, coefficients_NK, layer.num_values, dtype)


def _mean_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the mean: a rounded one would cost more than what the directions add."""
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
        return self.project_all(stack.subset([place]))[0]

    def project_all(self, stack: Stack) -> list[Projection]:
        """Project every model's layer, a few models at a time: each block of the basis is read twice for all of these."""
        assert isinstance(stack, DenseStack)
        at_once = max(1, 4 * BLOCK_BYTES // (8 * self.layer.num_values))
        found: list[Projection] = []
        for first in range(0, len(stack), at_once):
            places = range(first, min(first + at_once, len(stack)))
            found += self._project(torch.stack([stack.matrix(place).double().view(-1) for place in places]))
        return found

    def _project(self, values_MD: Tensor) -> list[Projection]:
        energies_M = values_MD.square().sum(1)
        centered_MD = values_MD.sub_(self.removed().expand(self.layer.shape).reshape(-1))
        coefficients_MK = torch.zeros(values_MD.shape[0], self.ranks["models"], dtype=torch.float64)
        for start, stop, directions_KD in self._blocks():
            coefficients_MK += kernels.product(centered_MD[:, start:stop], directions_KD.T)
        for start, stop, directions_KD in self._blocks():
            centered_MD[:, start:stop] -= kernels.product(coefficients_MK, directions_KD)
        outside_M = centered_MD.square().sum(1)
        return [
            Projection(coefficients, float(outside), float(energy))
            for coefficients, outside, energy in zip(coefficients_MK, outside_M, energies_M, strict=True)
        ]

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
