"""Ranks of many matrices for one budget: each step adds the direction that saves most energy per byte."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from torch import Tensor


def ranks_within(values: Mapping[str, Tensor], costs: Mapping[str, int], room: float) -> dict[str, int]:
    """Return a rank for each matrix, at least 1, whose costs together are at most `room` beyond those of rank 1.

    A matrix's error is the tail of its spectrum, and each direction gains at most as much as the last: the greedy order is optimal
    up to the last direction that fits.

    Args:
        values: singular values by matrix, descending.
        costs: of one direction, by matrix.
        room: what directions after the first may cost together.
    """
    ranks = dict.fromkeys(values, 1)

    def entry(name: str) -> tuple[float, str] | None:
        place = ranks[name]
        return (-(float(values[name][place]) ** 2) / costs[name], name) if place < values[name].numel() else None

    heap = [found for name in values if (found := entry(name))]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        if costs[name] > room:
            continue
        room -= costs[name]
        ranks[name] += 1
        if found := entry(name):
            heapq.heappush(heap, found)
    return ranks
