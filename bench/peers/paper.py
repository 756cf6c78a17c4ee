"""The paper's way with adapters: all of them in memory, and per factor a PCA of all models' rows, one below the other.

Another question than the models' own spectrum (it centres by columns and mixes ranks with models), so compared with a truth
of its own; its variances say nothing on how many numbers describe a model. No angle: its leading directions are sixteen of
the hundreds that all ranks of all planted directions span, and hardly stand out from the next.
"""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file
from sklearn.decomposition import PCA

from bench.collection import Array
from bench.peers.by_layer import Found
from bench.peers.work import Work


def fit(work: Work) -> Found:
    with work.phase("read"):
        models = [load_file(file) for file in work.collection.files]
    values: dict[str, Array] = {}
    for name in work.names:
        tensor = work.collection.tensors[name]
        long_side = tensor.shape[1] >= tensor.shape[0]
        with work.phase("fit"):
            rows = np.concatenate([model[tensor.key] if long_side else model[tensor.key].T for model in models])
            pca = PCA(n_components=min(work.rank, *rows.shape), random_state=0).fit(rows)
        values[name] = pca.singular_values_.astype(float) ** 2
    return Found(values, {})


def spectra(work: Work, found: Found) -> dict[str, Array]:
    """Those of the sample: its truth takes a dense eigendecomposition of a whole side."""
    return {name: found.values[name] for name in work.sample}


def basis(work: Work, found: Found, name: str) -> Array | None:
    return None
