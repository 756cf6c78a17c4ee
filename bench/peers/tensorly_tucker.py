"""TensorLy's Tucker decomposition of a layer's centred stack (N × O × I), truncated along the models: the same product as ours.

With the sides truncated too it takes an SVD of each side's unfolding besides, per iteration.
"""

from __future__ import annotations

import numpy as np
from tensorly.decomposition import partial_tucker

from bench.collection import Array
from bench.peers.by_layer import Found, basis, each_layer, spectra
from bench.peers.work import Work

__all__ = ["basis", "fit", "spectra"]


def fit(work: Work) -> Found:
    def decompose(name: str, rows: Array) -> tuple[Array, Array]:
        rows -= rows.mean(0)
        stack = rows.reshape(len(rows), *_matrix(work.collection.tensors[name].shape))
        (core, _), _ = partial_tucker(stack, rank=[min(work.rank, len(rows) - 1)], modes=[0])
        flat = core.reshape(len(core), -1)
        lengths = np.linalg.norm(flat.astype(float), axis=1)
        return lengths**2, flat / lengths[:, None].astype(flat.dtype)

    return each_layer(work, decompose)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], -1 if len(shape) > 1 else 1
