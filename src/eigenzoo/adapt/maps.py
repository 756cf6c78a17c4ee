"""Map coefficients to a weight: the linear map L of ΔW = M + L(c), as products of thin matrices.

    flat      L(c) = Σ c_k V_k                      one dense matrix of k whole-layer directions
    tucker    L(c) = U · C · Vᵀ                     x ↦ Vᵀx, then C, then U: as cheap as a LoRA of that rank; C = c, or Σ c_k D_k
    stacked   L(c) = B · diag(w) · A, w = Σ c_k w_k   x ↦ Ax, times w, then B: costs a LoRA with the sum of the zoo's ranks

Only the middle depends on the coefficients, so a backward pass keeps the small activations between the sides, and not the layer's
inputs.

Legend: O outputs, I inputs, K coefficients, P and Q the sizes of the middle, R ranks of all updates of a zoo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eigenzoo.adapt.trained import Coefficients, KeepsDtype, without_autocast
from eigenzoo.subspace.bases.basis import LayerBasis

Chain = list[Tensor]
"""Matrices from the inputs' side to the outputs'. A vector is a diagonal. Their product is (O, I)."""

Stages = list[list[Chain]]
"""ΔW = … · (sum of the second stage's chains) · (sum of the first stage's chains)."""


class Map(nn.Module):
    """The map from one layer's coefficients to a matrix (O, I), with the tensors of `LayerBasis.operator`, for every form.

    The tensors are buffers outside the state dict, because they are read from the bundle.

    Attributes:
        shape: (O, I).
        dtype: dtype of the tensors as they were read.
        transposed: whether `chains` gives the transposed products, as Conv1D's and embeddings' weights need them.
        before, after, table, center, offset: see `bases.basis.Operator`.
    """

    before: Tensor | None
    after: Tensor | None
    table: Tensor | None
    center: Tensor | None
    offset: Tensor | None

    def __init__(self, basis: LayerBasis, dtype: torch.dtype, *, transposed: bool = False) -> None:
        super().__init__()
        self.shape, self.dtype, self.transposed = basis.layer.shape, dtype, transposed
        for name, part in vars(basis.operator()).items():
            self.register_buffer(name, None if part is None else part.to(dtype), persistent=False)

    @property
    def is_dense(self) -> bool:
        """Whether L(c) is one matrix, which takes the memory of the layer itself."""
        return self.before is None and self.after is None

    @property
    def core_shape(self) -> tuple[int, int]:
        """(P, Q), the shape of the middle; (R, R) for a diagonal."""
        outputs, inputs = self.shape
        return (
            outputs if self.after is None else self.after.shape[1],
            inputs if self.before is None else self.before.shape[0],
        )

    @property
    def is_diagonal(self) -> bool:
        """Whether the middle is a diagonal: weights over the factors of all updates of the zoo."""
        return self.table is not None and self.table.ndim == 2

    def matrix(self, coefficients: Tensor) -> Tensor:
        """Return L(c) as a matrix (O, I). It is linear and differentiable in c."""
        return self._expanded(self._middle(coefficients, False))

    def mean(self) -> Tensor:
        """Return M as a matrix (O, I)."""
        if self.center is not None:
            return self._expanded(self.center)
        assert self.offset is not None
        return self.offset.expand(self.shape)

    def factors(self, coefficients: Tensor, mean: bool) -> tuple[Tensor, Tensor] | None:
        """Return M + L(c) or L(c), as a product of (O, ·) and (·, I) matrices if that is cheaper than the matrix."""
        if self.before is None or (mean and self.center is None):
            return None
        return self._left(self._middle(coefficients, mean)), self.before

    def chains(self, coefficients: Tensor, mean: bool) -> list[Chain]:
        """Return M + L(c) or L(c) as a sum of products. Only the middle between `before` and `after` is computed."""
        with without_autocast(coefficients.device):
            middle = self._middle(coefficients, mean)
        chain = [part for part in (self.before, middle, self.after) if part is not None]
        chains = [chain]
        if mean and self.offset is not None:
            chains = [[chain[0] + self.offset.to(chain[0])]] if len(chain) == 1 else [chain, [self.offset]]
        return [_transposed(chain) for chain in chains] if self.transposed else chains

    def randomize(self, generator: torch.Generator) -> None:
        """Replace the zoo's tensors by random ones of the same sizes, as a control. The mean is kept as a matrix.

        Sides and directions are orthonormal. Factors of updates have the norms of the zoo's, and their table is kept, so that
        directions are sums of as many random updates.
        """
        if self.center is not None:
            self.offset, self.center = self.mean().clone(), None
        for name in ("after", "before"):
            side: Tensor | None = getattr(self, name)
            if side is not None and self.is_diagonal:
                drawn = torch.randn(side.shape, generator=generator).to(side)
                setattr(self, name, drawn * (side.norm() / drawn.norm()))
            elif side is not None and name == "after":
                self.after = _orthonormal(side.T, generator).T.contiguous()
            elif side is not None:
                self.before = _orthonormal(side, generator).T.contiguous().T
        if self.table is not None and not self.is_diagonal:
            self.table = _orthonormal(self.table.flatten(1), generator).view_as(self.table)

    def cast(self, device: torch.device, dtype: torch.dtype) -> Map:
        """Move to a device, and convert tensors as large as the layer's sides to a dtype. Middles stay float32."""
        for name, part in self.named_buffers():
            is_large = name in ("before", "after", "offset") or (name == "table" and self.is_dense)
            setattr(self, name, part.to(device, dtype if is_large else torch.promote_types(dtype, torch.float32)))
        return self

    def contiguous(self) -> Map:
        """Make the rows of `before` contiguous, like kernels of a convolution."""
        self.before = None if self.before is None else self.before.contiguous()
        return self

    def _middle(self, coefficients: Tensor, mean: bool) -> Tensor:
        middle = coefficients
        if self.table is not None:
            table = self.table if self.is_dense else self.table.to(coefficients.dtype)
            middle = torch.tensordot(coefficients.to(table.dtype), table, 1)
        return middle + self.center.to(middle.dtype) if mean and self.center is not None else middle

    def _left(self, middle: Tensor) -> Tensor:
        if self.after is None:
            return middle
        return self.after * middle if self.is_diagonal else self.after @ middle

    def _expanded(self, middle: Tensor) -> Tensor:
        left = self._left(middle)
        return left if self.before is None else left @ self.before


