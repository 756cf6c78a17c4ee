"""One layer's updates as a method of merging sees them.

Legend: T models, P rows and Q columns of the space that the updates are in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from eigenzoo.linalg.selection import thresholds


@dataclass(frozen=True)
class Combination:
    """The merged update is Σ c_t X_t, in whatever form the updates have. `coefficients_T` is (T,) float64."""

    coefficients_T: Tensor


@dataclass(frozen=True)
class RowWise:
    """The merged update is computed from some rows of all updates at a time: `apply` maps (T, p, Q) to (p, Q).

    Rows arrive in their order, once.
    """

    apply: Callable[[Tensor], Tensor]


class LayerUpdates(ABC):
    """One layer's updates.

    Attributes:
        name: of the layer.
        models: the models' names.
        weights_T: (T,) float64.
        ranks: each update's rank; that of a full weight is its smaller side.
        gram_TT: inner products of the updates, float64.
    """

    def __init__(
        self,
        name: str,
        models: Sequence[str],
        weights_T: Tensor,
        ranks: Sequence[int],
        seed: int,
        model_thresholds_T: Tensor | None,
    ) -> None:
        self.name, self.models, self.weights_T, self.ranks = name, tuple(models), weights_T, tuple(ranks)
        self._seed, self._model_thresholds_T = seed, model_thresholds_T

    @property
    @abstractmethod
    def gram_TT(self) -> Tensor:
        """Return the updates' inner products, (T, T) float64."""

    @abstractmethod
    def whole(self) -> Tensor:
        """Return the updates in their space, (T, P, Q) float64."""

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """Yield the updates' rows in their order, (T, p, Q) float64, a few at a time."""

    def thresholds(self, share: float) -> Tensor:
        """Return for each model the least absolute value among the largest `share` of its values, (T,) float64.

        They are those of the whole model if the method asked for that (`Method.over_model`), and of this layer otherwise.
        """
        if self._model_thresholds_T is not None:
            return self._model_thresholds_T
        return thresholds(lambda: (block.flatten(1) for block in self.blocks()), share)

    def generator(self, model: str) -> torch.Generator:
        """Return random numbers that depend on the seed, the layer and the model, and not on the order of models."""
        name = f"{self._seed}\0{self.name}\0{model}".encode()
        return torch.Generator().manual_seed(crc32(name) | crc32(name[::-1]) << 32)


class UpdatesInMemory(LayerUpdates):
    """Updates that are small enough to be held: cores, or whole matrices of one layer."""

    def __init__(
        self,
        name: str,
        models: Sequence[str],
        weights_T: Tensor,
        ranks: Sequence[int],
        seed: int,
        model_thresholds_T: Tensor | None,
        values_TPQ: Tensor,
    ) -> None:
        super().__init__(name, models, weights_T, ranks, seed, model_thresholds_T)
        self._values_TPQ = values_TPQ

    @property
    def gram_TT(self) -> Tensor:
        """Return the updates' inner products, (T, T) float64."""
        flat = self._values_TPQ.flatten(1)
        return flat @ flat.T

    def whole(self) -> Tensor:
        """Return the updates in their space, (T, P, Q) float64."""
        return self._values_TPQ

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows at once."""
        yield self._values_TPQ
