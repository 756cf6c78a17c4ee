"""One layer's updates as a method of merging sees them.

Legend: T models, O outputs, I inputs, P rows and Q columns of the space that the updates are in, R one update's rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.linalg.core_frame import truncate
from eigenzoo.linalg.lora import Factors, inner_products
from eigenzoo.linalg.selection import least_of_largest


@dataclass(frozen=True)
class Combination:
    """The merged update is Σ c_t X_t, in whatever form the updates have. `coefficients_T` is (T,) float64."""

    coefficients_T: Tensor


@dataclass(frozen=True)
class Product:
    """The merged update as two factors outside of the updates' space, (O, S) and (S, I)."""

    left_OS: Tensor
    right_SI: Tensor


@dataclass(frozen=True)
class RowWise:
    """The merged update is computed from some rows of all updates at a time: `apply` maps (T, p, Q) to (p, Q).

    Rows arrive in their order, once.
    """

    apply: Callable[[Tensor], Tensor]


class SingularParts(NamedTuple):
    """One update's singular vectors U (P, R) and Vᵀ (R, Q), and its singular values (R,) above round-off."""

    left: Tensor
    values: Tensor
    right: Tensor


@dataclass(frozen=True)
class Context:
    """The model and the merge that a layer's updates belong to.

    Attributes:
        layer: the layer's name.
        models: the models' names.
        weights_T: (T,) float64.
        seed: of random masks.
        thresholds_T: the least absolute values that each model keeps, where the method trims over the whole model.
        majority: the sign of most elected entries of the whole model, which decides where a sum is exactly zero; 0 for no decision.
        input_grams: for method regmean, second moments (I, I) of the layer's inputs, by model.
    """

    layer: str
    models: tuple[str, ...]
    weights_T: Tensor
    seed: int = 0
    thresholds_T: Tensor | None = None
    majority: float = 0.0
    input_grams: Mapping[str, Tensor] = field(default_factory=dict)

    def generators(self) -> list[torch.Generator]:
        """Return random numbers for each model that depend on the seed, the layer and the model, and not on the models' order."""
        return [_generator(f"{self.seed}\0{self.layer}\0{model}") for model in self.models]


class LayerUpdates(ABC):
    """One layer's updates X_t in a space; `context` says what they belong to."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def weights_T(self) -> Tensor:
        """The models' weights, (T,) float64."""
        return self.context.weights_T

    @property
    def num_models(self) -> int:
        """T."""
        return len(self.context.models)

    @property
    @abstractmethod
    def num_values(self) -> int:
        """P·Q."""

    @property
    @abstractmethod
    def gram_TT(self) -> Tensor:
        """The updates' inner products, (T, T) float64."""

    @abstractmethod
    def whole(self) -> Tensor:
        """Return the updates, (T, P, Q) float64."""

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """Yield the updates' rows in their order, (T, p, Q) float64, some at a time."""

    @abstractmethod
    def matrices(self) -> Iterator[Tensor]:
        """Yield the updates one by one, (P, Q) float64."""

    def combined(self, coefficients_T: Tensor) -> Tensor:
        """Return Σ c_t X_t, (P, Q)."""
        weights = coefficients_T[:, None, None]
        return torch.cat([(block * weights).sum(0) for block in self.blocks()])

    def singular_parts(self) -> Iterator[SingularParts]:
        """Yield each update's singular vectors and values."""
        for matrix in self.matrices():
            yield _parts((torch.eye(matrix.shape[0], dtype=matrix.dtype), matrix))

    def factors(self) -> Sequence[Factors] | None:
        """Return the updates as B and A, in the space of the layer itself; None for full weights."""
        return None

    def each(self, value: float | Sequence[float]) -> list[float]:
        """Return an option for each model: one number stands for all."""
        if isinstance(value, int | float):
            return [float(value)] * self.num_models
        if len(value) != self.num_models:
            raise UsageError(f"{len(value)} values for {self.num_models} models", where=f"layer '{self.context.layer}'")
        return [float(each) for each in value]

    def thresholds(self, keep: float | Sequence[float], at_least: int = 0) -> Tensor:
        """Return for each model the least absolute value among the largest `keep` of its values, (T,) float64.

        They are those of the whole model if the method asked for that (`Method.over_model`), and of this layer otherwise; then at
        least `at_least` values of a share above zero are kept.
        """
        if self.context.thresholds_T is not None:
            return self.context.thresholds_T
        shares = self.each(keep)
        return self.largest([max(int(share * self.num_values), at_least if share > 0 else 0) for share in shares])

    def largest(self, counts: Sequence[int]) -> Tensor:
        """Return for each model the least absolute value among its `counts[t]` largest, (T,) float64; infinite for none."""
        return least_of_largest(lambda: (block.flatten(1) for block in self.blocks()), counts)


