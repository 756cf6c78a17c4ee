"""The best of many ways to form X Xᵀ of float32 rows in memory: what the product of a Gram costs at least.

Legend: N rows, D columns. Only one half counts (N²·D operations); ways that compute both are welcome where they are faster.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
import torch
from scipy.linalg import blas
from threadpoolctl import threadpool_limits
from torch import Tensor

SAMPLE_VALUES = 2**24
"""Values of the sample: 64 MB, more than a processor keeps, since rows that come from files do not lie in its caches."""
SAMPLE_ROWS = 2048
CHUNKS = (4096, 16384)
REPEATS, MOST_REPEATS, ENOUGH = 3, 30, 0.02
"""Small products are repeated more often, until they have taken so many seconds."""

Way = Callable[[Tensor], object]


def best_product(num_rows: int, num_columns: int, threads: int) -> tuple[float, str]:
    """Return the least seconds for N × D, and the way; timed on fewer rows or columns where there are many, and scaled."""
    rows = min(num_rows, SAMPLE_ROWS)
    columns = min(num_columns, max(1, SAMPLE_VALUES // rows))
    sample = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(threads)
    with threadpool_limits(threads, user_api="blas"):
        timed = [(_seconds(product, sample), name) for name, product in PRODUCTS.items()]
    if threads > 1:
        # torch's number of threads is one of each thread's own.
        with (
            threadpool_limits(1, user_api="blas"),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            timed += [
                (_seconds(_side_by_side(product, threads, pool), sample), f"{name}, {threads} products of one thread")
                for name, product in PRODUCTS.items()
            ]
    seconds, name = min(timed)
    return (num_rows / rows) ** 2 * num_columns / columns * seconds, name


def _mm(rows: Tensor) -> object:
    return rows @ rows.T


def _numpy(rows: Tensor) -> object:
    values = rows.numpy()
    return values @ values.T


def _ssyrk(rows: Tensor) -> object:
    # BLAS is column-major: the transposed view is what it may take without a copy.
    return blas.ssyrk(1.0, rows.numpy().T, trans=1)


def _half(parts: int) -> Way:
    """The upper tiles only."""

    def product(rows: Tensor) -> object:
        step = -(-len(rows) // parts)
        return [rows[first : first + step] @ rows[first:].T for first in range(0, len(rows), step)]

    return product


def _runs(product: Way, width: int) -> Way:
    """One run of columns after the other."""

    def whole(rows: Tensor) -> object:
        total = None
        for run in rows.split(width, 1):
            part = product(run)
            total = part if total is None else np.add(total, part, out=total)  # type: ignore[call-overload]
        return total

    return whole


def _accumulated(width: int) -> Way:
    def product(rows: Tensor) -> object:
        total = rows.new_zeros(len(rows), len(rows))
        for run in rows.split(width, 1):
            total.addmm_(run, run.T)
        return total

    return product


PRODUCTS: dict[str, Way] = {
    "torch.mm": _mm,
    **{f"torch.addmm by {width} columns": _accumulated(width) for width in CHUNKS},
    **{f"torch.mm of the upper {parts} tiles": _half(parts) for parts in (2, 4)},
    "numpy": _numpy,
    **{f"numpy by {width} columns": _runs(_numpy, width) for width in CHUNKS},
    "scipy ssyrk": _ssyrk,
}


def _side_by_side(product: Way, threads: int, pool: ThreadPoolExecutor) -> Way:
    """T products of a run of columns each, with one thread each."""
    return lambda rows: list(pool.map(product, rows.chunk(threads, 1)))


def _seconds(way: Way, sample: Tensor) -> float:
    way(sample)
    best, spent = float("inf"), 0.0
    for repeat in range(MOST_REPEATS):
        if repeat >= REPEATS and spent > ENOUGH:
            break
        started = perf_counter()
        way(sample)
        took = perf_counter() - started
        best, spent = min(best, took), spent + took
    return best
