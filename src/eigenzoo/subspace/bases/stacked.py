"""Form `stacked`: PCA of LoRA updates without a dense matrix. Every direction is a weighted sum of the zoo's own updates.

    X̂ = Σ_n w_n · s_n B_n A_n,   w = m + Σ c_k v_k   (m = 1/N for the mean, v_k the weights of direction k)

The bundle contains the factors as they were stored and a (1 + K) × N table of weights. This is exact, but not smaller than the zoo.
For fewer bytes truncate the axes `outputs` and `inputs` (form `tucker`).

Legend: N models, O outputs, I inputs, P ranks of all updates stacked, K kept directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eigenzoo.linalg import lora
from eigenzoo.linalg.lora import Cut, Factors
from eigenzoo.records import Layer
from eigenzoo.subspace.bases.basis import (
    MODEL_BYTES,
    STACKED,
    LayerBasis,
    Operator,
    Projection,
    TensorWriter,
    deviation_from_identity,
    orthonormalizer,
)
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.stack import BLOCK_BYTES, Stack, UpdateStack


def write_stacked(
    stack: UpdateStack, moments: LayerMoments, weights_NK: Tensor, writer: TensorWriter, coding: str = ""
) -> None:
    """Write factors, owners, scales and weights. Factors keep their dtype and are written one model at a time.

    The directions are V_k = Σ_n w_nk (X_n − M). Their weights over the uncentred updates are therefore w_k minus the sum of w_k
    times the weights of M. With a `coding` the writer quantises the factors. The weights then make orthonormal directions of the
    quantised factors, which takes all factors of the layer in float64 and P²·(O + I) products.
    """
    layer, ranks, num_models = stack.layer, stack.ranks, len(stack)
    dtype = getattr(torch, layer.dtype)
    outputs, inputs = layer.shape
    mean_N = torch.full((num_models,), 1 / num_models if moments.removed is None else 0.0, dtype=torch.float64)
    directions_KN = weights_NK.T - weights_NK.sum(0)[:, None] * mean_N
    scales_N = torch.empty(num_models, dtype=torch.float64)
    # Bᵀ (P, O) and A (P, I), so that each model's factors are contiguous rows.
    writer.begin(f"{layer.name}/factors_b", dtype, (sum(ranks), outputs))
    writer.begin(f"{layer.name}/factors_a", dtype, (sum(ranks), inputs))
    first = 0
    for index in range(num_models):
        b_OR, a_RI, scales_N[index] = stack.stored_factors(index)
        writer.write_flat(f"{layer.name}/factors_b", first * outputs, b_OR.T.contiguous().to(dtype).view(-1))
        writer.write_flat(f"{layer.name}/factors_a", first * inputs, a_RI.contiguous().to(dtype).view(-1))
        first += ranks[index]
    raw_NN = moments.raw_NN
    if coding:
        raw_NN = _written_products(layer, ranks, scales_N.tolist(), writer)
        directions_KN = orthonormalizer(directions_KN @ raw_NN @ directions_KN.T, layer.name) @ directions_KN
    writer.append(f"{layer.name}/ranks", torch.tensor(ranks, dtype=torch.int32))
    writer.append(f"{layer.name}/scales", scales_N)
    weights = torch.cat([mean_N[None], directions_KN])
    writer.append(f"{layer.name}/weights", weights)
    writer.append(f"{layer.name}/products", weights @ raw_NN @ weights.T)


def _written_products(layer: Layer, ranks: Sequence[int], scales: Sequence[float], writer: TensorWriter) -> Tensor:
    """Return ⟨X_i, X_j⟩ (N, N) of all models' updates as they were written."""
    rows_b, rows_a = (
        writer.read_flat(f"{layer.name}/{part}", 0, sum(ranks) * size).double().view(-1, size)
        for part, size in zip(("factors_b", "factors_a"), layer.shape, strict=True)
    )
    models = zip(torch.split(rows_b, list(ranks)), torch.split(rows_a, list(ranks)), scales, strict=True)
    factors = [(b_RO.T * scale, a_RI) for b_RO, a_RI, scale in models]
    return lora.inner_products(factors, factors)


