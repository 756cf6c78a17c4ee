"""Run one peer on one collection, and print one JSON line of what it took and found.

python -m bench.peers NAME FOLDER --models N [--rank 16] [--threads 1] [--keep FILE] [--option key=value …]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from bench import machine
from bench.peers import PEERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=int, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="where all spectra and the sample's bases go (.npz)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    machine.pin(asked.threads)
    peer = PEERS[asked.name]
    method = import_module(f"bench.peers.{peer.module}")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(asked.threads)

    from bench.collection import read_collection
    from bench.peers.work import Work

    collection = read_collection(asked.folder, asked.models)
    options = dict(peer.options) | dict(option.split("=", 1) for option in asked.option)
    names, sample = list(collection.tensors), collection.sample()
    if peer.one_matrix:
        names = sample = [max(sample, key=lambda name: collection.tensors[name].num_values)]
    with tempfile.TemporaryDirectory(dir=asked.folder.parent, prefix=".bench-") as scratch:
        work = Work(collection, names, sample, asked.rank, asked.threads, Path(scratch), options)
        imported = machine.rss()
        machine.reset_peak()
        found = method.fit(work)
        peak = machine.peak()
        spectra = method.spectra(work, found)
        if asked.keep is not None:
            _keep(asked.keep, spectra, {name: method.basis(work, found, name) for name in sample})
    values = {name: tensor.num_values for name, tensor in collection.tensors.items()}
    line = {
        "name": asked.name,
        "imports_rss": imported,
        "peak_rss": peak,
        "wall": sum(work.watch.wall.values()),
        "cpu": sum(work.watch.cpu.values()),
        "phases": work.watch.wall,
        "num_layers": len(spectra),
        "share": sum(values[name] for name in names) / sum(values.values()),
        "spectrum": {name: spectra[name][: asked.rank].tolist() for name in sample if name in spectra},
    }
    print(json.dumps(line))


def _keep(file: Path, spectra: dict, bases: dict) -> None:  # type: ignore[type-arg]
    import numpy as np

    arrays = {f"spectra/{name}": values for name, values in spectra.items()}
    arrays |= {f"bases/{name}": basis for name, basis in bases.items() if basis is not None}
    np.savez(file, **arrays)


if __name__ == "__main__":
    main()
