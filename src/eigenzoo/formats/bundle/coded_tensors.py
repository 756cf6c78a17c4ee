"""Bases in eight or four bits: quantised as they are written, and read as float32 again.

A quantised part has its codes in `<layer>/<part>` and its scales in `<layer>/<part>.scale`; see docs/bundle-format.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from eigenzoo.errors import BundleError, DataError
from eigenzoo.formats.bundle.basis_files import BasisWriter
from eigenzoo.linalg.quantised import (
    BLOCK,
    INT8,
    LARGEST_CODE,
    SCALES,
    code_dtype,
    dequantise,
    num_blocks,
    num_codes,
    quantise,
)

CODED_PARTS = ("outputs", "inputs", "models", "factors_b", "factors_a")
"""Parts of a layer that are quantised. The mean is not: what rounding takes from it is lost by every model."""

SCALE = ".scale"


def is_coded(name: str) -> bool:
    """Tell whether a tensor of bases is quantised in a bundle whose bases are."""
    return name.rpartition("/")[2] in CODED_PARTS


def code_shape(shape: Sequence[int], coding: str) -> tuple[int, ...]:
    """Return the shape of the codes of a tensor: its own, or of nf4 the number of bytes."""
    return tuple(shape) if coding == INT8 else (num_codes(prod(shape), coding),)


class CodedWriter(BasisWriter):
    """Write bases quantised, one layer after the other."""

    def __init__(self, folder: Path, layers: Sequence[str], parts: int, coding: str, *, resume: bool = False) -> None:
        super().__init__(folder, layers, 2 * parts, resume=resume)
        self._coding = coding
        self._num_values: dict[str, int] = {}
        self._pieces: dict[tuple[str, int], tuple[Tensor, int]] = {}

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Make room for a tensor; of a quantised one for its codes and scales."""
        if not is_coded(name):
            super().begin(name, dtype, shape)
            return
        self._num_values[name] = prod(shape)
        super().begin(name, code_dtype(self._coding), code_shape(shape, self._coding))
        super().begin(name + SCALE, SCALES, (num_blocks(prod(shape)),))

    def write_flat(self, name: str, start: int, tensor: Tensor) -> None:
        """Write a run of a tensor; blocks that it holds a part of wait for the rest."""
        if name not in self._num_values:
            super().write_flat(name, start, tensor)
            return
        whole, stop = self._num_values[name], start + tensor.numel()
        first = min(start + (-start) % BLOCK, stop)
        last = stop if stop == whole else max(stop - stop % BLOCK, first)
        self._write_blocks(name, first, tensor[first - start : last - start])
        for begin, end in ((start, first), (last, stop)):
            if begin < end:
                self._gather(name, begin, tensor[begin - start : end - start])

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read back a run of what was written, as a reader will see it."""
        if name not in self._num_values:
            return super().read_flat(name, start, stop, out)
        values = read_run(super().read_flat, name, start, stop, self._num_values[name], self._coding)
        return values if out is None else out.copy_(values)

    def _gather(self, name: str, start: int, piece: Tensor) -> None:
        """Keep a part of a block, and write the block when it is complete."""
        block = start // BLOCK
        size = min(BLOCK, self._num_values[name] - block * BLOCK)
        values, filled = self._pieces.pop((name, block), (torch.zeros(size), 0))
        values[start - block * BLOCK :][: piece.numel()] = piece
        filled += piece.numel()
        if filled == size:
            self._write_blocks(name, block * BLOCK, values)
        else:
            self._pieces[name, block] = values, filled

    def _write_blocks(self, name: str, start: int, values: Tensor) -> None:
        codes, scales = quantise(values, self._coding)
        if not bool(torch.isfinite(scales).all()):
            raise DataError("values are NaN, Inf or beyond float32", where=f"tensor '{name}'", rule="bases are finite")
        super().write_flat(name, num_codes(start, self._coding), codes)
        super().write_flat(name + SCALE, start // BLOCK, scales)


class Tensors(Protocol):
    """Where codes and scales are read from."""

    def read(self, name: str) -> Tensor:
        """Read a tensor whole."""

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read a run of a flattened tensor."""


@dataclass(frozen=True)
class CodedTensors:
    """Read the tensors of a layer whose bases are quantised, those in float32.

    Attributes:
        tensors: where they are as they are stored.
        coding: `int8` or `nf4`.
        shapes: of the quantised tensors, by name.
    """

    tensors: Tensors
    coding: str
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """Read a tensor whole."""
        if not is_coded(name):
            return self.tensors.read(name)
        return self.read_flat(name, 0, prod(self.shapes[name])).view(self.shapes[name])

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read a run of a flattened tensor: whole blocks, of which it takes its part."""
        if not is_coded(name):
            return self.tensors.read_flat(name, start, stop, out)
        values = read_run(self.tensors.read_flat, name, start, stop, prod(self.shapes[name]), self.coding)
        return values if out is None else out.copy_(values)


def read_run(
    read_flat: Callable[[str, int, int], Tensor], name: str, start: int, stop: int, num_values: int, coding: str
) -> Tensor:
    """Read the blocks that hold values start:stop of a quantised tensor, and return these values in float32.

    Raises BundleError for scales and codes that quantising never gives.
    """
    again = "copy the whole bundle again"
    first, end = start // BLOCK, min(num_blocks(stop) * BLOCK, num_values)
    begin = first * BLOCK
    codes = read_flat(name, num_codes(begin, coding), num_codes(end, coding))
    scales = read_flat(name + SCALE, first, num_blocks(end))
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise BundleError("scales are negative, NaN or Inf", where=f"tensor '{name}{SCALE}'", next_step=again)
    if coding == INT8 and bool((codes < -LARGEST_CODE).any()):
        rule = f"codes lie between -{LARGEST_CODE} and {LARGEST_CODE}"
        raise BundleError("holds the code -128", where=f"tensor '{name}'", rule=rule, next_step=again)
    return dequantise(codes, scales, coding, end - begin)[start - begin : stop - begin]
