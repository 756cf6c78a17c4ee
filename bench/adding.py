"""Adding a few models to a fitted subspace, against fitting all of them: with the old models' files at hand, and without.

    python -m bench --only adding

The old models are hard links, deleted where the bundle has to do alone. Every step is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from bench import child, machine
from bench.accuracy import errors
from bench.collection import Collection, make, read_collection
from bench.sizes import AddingPlan
from bench.suite import WARM, Record, faster, prepare, tell
from bench.truth import truth

STEPS = {
    "refit": "fit all",
    "add": "add, old files at hand",
    "add-refresh": "add and refresh, old files at hand",
    "alone": "add, from the bundle alone",
    "alone-refresh": "add and refresh, from the bundle alone",
}
ALONE = ("alone", "alone-refresh")
"""Steps without the old files, which come after all others."""


def run_adding(plan: AddingPlan, threads: int, home: Path, repeats: int, limits: child.Limits) -> list[Record]:
    """Time every step; ratios are to fitting all models."""
    collection = make(plan.recipe, plan.old + plan.new, home, tell)
    true = truth(collection, "weights", tell)
    rank = plan.recipe.planted
    rows: list[Record] = []
    with tempfile.TemporaryDirectory(dir=home, prefix=".bench-") as name:
        folder = Path(name)
        for path in collection.paths[: plan.old]:
            _link(path, folder / "old" / path.name)
        tell(f"adding, threads {threads}: fitting {plan.old}")
        _step("fit", collection, folder, plan, threads, limits)
        for step in plan.steps:
            if step in ALONE:
                shutil.rmtree(folder / "old", ignore_errors=True)
            best: Record = {}
            for _ in range(repeats):
                tell(f"adding, threads {threads}: {step}")
                prepare(collection.files, WARM)
                best = faster(best, _step(step, collection, folder, plan, threads, limits))
            with np.load(folder / "spectra.npz") as arrays:
                best["errors"] = errors(collection, true, dict(arrays), {}, rank)
            best |= {"step": step, "threads": threads, "old": plan.old, "new": plan.new}
            rows.append(best | {"times_refit": best["wall"] / (rows[0]["wall"] if rows else best["wall"])})
    return rows


def _link(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)


def _step(
    step: str, collection: Collection, folder: Path, plan: AddingPlan, threads: int, limits: child.Limits
) -> Record:
    arguments = [step, str(collection.folder), str(folder), "--old", str(plan.old), "--new", str(plan.new)]
    found = child.run("bench.adding", [*arguments, "--threads", str(threads)], threads, limits, folder)
    if "failed" in found:
        raise RuntimeError(f"adding, {step}: {found['failed']}\n{found.get('stderr', '')}")
    return found


def main() -> None:
    """One step, in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["fit", *STEPS])
    parser.add_argument("collection", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--old", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    machine.pin(asked.threads)

    import torch

    import eigenzoo as ez
    import eigenzoo.subspace.growth  # which is imported at first use
    from bench.peers.eigenzoo_fit import spectra_of

    torch.set_num_threads(asked.threads)
    whole, folder = read_collection(asked.collection, asked.old + asked.new), asked.folder
    rank, new, bundle = whole.recipe.planted, whole.paths[asked.old :], folder / "bundle"
    if asked.step == "fit":
        space = ez.fit(str(folder / "old"), rank=rank, view="factors", workspace=folder)
        space.save(bundle)
        print(json.dumps({}))
        return
    workspace = Path(tempfile.mkdtemp(dir=folder))
    imported, watch = machine.rss(), machine.Watch()
    machine.reset_peak()
    with watch.phase("whole"):
        if asked.step == "refit":
            space = ez.fit(whole.paths, rank=rank, view="factors", workspace=workspace)
        else:
            space = ez.load(bundle).add(new, refresh=asked.step.endswith("refresh"), workspace=workspace)
    peak = machine.peak()
    exact = bool(space.report.get("growth", {}).get("exact", True))
    if exact == (asked.step in ALONE):
        raise RuntimeError(f"the old files were {'used' if exact else 'not used'}")
    np.savez(folder / "spectra.npz", **spectra_of(space, whole.recipe.scale))
    times = {"wall": watch.wall["whole"], "cpu": watch.cpu["whole"]}
    print(json.dumps({**times, "imports_rss": imported, "peak_rss": peak}))


if __name__ == "__main__":
    main()
