"""One layer across all models, read in blocks.

Legend: N models, D values of the flattened layer, O outputs, I inputs, R one update's rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.errors import DataError
from eigenzoo.formats.model import Model
from eigenzoo.records import Layer
from eigenzoo.zoo.layers import LayerSource

BLOCK_BYTES = 64 * 2**20
"""Bytes of one block: large enough for the product to run at its full rate, small enough to stay off the peak."""

EXACT_VALUES = 2**24
"""Stacks of at most this many values are read as float64: there the exact product costs under 0.1 s."""


@dataclass(frozen=True)
class Block:
    """Values start:stop of the flattened layer of all models, rows (N, stop − start); the caller may overwrite them."""

    start: int
    stop: int
    rows: Tensor


class DenseStack:
    """A layer of full weights (or of LoRA factors) across all models, minus a base where one is given."""

    def __init__(
        self,
        layer: Layer,
        models: Sequence[Model],
        names: Sequence[str],
        sources: Sequence[LayerSource],
        base: Model | None,
        exact: bool = False,
    ) -> None:
        self.layer, self.names = layer, tuple(names)
        self._models, self._sources, self._base = tuple(models), tuple(sources), base
        small = len(models) * layer.num_values <= EXACT_VALUES
        self.dtype = torch.float64 if small or exact or layer.dtype == "float64" else torch.float32

    def __len__(self) -> int:
        return len(self._models)

    def subset(self, places: Sequence[int]) -> DenseStack:
        """Return the same layer of some of the models."""
        chosen = [self._models[place] for place in places], [self.names[place] for place in places]
        sources = [self._sources[place] for place in places]
        return DenseStack(self.layer, *chosen, sources, self._base, self.dtype == torch.float64)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """Read the stack in blocks of whole output rows with the rows of all models; one buffer, reused.

        Raises DataError, naming the model, for NaN and Inf.
        """
        outputs, inputs = self.layer.shape
        rows_per_block = max(1, min(outputs, block_bytes // (len(self) * inputs * self.dtype.itemsize)))
        buffer = torch.empty(len(self) * rows_per_block * inputs, dtype=self.dtype)
        offset = torch.empty(rows_per_block * inputs, dtype=self.dtype) if self._base is not None else None
        for first in range(0, outputs, rows_per_block):
            start, stop = first * inputs, min(first + rows_per_block, outputs) * inputs
            rows = buffer[: len(self) * (stop - start)].view(len(self), stop - start)
            for row, model, source in zip(rows, self._models, self._sources, strict=True):
                model.read_flat(source.key, start, stop, out=row)
                if source.scale != 1.0:
                    row.mul_(source.scale)
            if self._base is not None and offset is not None:
                rows -= self._base.read_flat(self.layer.name, start, stop, out=offset[: stop - start])
            self._check_finite(rows)
            yield Block(start, stop, rows)

    def matrix(self, place: int) -> Tensor:
        """Read one model's whole layer as an (O, I) matrix."""
        rows = torch.empty(self.layer.num_values, dtype=self.dtype)
        source = self._sources[place]
        self._models[place].read_flat(source.key, 0, rows.numel(), out=rows)
        if source.scale != 1.0:
            rows.mul_(source.scale)
        if self._base is not None:
            rows -= self._base.read_flat(self.layer.name, 0, rows.numel(), out=torch.empty_like(rows))
        self._check_finite(rows[None], place)
        return rows.view(self.layer.shape)

    def _check_finite(self, rows: Tensor, place: int = 0) -> None:
        # A sum is one pass and no copy; it is not finite if any value is not. Overflow of the sum itself is ruled out
        # by looking again at the values.
        if torch.isfinite(rows.sum()):
            return
        for number, row in enumerate(rows):
            bad = int((~torch.isfinite(row)).sum())
            if bad:
                raise _not_finite(self.names[place + number], self.layer.name, bad)


class UpdateStack:
    """A LoRA update across all models, as factors with the scale in B."""

    dtype = torch.float64

    def __init__(
        self, layer: Layer, models: Sequence[Model], names: Sequence[str], sources: Sequence[LayerSource]
    ) -> None:
        self.layer, self.names = layer, tuple(names)
        self._models, self._sources = tuple(models), tuple(sources)

    def __len__(self) -> int:
        return len(self._models)

    def subset(self, places: Sequence[int]) -> UpdateStack:
        """Return the same layer of some of the models."""
        chosen = [self._models[place] for place in places], [self.names[place] for place in places]
        return UpdateStack(self.layer, *chosen, [self._sources[place] for place in places])

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each model's update, from the headers."""
        return tuple(model.updates[source.key].rank for model, source in zip(self._models, self._sources, strict=True))

    def stored_factors(self, place: int) -> tuple[Tensor, Tensor, float]:
        """Read one model's factors as they are stored: B (O, R), A (R, I), and the scale that is not in them."""
        source = self._sources[place]
        b_OR, a_RI = self._models[place].read_factors(source.key)
        for factor in (b_OR, a_RI):
            bad = int((~torch.isfinite(factor)).sum())
            if bad:
                raise _not_finite(self.names[place], self.layer.name, bad)
        return b_OR, a_RI, source.scale

    def factors(self, place: int) -> tuple[Tensor, Tensor]:
        """Read one model's factors in float64 with the scale in B."""
        b_OR, a_RI, scale = self.stored_factors(place)
        return b_OR.double().mul_(scale), a_RI.double()


Stack = DenseStack | UpdateStack


def _not_finite(model: str, layer: str, bad: int) -> DataError:
    return DataError(
        f"{bad} values are NaN or Inf",
        where=f"layer '{layer}' of {model}",
        rule="a subspace is fitted to finite weights only",
        next_step="leave the model out, or --exclude the layer so that it is carried unchanged",
    )
