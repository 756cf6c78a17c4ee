"""vLoRA 1.0, one adapter in memory at a time: `SharedSubspace.from_adapters_streaming`."""

from __future__ import annotations

import vlora

from bench.peers.vlora_batch import basis, spectra
from bench.peers.work import Work

__all__ = ["basis", "fit", "spectra"]


def fit(work: Work) -> vlora.SharedSubspace:
    with work.phase("fit"):
        return vlora.SharedSubspace.from_adapters_streaming(work.collection.paths, num_components=work.rank)
