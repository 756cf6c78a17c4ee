"""The ceiling of a fit, measured on this machine in the same run: read the weights once, and the best GEMM of the same products.

    python -m bench.ceiling FOLDER --models N --threads T

prints one JSON line. Nothing that reads all weights and forms these products with these threads can be faster than the larger of
the two; with one thread, where reading and multiplying cannot overlap, hardly faster than their sum.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any

from bench import page_cache
from bench.collection import AdapterRecipe, Collection, read_collection
from bench.machine import pin

READ_CHUNKS = tuple(2**power for power in (17, 19, 21, 23))
SAMPLE_BYTES = 2**30
"""Bytes on which the ways of reading are compared; the best one then reads everything."""
AS_FAST_AS_WARM = 0.7


def read_once(files: Sequence[Path], threads: int, chunk: int) -> float:
    """Read every byte into one reused buffer per thread; returns seconds."""
    waiting: SimpleQueue[Path] = SimpleQueue()
    for file in files:
        waiting.put(file)

    def work() -> None:
        buffer = [memoryview(bytearray(chunk))]
        while True:
            try:
                descriptor = os.open(waiting.get_nowait(), os.O_RDONLY)
            except Empty:
                return
            try:
                place = 0
                while count := os.preadv(descriptor, buffer, place):
                    place += count
            finally:
                os.close(descriptor)

    with ThreadPoolExecutor(threads) as pool:
        started = perf_counter()
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
        return perf_counter() - started


def read(files: Sequence[Path], threads: int) -> dict[str, Any]:
    """The best warm and the best cold time, the way each was had, and whether the files were what they were meant to be."""
    sample = _sample(files)
    ways = [(count, chunk) for count in sorted({1, threads}) for chunk in READ_CHUNKS]
    page_cache.warm(files)
    way = min(ways, key=lambda way: min(read_once(sample, *way) for _ in range(2)))
    warm = min(read_once(files, *way) for _ in range(2))
    share = page_cache.resident(files)
    found: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in files), "warm": warm, "warm_way": way}
    found["was_warm"] = share is None or share >= page_cache.WARM

    def cold(some: Sequence[Path], way: tuple[int, int]) -> tuple[float, float]:
        left = page_cache.evict(some)
        return read_once(some, *way), 1.0 if left is None else left

    way = min(ways, key=lambda way: cold(sample, way)[0])
    seconds, left = cold(files, way)
    page_cache.warm(files)
    note = ""
    if left > page_cache.COLD:
        note = f"not cold: {left:.0%} of the pages stayed in memory"
    elif AS_FAST_AS_WARM * seconds < warm:
        note = "as fast as warm: a cache below the file system must have had it"
    return {**found, "cold": seconds, "cold_way": way, "cold_note": note}


def _sample(files: Sequence[Path]) -> list[Path]:
    chosen: list[Path] = []
    for file in files:
        if sum(each.stat().st_size for each in chosen) >= SAMPLE_BYTES:
            break
        chosen.append(file)
    return chosen


def products(collection: Collection, threads: int) -> dict[str, Any]:
    """Seconds of the float32 products of all layers, per view."""
    from bench.gemm import best_product

    found: dict[str, Any] = {"ways": []}

    def total(counts: dict[tuple[int, int], int]) -> float:
        seconds = 0.0
        for (num_rows, num_columns), count in counts.items():
            best, way = best_product(num_rows, num_columns, threads)
            rate = num_rows**2 * num_columns / best / 1e9
            found["ways"].append(
                {"rows": num_rows, "columns": num_columns, "seconds": best, "half_gflops": rate, "way": way}
            )
            seconds += count * best
        return seconds

    weights: dict[tuple[int, int], int] = {}
    for tensor in collection.tensors.values():
        shape = (collection.num_models, tensor.num_values)
        weights[shape] = weights.get(shape, 0) + 1
    found["weights"] = total(weights)
    if isinstance(collection.recipe, AdapterRecipe):
        updates: dict[tuple[int, int], int] = {}
        for sides in collection.recipe.modules.values():
            for side in sides:
                shape = (collection.num_models * collection.recipe.rank, side)
                updates[shape] = updates.get(shape, 0) + 1
        found["updates"] = total(updates)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    pin(asked.threads)
    collection = read_collection(asked.folder, asked.models)
    found = {"read": read(collection.files, asked.threads), "products": products(collection, asked.threads)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
