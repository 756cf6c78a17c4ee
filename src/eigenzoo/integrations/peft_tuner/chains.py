"""A layer's frozen basis as torch computes with it: ΔW as products of thin matrices, taken one after the other.

    flat      ΔW = Σ c_k V_k                      one dense matrix
    tucker    ΔW = U · C · Vᵀ                     x ↦ Vᵀx, then C, then U: as cheap as a LoRA of that rank
    stacked   ΔW = B · diag(w) · A                x ↦ Ax, times w, then B: as dear as a LoRA of all the zoo's ranks

Only the middle depends on what is trained, so a backward pass keeps what lies between A and B, and never the layer's inputs.

Legend: O outputs, I inputs, P and Q the sizes of the middle, K coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eigenzoo.adapt.maps import FlatMap, Map, StackedMap, TuckerMap, map_of
from eigenzoo.adapt.trained import without_autocast
from eigenzoo.subspace.bases.basis import LayerBasis

Chain = list[Tensor]
"""Matrices from the inputs' side to the outputs'; a vector is a diagonal. Their product is (O, I)."""

Stages = list[list[Chain]]
"""ΔW = … · (sum of the second stage's chains) · (sum of the first stage's chains)."""


class FrozenBasis(nn.Module):
    """One layer's basis, for all adapters that lie in it: buffers that no state dict holds.

    Attributes:
        before: (Q, I), or None for an inputs' side kept whole.
        after: (O, P), or None.
        table: what coefficients weigh (K, …), or None where they are the middle themselves.
        center: the zoo's mean as a middle; of updates alone.
        offset: what start `mean` adds besides, dense (O, I): M of a change, M − W₀ of a weight.
    """

    before: Tensor | None
    after: Tensor | None
    table: Tensor | None
    center: Tensor | None
    offset: Tensor | None

    def __init__(self, layer: Map, mean_inside: bool, *, transposed: bool = False) -> None:
        super().__init__()
        self.shape, self.transposed = layer.shape, transposed
        for name, part in _parts(layer, mean_inside).items():
            self.register_buffer(name, part, persistent=False)
        self.register_buffer("offset", None, persistent=False)

    @property
    def is_dense(self) -> bool:
        """Whether ΔW is one matrix, which takes the memory of the layer itself."""
        return self.before is None and self.after is None

    def cast(self, device: torch.device, dtype: torch.dtype) -> FrozenBasis:
        """Move to a device, and what is as large as the layer's sides to a dtype; middles stay float32."""
        for name, part in self.named_buffers():
            is_large = name in ("before", "after", "offset") or (name == "table" and self.is_dense)
            setattr(self, name, part.to(device, dtype if is_large else torch.promote_types(dtype, torch.float32)))
        return self

    def contiguous(self) -> FrozenBasis:
        """Lay `before` out row by row, as kernels of a convolution are."""
        self.before = None if self.before is None else self.before.contiguous()
        return self

    def chains(self, coefficients: Tensor, mean: bool) -> list[Chain]:
        """Return ΔW as a sum of products; only what is between `before` and `after` is computed."""
        with without_autocast(coefficients.device):
            middle = self._middle(coefficients, mean)
        chain = [part for part in (self.before, middle, self.after) if part is not None]
        found = [chain]
        if mean and self.offset is not None:
            found = [[chain[0] + self.offset.to(chain[0])]] if len(chain) == 1 else [chain, [self.offset]]
        return [transposed(chain) for chain in found] if self.transposed else found

    def _middle(self, coefficients: Tensor, mean: bool) -> Tensor:
        middle = coefficients
        if self.table is not None:
            table = self.table if self.is_dense else self.table.to(coefficients.dtype)
            middle = torch.tensordot(coefficients.to(table.dtype), table, 1)
        return middle + self.center.to(middle.dtype) if mean and self.center is not None else middle


def _parts(layer: Map, mean_inside: bool) -> dict[str, Tensor | None]:
    """Return the buffers of a map under the names that a chain has for them."""
    if isinstance(layer, FlatMap):
        return {"before": None, "after": None, "table": layer.directions, "center": None}
    if isinstance(layer, TuckerMap):
        before = None if layer.inputs is None else layer.inputs.T
        center = layer.center.expand(layer.core_shape) if mean_inside else None
        return {"before": before, "after": layer.outputs, "table": layer.shared, "center": center}
    assert isinstance(layer, StackedMap)
    return {
        "before": layer.factors_a,
        "after": layer.factors_b,
        "table": layer.weights[1:],
        "center": layer.weights[0] if mean_inside else None,
    }


def freeze(
    basis: LayerBasis, *, transposed: bool = False, seed: int | None = None, dtype: torch.dtype = torch.float32
) -> FrozenBasis:
    """Read a fitted layer's basis; with a seed, random directions in its place.

    Args:
        transposed: whether the layer's matrix is the transpose of (outputs, inputs), as Conv1D's and embeddings' weights are.
    """
    layer = map_of(basis, dtype)
    if seed is not None:
        with without_autocast(torch.device("cpu")):
            layer.randomize(torch.Generator().manual_seed(seed))
    return FrozenBasis(layer, basis.layer.kind == "update" and seed is None, transposed=transposed)


def dense_mean(basis: LayerBasis, *, is_random: bool) -> Tensor | None:
    """Return the zoo's mean (O, I) in float64 where it is no part of the middle."""
    if basis.layer.kind != "update":
        return basis.removed().expand(basis.layer.shape)
    return map_of(basis, torch.float64).mean() if is_random else None


def transposed(chain: Chain) -> Chain:
    """Return the chain of the transposed product."""
    return [part.T if part.ndim == 2 else part for part in reversed(chain)]


def follow(stages: Stages, values: Tensor, first: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return what stages make of a layer's inputs, last dimension outputs.

    Args:
        first: how the first matrix of a chain meets the inputs: a linear layer, a convolution, a lookup.
    """
    for number, chains in enumerate(stages):
        begin = first if number == 0 else apply
        results = [
            reduce(lambda found, part: apply(part, found), chain[1:], begin(chain[0], values)) for chain in chains
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
    return reduce(lambda found, matrix: matrix @ found, sums)


def sides(stages: Stages) -> tuple[Tensor, Tensor]:
    """Return ΔW as left (O, P) times right (P, I), in float64."""
    if len(stages) > 1:
        return dense(stages[1:], torch.float64), dense(stages[:1], torch.float64)
    lefts, rights = zip(*(_split(chain) for chain in stages[0]), strict=True)
    return torch.cat(lefts, 1), torch.cat(rights, 0)


def _split(chain: Chain) -> tuple[Tensor, Tensor]:
    first = chain[0].double()
    if len(chain) > 1:
        return _product(chain[1:], torch.float64), first
    outputs, inputs = first.shape
    if outputs > inputs:
        return first, torch.eye(inputs, dtype=torch.float64, device=first.device)
    return torch.eye(outputs, dtype=torch.float64, device=first.device), first


def _product(chain: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    found: Tensor | None = None
    for part in chain:
        part = part.to(dtype)
        if found is None:
            found = part if part.ndim == 2 else torch.diag(part)
        else:
            found = part @ found if part.ndim == 2 else part[:, None] * found
    assert found is not None
    return found
