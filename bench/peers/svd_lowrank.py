"""torch.svd_lowrank of each layer's centred stack (N, D), with two iterations (its default) and ten more columns than are asked.

It wants its rank "slightly overestimated"; ten is what scikit-learn's randomised solver takes.
"""

from __future__ import annotations

import torch

from bench.collection import Array
from bench.peers.by_layer import Found, basis, each_layer, spectra
from bench.peers.work import Work

__all__ = ["basis", "fit", "spectra"]

MORE = 10


def fit(work: Work) -> Found:
    torch.manual_seed(0)

    def decompose(name: str, rows: Array) -> tuple[Array, Array]:
        centred = torch.from_numpy(rows)
        centred -= centred.mean(0)
        _, values, vectors = torch.svd_lowrank(centred, q=min(work.rank + MORE, *rows.shape))
        return values[: work.rank].double().square().numpy(), vectors[:, : work.rank].T.numpy()

    return each_layer(work, decompose)
