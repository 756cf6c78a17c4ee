"""numpy's full SVD of a layer's centred stack (N, D) in float32."""

from __future__ import annotations

import numpy as np

from bench.collection import Array
from bench.peers.by_layer import Found, basis, each_layer, spectra
from bench.peers.work import Work

__all__ = ["basis", "fit", "spectra"]


def fit(work: Work) -> Found:
    def decompose(name: str, rows: Array) -> tuple[Array, Array]:
        rows -= rows.mean(0)
        _, values, vectors = np.linalg.svd(rows, full_matrices=False)
        return values[: len(rows) - 1].astype(float) ** 2, vectors[: work.rank]

    return each_layer(work, decompose)
