"""Read a model once: the sum of its bytes, its NaN and Inf values, and the outputs of its updates for random inputs.

Many tensors are read at once, with equal shapes side by side, so that a few operations handle all of them. Operations on each
tensor would cost as much time in Python as the reading, and threads would wait for the GIL.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eigenzoo.formats.checkpoint import SafetensorsModel
from eigenzoo.formats.model import Model
from eigenzoo.formats.safetensors.tensor_bytes import as_bytes
from eigenzoo.passes.buffers import borrow
from eigenzoo.zoo.answers import NUM_LISTENERS, Answers, Probe, join_halves, probed_updates

MOST_BYTES = 16 * 2**20
"""Bytes that are read at once, at most: a small adapter whole. A quarter of that costs a fifth more time."""

LEAST_ROWS = 8
"""A tensor is cut into multiples of so many rows, which are whole words: so a sum of words does not depend on the cuts."""

WORD = 8


@dataclass(frozen=True)
class Contents:
    """What one read of a model gives.

    Attributes:
        digest: names, dtypes and shapes of all tensors, and the sum of their bytes: models of other digests differ.
        non_finite: by tensor, how many values are NaN or Inf, where some are.
        answers: each update's; none where updates are too large to be probed.
    """

    digest: tuple[object, ...]
    non_finite: Mapping[str, int]
    answers: Answers


class _Kind(NamedTuple):
    """Rows of tensors as matrices: (rank, inputs) for a factor A, (outputs, rank) for B, and one column for all others."""

    dtype: torch.dtype
    first: int
    rows: int
    columns: int
    side: str


@dataclass(frozen=True)
class _Block:
    """The memory of rows of one kind: each takes `num_words` words, from word `begin` on. Zeros fill the last word."""

    kind: _Kind
    keys: tuple[str, ...]
    begin: int
    num_words: int

    def words(self, words_W: Tensor) -> Tensor:
        """Return the block's words (T, num_words)."""
        end = self.begin + self.num_words * len(self.keys)
        return words_W[self.begin : end].view(len(self.keys), self.num_words)

    def values(self, words_W: Tensor) -> Tensor:
        """Return the block's values (T, rows · columns)."""
        return self.words(words_W).view(self.kind.dtype)[:, : self.kind.rows * self.kind.columns]


@dataclass(frozen=True)
class _Run:
    """What is read at once: by tensor the first value and the bytes in memory that it is read into, and what then lies where."""

    ranges: tuple[tuple[str, int, slice], ...]
    blocks: tuple[_Block, ...]
    num_words: int


@dataclass(frozen=True)
class _Plan:
    """How to read models that differ only in values. `tensors` are their sorted names, dtypes and shapes."""

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    runs: tuple[_Run, ...]


class ContentsReader:
    """Reads models whole, each tensor once.

    Args:
        probe: what updates answer to.
        num_bytes: how much is held in memory at once; `LEAST_ROWS` rows of a factor are held whatever it is.
    """

    def __init__(self, probe: Probe, num_bytes: int) -> None:
        self._probe, self._num_bytes = probe, min(num_bytes, MOST_BYTES)
        self._plans: WeakKeyDictionary[object, _Plan] = WeakKeyDictionary()

    def read(self, model: Model) -> Contents:
        """Read one model; threads may do so side by side."""
        with np.errstate(all="ignore"):  # values that are not finite are counted
            return self._read(model)

    def hash(self, model: Model) -> str:
        """Hash a model's names, dtypes, shapes and values."""
        content = hashlib.sha256()
        for key, info in sorted(model.tensors.items()):
            content.update(f"{key} {info.dtype} {info.shape} ".encode())
            size = prod(info.shape)
            step = self._num_bytes // info.dtype.itemsize
            for start in range(0, size, step):
                with borrow(1, min(step, size - start), info.dtype) as rows:
                    content.update(as_bytes(model.read_flat(key, start, start + rows.shape[1], rows[0])))
        return content.hexdigest()

    def _plan(self, model: Model) -> _Plan:
        """Return how to read a model. Models that differ only in values share one plan."""
        likeness = model.likeness if isinstance(model, SafetensorsModel) else None
        key = model if likeness is None else likeness
        plan = self._plans.get(key)
        if plan is None:
            tensors = sorted((name, str(info.dtype), info.shape) for name, info in model.tensors.items())
            plan = _Plan(tuple(tensors), tuple(map(_make_run, _cut(model, self._num_bytes))))
            self._plans[key] = plan
        return plan

    def _read(self, model: Model) -> Contents:
        total = 0
        bad = Counter[str]()
        updates = probed_updates(model)
        halves = {update.key_a: np.zeros(update.rank) for update in updates.values()}
        halves |= {update.key_b: np.zeros((NUM_LISTENERS, update.rank)) for update in updates.values()}
        plan = self._plan(model)
        for run in plan.runs:
            with borrow(1, run.num_words, torch.int64) as rows:
                words_W = rows[0]
                _read_run(model, run, words_W)
                # Overflow wraps around, which is fine for a checksum.
                total += int(np.add.reduce(words_W.numpy()))
                for block in run.blocks:
                    bad.update(_take_block(block, words_W, self._probe, halves))
        return Contents((plan.tensors, total % 2**64), bad, join_halves(updates, halves))


