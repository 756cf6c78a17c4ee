"""One layer across all models, read in blocks.

Legend: N models, D values of the flattened layer, O outputs, I inputs, R one update's rank, P ranks of a tile's updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from eigenzoo.errors import DataError
from eigenzoo.formats.model import Model
from eigenzoo.formats.rows import RowReader, read_factors
from eigenzoo.linalg import kernels
from eigenzoo.linalg.update_tiles import Tile
from eigenzoo.passes.buffers import borrow
from eigenzoo.passes.resources import SPAN_BYTES
from eigenzoo.records import Layer
from eigenzoo.zoo.layers import LayerSource

BLOCK_BYTES = 64 * 2**20
"""Bytes of one block where nothing else bounds it: large enough for long reads, small enough to stay off the peak."""

EXACT_VALUES = 2**20
"""Stacks of at most this many values are read as float64: there the exact product costs a few milliseconds."""


@dataclass(frozen=True)
class Block:
    """Values start:stop of the flattened layer of all models, rows (N, stop − start); the caller may overwrite them."""

    start: int
    stop: int
    rows: Tensor


class DenseStack:
    """A layer of full weights (or of LoRA factors) across all models, minus a base where one is given.

    Attributes:
        layer, names: what it is, and of which models.
        precision: `high` reads float64, else float32 unless the files hold float64 or the stack is small.
        dtype: what rows are read as.
    """

    def __init__(
        self,
        layer: Layer,
        models: Sequence[Model],
        names: Sequence[str],
        sources: Sequence[LayerSource],
        base: Model | None,
        precision: str = "default",
    ) -> None:
        self.layer, self.names, self.precision = layer, tuple(names), precision
        self._models, self._sources, self._base = tuple(models), tuple(sources), base
        small = len(models) * layer.num_values <= EXACT_VALUES
        self.dtype = torch.float64 if small or precision == "high" or layer.dtype == "float64" else torch.float32

    @cached_property
    def _reader(self) -> RowReader:
        return RowReader(self._models, [source.key for source in self._sources])

    @cached_property
    def _scales(self) -> Tensor | None:
        """Return the factors of rows (N, 1), or None if all are one."""
        scales = [source.scale for source in self._sources]
        if scales.count(1.0) == len(scales):
            return None
        return torch.tensor(scales, dtype=torch.float64).to(self.dtype)[:, None]

    def __len__(self) -> int:
        return len(self._models)

    def subset(self, indices: Sequence[int]) -> DenseStack:
        """Return the same layer of some of the models."""
        chosen = [self._models[index] for index in indices], [self.names[index] for index in indices]
        sources = [self._sources[index] for index in indices]
        precision = "high" if self.dtype == torch.float64 else self.precision
        return DenseStack(self.layer, *chosen, sources, self._base, precision)

    @property
    def num_bytes(self) -> int:
        """Bytes of all models' rows."""
        return len(self) * self.layer.num_values * self.dtype.itemsize

    def spans(self) -> list[tuple[int, int]]:
        """Cut the flattened layer into runs of whole output rows of at most `SPAN_BYTES` (one row at least)."""
        return self._cut(SPAN_BYTES)

    def _cut(self, num_bytes: int) -> list[tuple[int, int]]:
        outputs, inputs = self.layer.shape
        rows = max(1, min(outputs, num_bytes // (len(self) * inputs * self.dtype.itemsize)))
        return [(first * inputs, min(first + rows, outputs) * inputs) for first in range(0, outputs, rows)]

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """Read the stack in blocks of whole output rows with the rows of all models; one buffer, reused.

        Raises DataError, naming the model, for NaN and Inf.
        """
        runs = self._cut(block_bytes)
        with borrow(len(self), max(stop - start for start, stop in runs), self.dtype) as buffer:
            for start, stop in runs:
                rows = buffer.view(-1)[: len(self) * (stop - start)].view(len(self), stop - start)
                self.read(start, stop, rows)
                if not torch.isfinite(rows.sum()):
                    self.check_finite(start, stop)
                yield Block(start, stop, rows)

    def read(self, start: int, stop: int, rows: Tensor) -> None:
        """Fill `rows` (N, stop − start), contiguous, with values of all models, unchecked."""
        self._reader.read(start, stop, rows)
        if self._scales is not None:
            kernels.scale(rows, self._scales)
        if self._base is not None:
            kernels.subtract(rows, self._base_values(start, stop))

    def matrix(self, index: int) -> Tensor:
        """Read one model's whole layer as an (O, I) matrix."""
        values = torch.empty(self.layer.num_values, dtype=self.dtype)
        source = self._sources[index]
        self._models[index].read_flat(source.key, 0, values.numel(), out=values)
        if source.scale != 1.0:
            values.mul_(source.scale)
        if self._base is not None:
            values -= self._base_values(0, values.numel())
        if not torch.isfinite(values.sum()):
            self._check_base(0, values.numel())
            self._check_row(values, self.names[index])
        return values.view(self.layer.shape)

    def _base_values(self, start: int, stop: int) -> Tensor:
        assert self._base is not None
        return self._base.read_flat(self.layer.name, start, stop, out=torch.empty(stop - start, dtype=self.dtype))

    def check_finite(self, start: int, stop: int) -> None:
        """Read values anew and raise DataError for the base or the first model with NaN or Inf; nothing where all are finite."""
        self._check_base(start, stop)
        with borrow(len(self), stop - start, self.dtype) as rows:
            self.read(start, stop, rows)
            for row, name in zip(rows, self.names, strict=True):
                self._check_row(row, name)

    def _check_base(self, start: int, stop: int) -> None:
        if self._base is not None:
            self._check_row(self._base_values(start, stop), "the base")

    def _check_row(self, row: Tensor, owner: str) -> None:
        bad = int((~torch.isfinite(row)).sum())
        if bad:
            raise _not_finite(owner, self.layer.name, bad)


class UpdateStack:
    """A LoRA update across all models, as factors with the scale in B.

    Attributes:
        layer, names: what it is, and of which models.
        precision: as of a `DenseStack`.
        ranks: rank of each model's update, from the headers.
        dtype: what products of factors run in; `factors` gives float64 whatever it is.
    """

    def __init__(
        self,
        layer: Layer,
        models: Sequence[Model],
        names: Sequence[str],
        sources: Sequence[LayerSource],
        precision: str = "default",
    ) -> None:
        self.layer, self.names, self.precision = layer, tuple(names), precision
        self._models, self._sources = tuple(models), tuple(sources)
        self.ranks = tuple(model.updates[source.key].rank for model, source in zip(models, sources, strict=True))
        small = sum(self.ranks) * sum(layer.shape) <= EXACT_VALUES
        self.dtype = torch.float64 if small or precision == "high" or layer.dtype == "float64" else torch.float32

    def __len__(self) -> int:
        return len(self._models)

    def subset(self, indices: Sequence[int]) -> UpdateStack:
        """Return the same layer of some of the models."""
        chosen = [self._models[index] for index in indices], [self.names[index] for index in indices]
        precision = "high" if self.dtype == torch.float64 else self.precision
        return UpdateStack(self.layer, *chosen, [self._sources[index] for index in indices], precision)

    def stored_factors(self, index: int) -> tuple[Tensor, Tensor, float]:
        """Read one model's factors as they are stored: B (O, R), A (R, I), and the scale that is not in them."""
        source = self._sources[index]
        b_OR, a_RI = self._models[index].read_factors(source.key)
        for factor in (b_OR, a_RI):
            bad = int((~torch.isfinite(factor)).sum())
            if bad:
                raise _not_finite(self.names[index], self.layer.name, bad)
        return b_OR, a_RI, source.scale

    def tile(self, indices: Sequence[int], b_OP: Tensor, a_PI: Tensor) -> Tile:
        """Read the factors of some models side by side into memory that is given, the scale in B; unchecked."""
        ranks = tuple(self.ranks[index] for index in indices)
        first = 0
        chosen = [self._sources[index] for index in indices]
        models = [self._models[index] for index in indices]
        factors = read_factors(models, [source.key for source in chosen])
        for rank, source, (b_OR, a_RI) in zip(ranks, chosen, factors, strict=True):
            run = slice(first, first + rank)
            if b_OR.dtype == b_OP.dtype:
                np.multiply(b_OR.numpy(), b_OR.numpy().dtype.type(source.scale), out=b_OP[:, run].numpy())
            else:
                b_OP[:, run].copy_(b_OR).mul_(source.scale)
            a_PI[run].copy_(a_RI)
            first += rank
        return Tile(b_OP, a_PI, ranks)

    def check_finite(self) -> None:
        """Read all factors anew and raise DataError for the first with NaN or Inf; nothing where all are finite."""
        for index in range(len(self)):
            self.stored_factors(index)

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one model's factors in float64 with the scale in B."""
        b_OR, a_RI, scale = self.stored_factors(index)
        return b_OR.double().mul_(scale), a_RI.double()


Stack = DenseStack | UpdateStack


def _not_finite(model: str, layer: str, bad: int) -> DataError:
    return DataError(
        f"{bad} values are NaN or Inf",
        where=f"layer '{layer}' of {model}",
        rule="a subspace is fitted only to finite weights",
        next_step="leave the model out, or --exclude the layer so that it is carried unchanged",
    )
