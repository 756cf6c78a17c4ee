"""The numbers that a layer's store holds of a model, from its coefficients.

Legend: N models, P and Q the sides of the middle, R the rank of factors, K directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.serve.layers import Chain
from eigenzoo.serve.stores import Blends, Cores, Diagonals, Factors, Store
from eigenzoo.subspace.bases.basis import LayerBasis, Operator

EXACT = 1e-6
"""Largest share of a matrix's norm that its factors may leave out: the round-off of float32 coefficients."""


@dataclass(frozen=True)
class LayerForm:
    """A fitted layer as a chain: what all models share, and how one model's numbers follow from its coefficients.

    Attributes:
        operator: the layer's basis, the matrix as it lies in the bundle.
        transposed: whether the module's weight is (inputs, outputs), so that the change of outputs is the transposed matrix.
        dtype, device: of the module's weight, for everything that is multiplied.
    """

    operator: Operator
    transposed: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def is_diagonal(self) -> bool:
        """Whether the middle is a diagonal over the zoo's own factors."""
        return self.operator.table is not None and self.operator.table.ndim == 2

    @property
    def is_dense(self) -> bool:
        """Whether directions are whole layers."""
        operator = self.operator
        return operator.table is not None and operator.before is operator.after is operator.center is None

    def chain(self, coefficients: Tensor, rank: int | None) -> Chain:
        """Return the chain of models (N, …). Their matrices are kept as factors of a rank if all have it and it is less to read."""
        first, last = self.operator.before, self.operator.after
        if self.transposed:
            first, last = (None if part is None else part.T for part in (last, first))
        return Chain(
            None if first is None else self._placed(first),
            self._store(coefficients, rank),
            None if last is None else self._placed(last),
        )

    def numbers(self, coefficients: Tensor, store: Store) -> Mapping[str, Tensor] | None:
        """Return one model's numbers for a store, or None if its matrix does not have the rank of the store's factors."""
        if isinstance(store, Blends):
            return {"weights": coefficients}
        middles = self._middles(coefficients[None])
        if isinstance(store, Diagonals):
            return {"weights": middles[0]}
        if isinstance(store, Cores):
            return {"cores": middles[0]}
        found = factored(middles, store.stacks["left"].shape[2])
        return None if found is None else {"left": found[0][0], "right": found[1][0]}

    def _store(self, coefficients: Tensor, rank: int | None) -> Store:
        if self.is_dense:
            table = self.operator.table
            assert table is not None
            return Blends(self._with_base(coefficients), self._placed(table.mT if self.transposed else table))
        middles = self._middles(coefficients)
        if self.is_diagonal:
            return Diagonals({"weights": self._with_base(middles)})
        rows, columns = middles.shape[1:]
        if rank is not None and rank * (rows + columns) < rows * columns:
            found = factored(middles, rank)
            if found is not None:
                left, right = found
                return Factors({"left": self._with_base(left), "right": self._with_base(right)})
        return Cores({"cores": self._with_base(middles)})

    def _middles(self, coefficients: Tensor) -> Tensor:
        """Return the middles (N, P, Q) of models with coefficients (N, …), or diagonals (N, R). The mean of updates is in them."""
        operator, middles = self.operator, coefficients.double()
        if operator.table is not None:
            middles = torch.tensordot(middles, operator.table.double(), 1)
        if operator.center is not None:
            middles = middles + operator.center.double()
        return middles.mT if self.transposed and middles.ndim > 2 else middles

    def _with_base(self, numbers: Tensor) -> Tensor:
        """Return numbers with those of the base before them: zeros."""
        placed = self._placed(numbers)
        return torch.cat([placed.new_zeros(1, *placed.shape[1:]), placed])

    def _placed(self, part: Tensor) -> Tensor:
        return part.to(self.device, self.dtype).contiguous()


def form_of(basis: LayerBasis, transposed: bool, dtype: torch.dtype, device: torch.device) -> LayerForm:
    """Read a fitted layer's basis into memory."""
    return LayerForm(basis.operator(), transposed, dtype, device)


def factored(matrices_NPQ: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return matrices as left (N, P, R) times right (N, R, Q) if they all have this rank, up to `EXACT`.

    The range of random combinations of the columns is the whole range of a matrix of this rank (Halko et al. 2011). Cost
    N·P·Q·R, instead of N SVDs.
    """
    generator = torch.Generator().manual_seed(0)
    drawn_QR = torch.randn(matrices_NPQ.shape[2], rank, generator=generator, dtype=torch.float64)
    left: Tensor = torch.linalg.qr(matrices_NPQ.double() @ drawn_QR)[0]
    right = left.mT @ matrices_NPQ.double()
    lost = torch.linalg.matrix_norm(matrices_NPQ.double() - left @ right)
    if bool((lost > EXACT * torch.linalg.matrix_norm(matrices_NPQ.double())).any()):
        return None
    return left, right