def _orthonormal(rows_KD: Tensor, generator: torch.Generator) -> Tensor:
    """Draw orthonormal rows of the same number."""
    drawn_DK = torch.randn(rows_KD.shape[::-1], generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(drawn_DK)[0].T.contiguous()
    return rows.to(rows_KD)


def map_of(basis: LayerBasis, dtype: torch.dtype = torch.float32) -> Map:
    """Read a fitted layer's map into memory in this dtype."""
    return Map(basis, dtype)


def freeze(
    basis: LayerBasis, *, transposed: bool = False, seed: int | None = None, dtype: torch.dtype = torch.float32
) -> Map:
    """Return the map of a fitted layer that is added to a weight, with random directions if a seed is given.

    A mean that is not a middle is left out, because it takes as much memory as the layer. `dense_mean` returns it.
    """
    layer = Map(basis, dtype, transposed=transposed)
    if seed is not None:
        with without_autocast(torch.device("cpu")):
            layer.randomize(torch.Generator().manual_seed(seed))
    layer.offset = None
    return layer


def dense_mean(basis: LayerBasis, *, is_random: bool) -> Tensor | None:
    """Return the zoo's mean (O, I) in float64 if the middle does not include it."""
    if basis.layer.kind != "update":
        return basis.removed().expand(basis.layer.shape)
    return map_of(basis, torch.float64).mean() if is_random else None


def follow(stages: Stages, values: Tensor, first: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply stages to a layer's inputs. The last dimension of the result is outputs.

    Args:
        first: function that applies the first matrix of a chain to the inputs: a linear layer, a convolution, a lookup.
    """
    for number, chains in enumerate(stages):
        begin = first if number == 0 else apply
        results = [
            reduce(lambda product, part: apply(part, product), chain[1:], begin(chain[0], values)) for chain in chains
        ]
        values = reduce(torch.add, results)
    return values


def apply(part: Tensor, values: Tensor) -> Tensor:
    """Return values (…, I) times a matrix (O, I) or a diagonal, in the values' dtype."""
    part = part.to(values.dtype)
    return linear(values, part) if part.ndim == 2 else values * part


def dense(stages: Stages, dtype: torch.dtype) -> Tensor:
    """Return ΔW (O, I), computed in a dtype."""
    sums = [reduce(torch.add, [_product(chain, dtype) for chain in chains]) for chains in stages]
    return reduce(lambda product, matrix: matrix @ product, sums)


def sides(stages: Stages) -> tuple[Tensor, Tensor]:
    """Return ΔW as left (O, P) times right (P, I), in float64."""
    if len(stages) > 1:
        return dense(stages[1:], torch.float64), dense(stages[:1], torch.float64)
    lefts, rights = zip(*(_split(chain) for chain in stages[0]), strict=True)
    return torch.cat(lefts, 1), torch.cat(rights, 0)


def _transposed(chain: Chain) -> Chain:
    return [part.T if part.ndim == 2 else part for part in reversed(chain)]


def _split(chain: Chain) -> tuple[Tensor, Tensor]:
    first = chain[0].double()
    if len(chain) > 1:
        return _product(chain[1:], torch.float64), first
    outputs, inputs = first.shape
    if outputs > inputs:
        return first, torch.eye(inputs, dtype=torch.float64, device=first.device)
    return torch.eye(outputs, dtype=torch.float64, device=first.device), first


def _product(chain: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    product: Tensor | None = None
    for part in chain:
        part = part.to(dtype)
        if product is None:
            product = part if part.ndim == 2 else torch.diag(part)
        else:
            product = part @ product if part.ndim == 2 else part[:, None] * product
    assert product is not None
    return product


class AdaptedWeight(KeepsDtype):
    """The parametrization of one weight: W = (W₀ or nothing) + (M or nothing) + L(c), in the map's dtype on any device.

    A running variance is kept above zero, as in rebuilt models. Buffers, such as the statistics of a batch norm, follow their
    coefficients, but do not give them gradients, because torch has none for buffers.

    Attributes:
        layer, trained: the map L, and c.
        besides: other parameters that the same attach trains. No other attach may freeze them.
    """

    def __init__(
        self,
        layer: Map,
        trained: Coefficients,
        besides: tuple[nn.Parameter, ...],
        *,
        mean: bool,
        on_top: bool,
        above_zero: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.trained, self.besides, self._mean, self._on_top = layer, trained, besides, mean, on_top
        self._above_zero = above_zero

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight for the module, in the dtype of the original weight."""
        with without_autocast(weight.device):
            matrix = self.layer.matrix(self.trained().to(self.layer.dtype))
            if self._mean:
                matrix = matrix + self.layer.mean()
        made = matrix.reshape(weight.shape)
        made = weight + made if self._on_top else made
        if self._above_zero:
            made = made.clamp_min(torch.finfo(torch.float32).tiny)
        return (made if isinstance(weight, nn.Parameter) else made.detach()).to(weight.dtype)