@dataclass(frozen=True)
class StackedBasis(LayerBasis):
    """A LoRA update as weights over the zoo's own factors."""

    form: ClassVar[str] = STACKED

    @property
    def coefficient_shape(self) -> tuple[int, ...]:
        """(K,)."""
        return (self.ranks["models"],)

    def project_all(self, stack: Stack) -> list[Projection]:
        """Project every update: c_k = ⟨V_k, X − M⟩ and ‖X − X̂‖² = ‖X − M‖² − ‖c‖², by products of factors.

        Groups of updates whose factors take up to `MODEL_BYTES` are in memory at once. The basis is read once for each group, in
        blocks of `BLOCK_BYTES`. Computed in float64. Cost: P·Q·(O + I) products, with P and Q the ranks of the basis and of the
        updates.
        """
        assert isinstance(stack, UpdateStack)
        weights = self.tensors.read(self._name("weights"))
        products = self.tensors.read(self._name("products"))
        num_at_once = max(1, MODEL_BYTES // (8 * max(1, *stack.ranks) * sum(self.layer.shape)))
        projections = []
        for first in range(0, len(stack), num_at_once):
            indices = range(first, min(first + num_at_once, len(stack)))
            factors = [stack.factors(index) for index in indices]
            along = weights @ self._inner_products(factors)
            coefficients_MK = (along[1:] - products[1:, :1]).T
            for update, along_mean, coefficients in zip(factors, along[0].tolist(), coefficients_MK, strict=True):
                energy, stored = lora.energy(update), self._rounded(coefficients.clone())
                inside = float((stored * (2 * coefficients - stored)).sum())
                outside = energy - 2 * along_mean + float(products[0, 0]) - inside
                projections.append(Projection(stored, max(outside, 0.0), energy))
        return projections

    def rebuild(self, coefficients: Tensor) -> Factors:
        """Return the balanced factors of least rank of Σ w_n s_n B_n A_n; cost (O + I)·P² + P³."""
        return self.rebuild_update(coefficients).factors

    def rebuild_update(self, coefficients: Tensor, max_rank: int | None = None) -> Cut:
        """Return that sum, cut to a rank."""
        weights = self.tensors.read(self._name("weights"))
        combined_N = (weights[0] + coefficients.double() @ weights[1:]) * self.tensors.read(self._name("scales"))
        owner_P = self._owner()
        used_P = (combined_N != 0)[owner_P]
        b_PO = self.tensors.read(self._name("factors_b")).double()[used_P]
        a_PI = self.tensors.read(self._name("factors_a")).double()[used_P]
        # A model near zero is a small difference of mean and directions. Their round-off must not count as rank.
        noise = lora.ROUND_OFF * (
            float(self.tensors.read(self._name("products"))[0, 0]) + float(coefficients.double().square().sum())
        )
        return lora.cut_product(b_PO.T * combined_N[owner_P][used_P], a_PI, max_rank, noise)

    def stored_ranks(self) -> list[int]:
        """The rank of every update that the basis is made of: those of the fitted models, in their order."""
        ranks: list[int] = self.tensors.read(self._name("ranks")).long().tolist()
        return ranks

    def stored_factors(self, place: int) -> tuple[Tensor, Tensor, float]:
        """Read one of these updates as `UpdateStack.stored_factors` gave it: B (O, R), A (R, I), and its scale."""
        ranks, (outputs, inputs) = self.stored_ranks(), self.layer.shape
        start, stop = sum(ranks[:place]), sum(ranks[: place + 1])
        b_RO = self.tensors.read_flat(self._name("factors_b"), start * outputs, stop * outputs).view(-1, outputs)
        a_RI = self.tensors.read_flat(self._name("factors_a"), start * inputs, stop * inputs).view(-1, inputs)
        return b_RO.T, a_RI, float(self.tensors.read(self._name("scales"))[place])

    def orthonormality(self) -> float:
        """Return the largest entry of |⟨V_j, V_k⟩ − δ_jk|, computed from the factors."""
        weights = self.tensors.read(self._name("weights"))[1:]
        if not weights.numel():
            return 0.0
        factors = self._factors()
        return deviation_from_identity(weights @ lora.inner_products(factors, factors) @ weights.T)

    def operator(self) -> Operator:
        """Return all models' factors (O, P) and (P, I), and the weights of their ranks in the directions (K, P) and in the mean.

        All are float64. The models' scales are in the table.
        """
        weights = self.tensors.read(self._name("weights")) * self.tensors.read(self._name("scales"))
        b_PO, a_PI = (self.tensors.read(self._name(part)).double() for part in ("factors_b", "factors_a"))
        table = weights[:, self._owner()]
        return Operator(before=a_PI, after=b_PO.T.contiguous(), table=table[1:], center=table[0])

    def _owner(self) -> Tensor:
        ranks = self.tensors.read(self._name("ranks")).long()
        return torch.repeat_interleave(torch.arange(ranks.numel()), ranks)

    def _factors(self) -> list[Factors]:
        ranks = self.tensors.read(self._name("ranks")).long().tolist()
        scales = self.tensors.read(self._name("scales")).tolist()
        b_PO = self.tensors.read(self._name("factors_b")).double()
        a_PI = self.tensors.read(self._name("factors_a")).double()
        return [
            (b.T * scale, a)
            for b, a, scale in zip(torch.split(b_PO, ranks), torch.split(a_PI, ranks), scales, strict=True)
        ]

    def _inner_products(self, factors: Sequence[Factors]) -> Tensor:
        """Return ⟨X_n, B_m A_m⟩ (N, M) for every model n of the basis and every update m: two thin products, summed over ranks."""
        b_OQ, a_QI = torch.cat([b for b, _ in factors], 1), torch.cat([a for _, a in factors])
        owner_Q = torch.repeat_interleave(torch.arange(len(factors)), torch.tensor([a.shape[0] for _, a in factors]))
        owner_P, scales_N = self._owner(), self.tensors.read(self._name("scales"))
        products_NM = torch.zeros(scales_N.numel(), len(factors), dtype=torch.float64)
        # Memory of a block: both factors and their products with the updates.
        per_block = max(1, BLOCK_BYTES // (8 * (sum(self.layer.shape) + 2 * owner_Q.numel())))
        for start in range(0, owner_P.numel(), per_block):
            stop = min(start + per_block, owner_P.numel())
            products_PQ = (self._rows("factors_b", start, stop) @ b_OQ) * (
                self._rows("factors_a", start, stop) @ a_QI.T
            )
            sums_PM = torch.zeros(stop - start, len(factors), dtype=torch.float64).index_add_(1, owner_Q, products_PQ)
            products_NM.index_add_(0, owner_P[start:stop], sums_PM)
        return products_NM * scales_N[:, None]

    def _rows(self, part: str, start: int, stop: int) -> Tensor:
        """Read rows start:stop of all models' stacked factors, in float64."""
        width = self.layer.shape[0 if part == "factors_b" else 1]
        rows = self.tensors.read_flat(self._name(part), start * width, stop * width)
        return rows.double().view(stop - start, width)
