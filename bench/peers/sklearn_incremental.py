"""scikit-learn's IncrementalPCA, on each layer in batches of models, which are all that it holds."""

from __future__ import annotations

from sklearn.decomposition import IncrementalPCA

from bench.collection import Array, Collection
from bench.peers.by_layer import Found, basis, spectra
from bench.peers.work import Work

__all__ = ["basis", "fit", "spectra"]


def fit(work: Work) -> Found:
    batch = 2 * work.rank
    values: dict[str, Array] = {}
    bases: dict[str, Array] = {}
    for name in work.names:
        pca = IncrementalPCA(n_components=min(work.rank, work.collection.tensors[name].num_values))
        for start, stop in _batches(work.collection.num_models, batch):
            with work.phase("read"):
                rows = _models(work.collection, start, stop).rows(name)
            with work.phase("fit"):
                pca.partial_fit(rows)
        values[name] = pca.singular_values_.astype(float) ** 2
        if name in work.sample:
            bases[name] = pca.components_
    return Found(values, bases)


def _batches(num_models: int, size: int) -> list[tuple[int, int]]:
    """Runs of at least `size` models, which no batch may be smaller than the rank of."""
    starts = list(range(0, max(1, num_models - size + 1), size))
    return list(zip(starts, [*starts[1:], num_models], strict=True))


def _models(collection: Collection, start: int, stop: int) -> Collection:
    part = Collection(collection.recipe, collection.folder, stop)
    part.paths, part.files, part.num_models = part.paths[start:], part.files[start:], stop - start
    return part
