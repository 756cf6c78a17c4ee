"""One collection, one number of threads: the ceiling, then every peer in turn, each compared with the truth."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import child, page_cache
from bench.accuracy import errors
from bench.collection import Collection, make
from bench.peers import PEERS
from bench.sizes import LONG, Case
from bench.truth import truth

WARM, COLD = "warm", "cold"

Record = dict[str, Any]


def tell(text: str) -> None:
    """Say on stderr what is being done."""
    print(text, file=sys.stderr, flush=True)


def run_case(case: Case, chosen: Sequence[str], threads: int, home: Path, repeats: int, limits: child.Limits) -> Record:
    """Measure these peers, by name, on one case."""
    collection = make(case.recipe, case.num_models, home, tell)
    for what in sorted({PEERS[name].truth for name in chosen}):
        truth(collection, what, tell)
    tell(f"{case.name}, threads {threads}: the ceiling")
    where = [str(collection.folder), "--models", str(case.num_models), "--threads", str(threads)]
    ceiling = child.run("bench.ceiling", where, threads, limits)
    if "failed" in ceiling:
        raise RuntimeError(f"the ceiling could not be measured: {ceiling['failed']}\n{ceiling.get('stderr', '')}")
    jobs = [(name, state) for name in chosen for state in (WARM, COLD) if state == WARM or name in case.cold]
    records = []
    for name, state in jobs:
        tell(f"{case.name}, threads {threads}: {name}, {state}")
        record = measure(collection, name, case.rank, threads, state, repeats, limits)
        found = ceiling_of(ceiling, PEERS[name].truth, state)
        if found is not None and "wall" in record:
            record |= {"ceiling": found, "times_ceiling": record["wall"] / found}
        records.append(record)
    return {
        "case": case.name,
        "title": case.recipe.title,
        "num_models": case.num_models,
        "bytes": collection.num_bytes,
        "rank": case.rank,
        "threads": threads,
        "ceiling": ceiling,
        "runs": records,
    }


def ceiling_of(ceiling: Record, what: str, state: str = WARM) -> float | None:
    """The larger of reading once and the product, in seconds; None for what has another product."""
    product = ceiling["products"].get(what)
    return None if product is None else max(ceiling["read"][state], product)


def measure(
    collection: Collection,
    name: str,
    rank: int,
    threads: int,
    state: str = WARM,
    repeats: int = 1,
    limits: child.Limits = child.NO_LIMITS,
    compared: bool = True,
) -> Record:
    """Run one peer, again where it is quick; the fastest run counts, and the largest memory."""
    peer = PEERS[name]
    record: Record = {"peer": name, "state": state}
    if peer.missing:
        return record | {"skipped": peer.missing}
    with tempfile.TemporaryDirectory(dir=collection.folder.parent, prefix=".bench-") as folder:
        kept = Path(folder) / "kept.npz"
        arguments = [name, str(collection.folder), "--models", str(collection.num_models), "--rank", str(rank)]
        arguments += ["--threads", str(threads), *(["--keep", str(kept)] if compared else [])]
        for repeat in range(repeats):
            share = prepare(collection.files, state)
            found = child.run("bench.peers", arguments, threads, limits, Path(folder))
            if share is not None and (share < page_cache.WARM if state == WARM else share > page_cache.COLD):
                record["note"] = f"not {state}: {share:.0%} of the files were in memory"
            if "failed" in found:
                return record | found
            record = faster(record, found) | {"repeats": repeat + 1}
            if found["process"] > LONG:
                break
        if compared:
            with np.load(kept) as arrays:
                spectra, bases = (_part(arrays, part) for part in ("spectra", "bases"))
            record["errors"] = errors(collection, truth(collection, peer.truth), spectra, bases, rank)
    if peer.one_matrix:
        record |= {
            "extrapolated": True,
            "wall": record["wall"] / record["share"],
            "cpu": record["cpu"] / record["share"],
        }
    return record


def faster(before: Record, now: Record) -> Record:
    """Of two runs the faster one's figures, but the larger memory of both: how an allocator fares varies by a block or two."""
    now = now | {"memory": max(now["peak_rss"] - now["imports_rss"], 0)}
    best = before | now if "wall" not in before or now["wall"] < before["wall"] else before
    return best | {key: max(before.get(key, 0), now[key]) for key in ("memory", "peak_rss")}


def prepare(files: Sequence[Path], state: str) -> float | None:
    """Bring the files into memory or out of it; returns the share that is in memory then, None where it cannot be known."""
    if state == COLD:
        return page_cache.evict(files)
    page_cache.warm(files)
    return page_cache.resident(files)


def _part(arrays: Any, part: str) -> dict[str, Any]:
    return {name.partition("/")[2]: arrays[name] for name in arrays.files if name.startswith(f"{part}/")}
