"""How far a result is from the truth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bench.collection import Array, Collection
from bench.truth import Truth, directions

ROUND_OFF = 1e-9
"""Share of a layer's largest eigenvalue below which the truth itself is round-off of the stored weights: not compared."""


def errors(
    collection: Collection, found: Truth, spectra: Mapping[str, Array], bases: Mapping[str, Array], rank: int
) -> dict[str, float | None]:
    """Compare eigenvalues (not divided by N − 1) on all layers that were done, and directions on those that were kept.

    Returns:
        top: the largest |λ̂ − λ| / λ among the leading `rank` eigenvalues of every layer.
        tail: the same among all others; None where a result has no others.
        angle: the sine of the largest principal angle between the leading directions and the true ones, as many as are planted.
    """
    top, tail = [], []
    for name, values in spectra.items():
        true = found.values[name]
        true = true[true > ROUND_OFF * true[0]]
        # A direction among the leading ones that was not found is an eigenvalue of zero.
        values = np.pad(values, (0, max(0, min(rank, len(true)) - len(values))))
        known = min(len(values), len(true))
        relative = np.abs(values[:known] - true[:known]) / true[:known]
        # A result that is not a number is as wrong as can be, and max() would pass over it.
        relative = np.where(np.isfinite(relative), relative, np.inf)
        top.append(float(relative[:rank].max()))
        if known > rank:
            tail.append(float(relative[rank:].max()))
    angles = [sine(basis, directions(collection, found, name)) for name, basis in bases.items()]
    return {"top": max(top), "tail": max(tail, default=None), "angle": max(angles, default=None)}


def sine(basis_KD: Array, true_KD: Array) -> float:
    """Sine of the largest angle between a true direction and the span of as many rows of `basis_KD`.

    From the residual and not from cosines, which cannot tell angles below 1e-8; the basis is made orthonormal in float64.
    """
    columns_DK = np.linalg.qr(basis_KD[: len(true_KD)].astype(np.float64).T)[0]
    residual_KD = true_KD - (true_KD @ columns_DK) @ columns_DK.T
    return float(np.sqrt(max(np.linalg.eigvalsh(residual_KD @ residual_KD.T)[-1], 0.0)))