def values_of(result: Combination | Tensor | RowWise, layer: LayerUpdates) -> Tensor:
    """Return the merged update in the space of the updates, (P, Q)."""
    if isinstance(result, Combination):
        return layer.combined(result.coefficients_T)
    if isinstance(result, RowWise):
        return torch.cat([result.apply(block) for block in layer.blocks()])
    return result


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:8]) >> 1)


class UpdatesInMemory(LayerUpdates):
    """Updates that are small enough to be held: cores, or whole matrices of one layer.

    They are given as two factors each, (P, R) and (R, Q), or as matrices (T, P, Q).
    """

    def __init__(
        self,
        context: Context,
        *,
        halves: Sequence[Factors] | None = None,
        values_TPQ: Tensor | None = None,
        factors: Sequence[Factors] | None = None,
    ) -> None:
        super().__init__(context)
        self._halves, self._values_TPQ, self._factors = halves, values_TPQ, factors

    @cached_property
    def _whole(self) -> Tensor:
        if self._values_TPQ is not None:
            return self._values_TPQ
        assert self._halves is not None
        return torch.stack([left @ right for left, right in self._halves])

    @property
    def num_values(self) -> int:
        """P·Q."""
        if self._halves is not None:
            return self._halves[0][0].shape[0] * self._halves[0][1].shape[1]
        return self._whole[0].numel()

    @cached_property
    def gram_TT(self) -> Tensor:
        """The updates' inner products, (T, T) float64."""
        if self._halves is not None:
            return inner_products(self._halves, self._halves)
        flat = self._whole.flatten(1)
        return flat @ flat.T

    def whole(self) -> Tensor:
        """Return the updates, (T, P, Q) float64."""
        return self._whole

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows at once."""
        yield self._whole

    def matrices(self) -> Iterator[Tensor]:
        """Yield the updates one by one, (P, Q) float64."""
        if self._halves is None:
            yield from self._whole
        else:
            yield from (left @ right for left, right in self._halves)

    def singular_parts(self) -> Iterator[SingularParts]:
        """Yield each update's singular vectors and values. Cost (P + Q)·R² a model if they are given as two factors."""
        return super().singular_parts() if self._halves is None else map(_parts, self._halves)

    def factors(self) -> Sequence[Factors] | None:
        """Return the updates as B and A, in the space of the layer itself; None for full weights."""
        return self._factors


def _parts(factors: Factors) -> SingularParts:
    (left, right), values = truncate(*factors)
    root = values.sqrt()
    if not values.numel():
        return SingularParts(left[:, :0], values, right[:0])
    return SingularParts(left / root, values, right / root[:, None])


class UpdatesInRows(LayerUpdates):
    """Adapters' updates in the full space, multiplied out some rows at a time."""

    def __init__(self, context: Context, factors: Sequence[Factors], block_bytes: int) -> None:
        super().__init__(context)
        self._factors = factors
        rows = block_bytes // (8 * len(factors) * factors[0][1].shape[1])
        self._rows = max(1, min(rows, factors[0][0].shape[0]))

    @property
    def num_values(self) -> int:
        """P·Q."""
        return self._factors[0][0].shape[0] * self.num_inputs

    @property
    def num_inputs(self) -> int:
        """Q, which is I."""
        return self._factors[0][1].shape[1]

    @cached_property
    def gram_TT(self) -> Tensor:
        """The updates' inner products, (T, T) float64."""
        return inner_products(self._factors, self._factors)

    def whole(self) -> Tensor:
        """Return the updates, (T, P, Q) float64."""
        return torch.cat(list(self.blocks()), 1)

    def blocks(self) -> Iterator[Tensor]:
        """Yield the updates' rows in their order, (T, p, Q) float64, some at a time."""
        outputs = self._factors[0][0].shape[0]
        for start in range(0, outputs, self._rows):
            yield torch.stack([b[start : start + self._rows] @ a for b, a in self._factors])

    def matrices(self) -> Iterator[Tensor]:
        """Yield the updates one by one, (P, Q) float64."""
        yield from (b @ a for b, a in self._factors)

    def singular_parts(self) -> Iterator[SingularParts]:
        """Yield each update's singular vectors and values."""
        return map(_parts, self._factors)

    def factors(self) -> Sequence[Factors]:
        """Return the updates as B and A."""
        return self._factors
