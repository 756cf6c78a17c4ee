"""The size of the k-th largest of many numbers, without holding them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

BINS = 2**16


Blocks = Callable[[], Iterable[Tensor]]
"""Gives T rows of numbers in blocks (T, n), from the first on each time it is called."""


def least_of_largest(blocks: Blocks, counts: Sequence[int]) -> Tensor:
    """Return for each of T rows the least |x| among its `counts[t]` largest.

    (T,) float64; infinite where the count is 0. Two passes: sizes are counted by the leading half of their float32 bits, which has
    their order, and those of one bin are then sorted. Exact; memory T·(2¹⁶ + the numbers of one bin, about 1 % of all).
    """
    kept_T = torch.tensor(counts)
    counted_TB = torch.zeros(len(counts), BINS, dtype=torch.int64)
    for block in blocks():
        bins = _bins(block)
        counted_TB.scatter_add_(1, bins, torch.ones_like(bins))
    above_TB = counted_TB.flip(1).cumsum(1).flip(1)
    # The last bin with at least so many numbers in it and above it.
    chosen_T = ((above_TB >= kept_T[:, None]).sum(1) - 1).clamp_min(0)
    beyond_T = (above_TB.gather(1, chosen_T[:, None]) - counted_TB.gather(1, chosen_T[:, None]))[:, 0]
    found: list[list[Tensor]] = [[] for _ in counts]
    for block in blocks():
        bins = _bins(block)
        for row, chosen in enumerate(chosen_T):
            found[row].append(block[row][bins[row] == chosen].abs().double())
    least = torch.full((len(counts),), torch.inf, dtype=torch.float64)
    for row, (place, each) in enumerate(zip((kept_T - beyond_T).tolist(), found, strict=True)):
        if counts[row]:
            least[row] = torch.cat(each).sort(descending=True).values[place - 1]
    return least


def _bins(block: Tensor) -> Tensor:
    """Number each |x| so that a larger one never has a smaller number: rounding keeps the order."""
    return block.abs().float().view(torch.int32).long() >> 16