def _cut(model: Model, num_bytes: int) -> Iterator[dict[_Kind, list[str]]]:
    """Divide a model, in the order of its files, into groups of tensors that are read at once, by kind."""
    updates = probed_updates(model).values()
    sides = {update.key_a: ("a", update.rank, update.shape[1]) for update in updates}
    sides |= {update.key_b: ("b", update.shape[0], update.rank) for update in updates}
    run: dict[_Kind, list[str]] = {}
    size = 0
    for key, info in model.tensors.items():
        side, rows, columns = sides.get(key) or ("", prod(info.shape), 1)
        width = max(columns, 1) * info.dtype.itemsize
        step = max(num_bytes // width // LEAST_ROWS, 1) * LEAST_ROWS
        for first in range(0, rows, step):
            kind = _Kind(info.dtype, first, min(step, rows - first), columns, side)
            taken = kind.rows * width + WORD
            if run and size + taken > num_bytes:
                yield run
                run, size = {}, 0
            run.setdefault(kind, []).append(key)
            size += taken
    if run:
        yield run


def _make_run(tensors: Mapping[_Kind, Sequence[str]]) -> _Run:
    """Say where tensors go: those of one kind beside each other, each padded to whole words."""
    ranges: list[tuple[str, int, slice]] = []
    blocks: list[_Block] = []
    word = 0
    # Wide dtypes first: then each kind begins where its values may.
    for kind, keys in sorted(tensors.items(), key=lambda item: -item[0].dtype.itemsize):
        num_bytes = kind.rows * kind.columns * kind.dtype.itemsize
        block = _Block(kind, tuple(keys), word, -(-num_bytes // WORD))
        for key in keys:
            ranges.append((key, kind.first * kind.columns, slice(word * WORD, word * WORD + num_bytes)))
            word += block.num_words
        blocks.append(block)
    return _Run(tuple(ranges), tuple(blocks), word)


def _read_run(model: Model, run: _Run, words_W: Tensor) -> None:
    """Read tensors into memory."""
    for block in run.blocks:
        if block.kind.rows * block.kind.columns * block.kind.dtype.itemsize % WORD:
            block.words(words_W)[:, -1] = 0
    raw = as_bytes(words_W)
    model.read_bytes([(key, start, raw[part]) for key, start, part in run.ranges])


def _take_block(block: _Block, words_W: Tensor, probe: Probe, halves: dict[str, NDArray[np.float64]]) -> dict[str, int]:
    """Add a block's part to the half outputs of its factors. Return the number of NaN and Inf values by tensor."""
    kind = block.kind
    if not (kind.dtype.is_floating_point or kind.dtype.is_complex):
        return {}
    values_TV = block.values(words_W)
    if kind.side:
        factors_TRC = values_TV.reshape(len(block.keys), kind.rows, kind.columns)
        parts = probe.half_answers(kind.side, factors_TRC, kind.first)
        finite = bool(np.isfinite(parts).all())  # a factor with NaN or Inf has no finite product
        for key, part in zip(block.keys, parts, strict=True):
            if kind.side == "a":
                halves[key][kind.first : kind.first + kind.rows] = part
            else:
                halves[key] += part
    else:
        finite = _sum_is_finite(values_TV)
    if finite:
        return {}
    counts = zip(block.keys, map(_num_non_finite, values_TV), strict=True)
    return {key: count for key, count in counts if count}


def _sum_is_finite(values: Tensor) -> bool:
    """Tell whether the sum is finite: then none of its terms is NaN or Inf."""
    values = _summable(values)
    return isfinite(values.sum(dtype=torch.float32 if values.dtype.itemsize < 4 else None).item())


def _num_non_finite(values: Tensor) -> int:
    return int((~torch.isfinite(_summable(values))).sum())


def _summable(values: Tensor) -> Tensor:
    if values.is_complex():
        return torch.view_as_real(values)
    # torch cannot sum eight-bit floats.
    return values.to(torch.float32) if values.dtype.itemsize == 1 else values
