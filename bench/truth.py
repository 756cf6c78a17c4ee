"""What is true of a collection, in float64: spectra and leading directions of its layers, kept beside it since they take a while.

    weights    the centred spectrum of each layer's N models, flattened (N × D)
    updates    the same of LoRA updates s·B·A, by products of their factors (never multiplied out)
    columns    the column-centred spectrum of the rows of all models' matrices, one below the other (the paper's way), on a sample

Legend: N models, D values of a layer, K planted directions, R a LoRA's rank, O outputs, I inputs, P = N·R.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.collection import AdapterRecipe, Array, Collection

BLOCK_BYTES = 2**26
TILE = 2048


@dataclass(frozen=True)
class Truth:
    """Per layer: all eigenvalues, descending, and the leading eigenvectors as columns (of models, or of the matrix's columns)."""

    what: str
    values: dict[str, Array]
    vectors: dict[str, Array]


def truth(collection: Collection, what: str, tell: Callable[[str], None] = lambda text: None) -> Truth:
    """Return what is true, computed now unless it is kept already."""
    file = collection.folder / f"truth-{what}-{collection.num_models}.npz"
    if not file.exists():
        tell(f"float64 truth of {collection.num_models} {collection.recipe.title}: {what}")
        _keep(file, FINDERS[what](collection))
    with np.load(file) as kept:
        names = [name.removeprefix("values/") for name in kept.files if name.startswith("values/")]
        return Truth(
            what, {name: kept[f"values/{name}"] for name in names}, {name: kept[f"vectors/{name}"] for name in names}
        )


def _keep(file: Path, found: dict[str, tuple[Array, Array]]) -> None:
    staging = file.with_name(f".{file.name}")
    arrays = {f"values/{name}": values for name, (values, _) in found.items()}
    arrays |= {f"vectors/{name}": vectors for name, (_, vectors) in found.items()}
    np.savez(staging, **arrays)
    staging.rename(file)


def _weights(collection: Collection) -> dict[str, tuple[Array, Array]]:
    return {name: _leading(_gram(collection, name), collection) for name in collection.tensors}


def _gram(collection: Collection, name: str) -> Array:
    """⟨X_i − M, X_j − M⟩: the mean is removed before any product."""
    gram_NN = np.zeros((collection.num_models, collection.num_models))
    for rows in collection.blocks(name, BLOCK_BYTES):
        rows_ND = rows.astype(np.float64)
        rows_ND -= rows_ND.mean(0)
        gram_NN += rows_ND @ rows_ND.T
    return gram_NN


def _leading(moment: Array, collection: Collection, size: int | None = None) -> tuple[Array, Array]:
    """Eigenvalues, descending, without those that centring makes zero; and the leading vectors."""
    values, vectors = np.linalg.eigh(moment)
    size = collection.num_models - 1 if size is None else size
    return values[::-1][:size].copy(), vectors[:, ::-1][:, : collection.recipe.planted].copy()


def _updates(collection: Collection) -> dict[str, tuple[Array, Array]]:
    recipe = collection.recipe
    assert isinstance(recipe, AdapterRecipe)
    found = {}
    for module in recipe.modules:
        a_PI = collection.rows(f"{module}.lora_A").reshape(-1, recipe.hidden)
        b_NOR = collection.rows(f"{module}.lora_B").reshape(collection.num_models, -1, recipe.rank)
        b_PO = b_NOR.transpose(0, 2, 1).reshape(len(a_PI), -1)
        raw_NN = recipe.scale**2 * _update_gram(b_PO, a_PI, recipe.rank)
        means_N = raw_NN.mean(0)
        found[module] = _leading(raw_NN - means_N - means_N[:, None] + means_N.mean(), collection)
    return found


def _update_gram(b_PO: Array, a_PI: Array, rank: int) -> Array:
    """Σ (B_iᵀB_j) ∘ (A_iA_jᵀ), tile by tile of the upper half."""
    num_models = len(a_PI) // rank
    step = max(1, TILE // rank) * rank
    gram_NN = np.zeros((num_models, num_models))
    for first in range(0, len(a_PI), step):
        a_left, b_left = a_PI[first : first + step].astype(np.float64), b_PO[first : first + step].astype(np.float64)
        for other in range(first, len(a_PI), step):
            products = (b_left @ b_PO[other : other + step].T.astype(np.float64)) * (
                a_left @ a_PI[other : other + step].T.astype(np.float64)
            )
            tile = products.reshape(len(products) // rank, rank, -1, rank).sum((1, 3))
            rows, columns = first // rank, other // rank
            gram_NN[rows : rows + tile.shape[0], columns : columns + tile.shape[1]] = tile
            gram_NN[columns : columns + tile.shape[1], rows : rows + tile.shape[0]] = tile.T
    return gram_NN


def _columns(collection: Collection) -> dict[str, tuple[Array, Array]]:
    found = {}
    for name in collection.sample():
        rows = stacked_rows(collection, name).astype(np.float64)
        rows -= rows.mean(0)
        found[name] = _leading(rows.T @ rows, collection, size=min(rows.shape[1], len(rows) - 1))
    return found


def stacked_rows(collection: Collection, name: str) -> Array:
    """The rows of all models' factors one below the other, along the long side: (N·R, I) for A, (N·R, O) for B."""
    shape = collection.tensors[name].shape
    rows = collection.rows(name).reshape(collection.num_models, *shape)
    rows = rows if shape[0] <= shape[1] else rows.transpose(0, 2, 1)
    return np.ascontiguousarray(rows).reshape(-1, max(shape))


FINDERS: dict[str, Callable[[Collection], dict[str, tuple[Array, Array]]]] = {
    "weights": _weights,
    "updates": _updates,
    "columns": _columns,
}


def directions(collection: Collection, found: Truth, name: str) -> Array:
    """The leading directions of a layer, (K, D) float64 with orthonormal rows: Λ^(−1/2) Uᵀ X about the mean."""
    vectors = found.vectors[name]
    if found.what == "columns":
        return vectors.T
    parts = []
    for rows in collection.blocks(name, BLOCK_BYTES):
        rows_ND = rows.astype(np.float64)
        parts.append(vectors.T @ (rows_ND - rows_ND.mean(0)))
    return np.concatenate(parts, 1) / np.sqrt(found.values[name][: vectors.shape[1], None])
