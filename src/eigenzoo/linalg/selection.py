"""The size of the k-th largest of many numbers, without holding them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

BINS = 2**16


def thresholds(blocks: Callable[[], Iterable[Tensor]], share: float) -> Tensor:
    """Return, for each of T rows of numbers that arrive in blocks (T, n), the least |x| among the ⌊share·D⌋ largest of all D.

    (T,) float64; infinite where none is kept. Two passes: sizes are counted by the leading half of their float32 bits, which has
    their order, and those of one bin are then sorted. Exact; memory T·(2¹⁶ + the numbers of one bin, about 1 % of all).
    """
    counts, total = None, 0
    for block in blocks():
        bins = _bins(block)
        counts = torch.zeros(bins.shape[0], BINS, dtype=torch.int64) if counts is None else counts
        counts.scatter_add_(1, bins, torch.ones_like(bins))
        total += bins.shape[1]
    if counts is None:
        raise ValueError("there are no blocks")
    kept = int(share * total)
    if kept == 0:
        return torch.full((counts.shape[0],), torch.inf, dtype=torch.float64)
    above_TB = counts.flip(1).cumsum(1).flip(1)
    # The last bin with at least `kept` numbers in it and above it.
    chosen_T = (above_TB >= kept).sum(1) - 1
    within_T = kept - (above_TB.gather(1, chosen_T[:, None]) - counts.gather(1, chosen_T[:, None]))[:, 0]
    found: list[list[Tensor]] = [[] for _ in chosen_T]
    for block in blocks():
        bins = _bins(block)
        for row, chosen in enumerate(chosen_T):
            found[row].append(block[row][bins[row] == chosen].abs().double())
    return torch.stack(
        [torch.cat(each).sort(descending=True).values[place - 1] for each, place in zip(found, within_T, strict=True)]
    )


def _bins(block: Tensor) -> Tensor:
    """Number each |x| so that a larger one never has a smaller number: rounding keeps the order."""
    return block.abs().float().view(torch.int32).long() >> 16
