"""For methods that know matrices and not files: layer after layer, its rows read into memory, all models of it and no more.

That is kinder to them than their own users are, who hold all models at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.collection import Array
from bench.peers.work import Work


@dataclass(frozen=True)
class Found:
    """Eigenvalues of every layer, and the bases of the sample; the others' are let go at once."""

    values: dict[str, Array]
    bases: dict[str, Array]


Decompose = Callable[[str, Array], tuple[Array, Array]]
"""From a layer's name and its rows (N, D) float32, which may be overwritten, to eigenvalues and directions (K, D)."""


def each_layer(work: Work, decompose: Decompose) -> Found:
    values, bases = {}, {}
    for name in work.names:
        with work.phase("read"):
            rows = work.collection.rows(name)
        with work.phase("fit"):
            values[name], basis = decompose(name, rows)
        if name in work.sample:
            bases[name] = basis
    return Found(values, bases)


def spectra(work: Work, found: Found) -> dict[str, Array]:
    return found.values


def basis(work: Work, found: Found, name: str) -> Array | None:
    return found.bases[name]
