"""scikit-learn's PCA with its default solver (randomised for stacks of such shapes), on each layer's stack (N, D)."""

from __future__ import annotations

from sklearn.decomposition import PCA

from bench.collection import Array
from bench.peers.by_layer import Found, basis, each_layer, spectra
from bench.peers.work import Work

__all__ = ["basis", "fit", "spectra"]


def fit(work: Work) -> Found:
    def decompose(name: str, rows: Array) -> tuple[Array, Array]:
        pca = PCA(n_components=min(work.rank, len(rows) - 1, rows.shape[1]), random_state=0).fit(rows)
        return pca.singular_values_.astype(float) ** 2, pca.components_

    return each_layer(work, decompose)
