"""Add random directions to the zoo's, for zoos too small to span a new task.

    form flat       m whole-layer directions, orthogonal to all V_k
    form tucker     m more columns of each truncated side, orthogonal to its own: cores grow to (P + m, Q + m). With axis `models`,
    m more cores in these wider sides, orthogonal to the shared ones
    form stacked    none: a direction there is a sum of the zoo's own updates

A layer without room gets fewer than m. The zoo's coefficients come first and keep their meaning. A step of θ moves the weight along
a new direction as far as along the zoo's least one. The directions are drawn again from a seed and the layer's name, so a file
stores only two numbers for them. They come from `numpy.random.RandomState`, whose draws numpy has promised never to change.

Legend: D values of one flattened layer, K directions, M new ones, O outputs, I inputs, P and Q kept outputs and inputs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eigenzoo.adapt.maps import Map
from eigenzoo.errors import UsageError
from eigenzoo.linalg.low_rank import LowRank
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.bases.basis import LayerBasis
from eigenzoo.subspace.bases.flat import FlatBasis
from eigenzoo.subspace.bases.tucker import TuckerBasis


@dataclass(frozen=True)
class Augmentation:
    """The number of additional random directions, and their seed.

    Attributes:
        num: number for each layer; 0 for none.
        seed: see `seeds.check_seed`.
    """

    num: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num < 0:
            raise UsageError(f"{self.num} random directions", rule="a number from 0")
        object.__setattr__(self, "seed", check_seed(self.seed))

    def shape(self, basis: LayerBasis) -> tuple[int, ...]:
        """Return the shape of one layer's coefficients with these directions. Raises UsageError for the form `stacked`."""
        if not self.num:
            return basis.coefficient_shape
        if isinstance(basis, FlatBasis):
            return (_room(basis.ranks["models"], basis.layer.num_values, self.num),)
        if not isinstance(basis, TuckerBasis):
            raise UsageError(
                "random directions beside sums of the zoo's own updates",
                where=f"layer '{basis.layer.name}'",
                rule="updates with axis models alone have none",
                next_step="fit the zoo with axes outputs and inputs",
            )
        sides = [
            _room(basis.ranks[axis], size, self.num) if axis in basis.ranks else size
            for axis, size in zip(("outputs", "inputs"), basis.layer.shape, strict=True)
        ]
        if "models" not in basis.ranks:
            return sides[0], sides[1]
        return (_room(basis.ranks["models"], sides[0] * sides[1], self.num),)

    def form(self, basis: LayerBasis, *, mean: bool) -> LowRank | None:
        """Return how low-rank cores are kept with these directions; None for other coefficients. See `LayerBasis.low_rank`."""
        found = basis.low_rank(mean=mean)
        return found if found is None or not self.num else widened(found, self.shape(basis))

    def widen(self, layer: Map, name: str) -> None:
        """Add the new directions to a layer's map, in place.

        Cost: K²·D + K·M·D products in float64, and as much memory as the map.
        """
        if not self.num:
            return
        words = np.frombuffer(hashlib.sha256(f"{self.seed}/{name}".encode()).digest(), dtype="<u4")
        draw = np.random.RandomState(words.astype(np.uint32))
        if layer.after is not None:
            layer.after = _widened(layer.after.T, self.num, draw).T.contiguous()
        if layer.before is not None:
            layer.before = _widened(layer.before, self.num, draw).T.contiguous().T
        if layer.center is not None:
            layer.center = padded(layer.center, layer.core_shape)
        if layer.table is not None:
            wider = padded(layer.table, (len(layer.table), *layer.core_shape))
            layer.table = _widened(wider, self.num, draw)


NONE = Augmentation()


def padded(values: Tensor, shape: tuple[int, ...], filling: float = 0.0) -> Tensor:
    """Return a larger tensor with the values in its first corner and zeros elsewhere."""
    if tuple(values.shape) == tuple(shape):
        return values
    wide = values.new_full(shape, filling)
    wide[tuple(slice(size) for size in values.shape)] = values
    return wide


def widened(form: LowRank, shape: tuple[int, ...]) -> LowRank:
    """Return the form of low-rank cores of a larger shape; the center in the first corner."""
    rows, columns = shape
    center = None if form.center is None else padded(form.center.expand(form.shape), (rows, columns))
    return LowRank((rows, columns), form.rank, center)


def _room(num_kept: int, size: int, num: int) -> int:
    return min(num_kept + num, size)


def _widened(rows: Tensor, num: int, draw: np.random.RandomState) -> Tensor:
    """Return rows (K, …) and up to M random rows orthogonal to them and to each other, if there is room."""
    old_KD = rows.flatten(1).double()
    num_new = _room(len(old_KD), old_KD.shape[1], num) - len(old_KD)
    if not num_new:
        return rows
    new_MD = torch.from_numpy(draw.standard_normal((num_new, old_KD.shape[1])))
    # With the inverse Gram, because rows stored in float32 or less are not exactly orthonormal. Twice is enough (Giraud, Langou and
    # Rozložník 2005).
    inverse_KK = torch.linalg.inv(old_KD @ old_KD.T)
    for _ in range(2):
        new_MD = new_MD - (new_MD @ old_KD.T) @ inverse_KK @ old_KD
        new_DM, upper_MM = torch.linalg.qr(new_MD.T)
        new_MD = (new_DM * upper_MM.diagonal().sign()).T
    return torch.cat([rows, new_MD.to(rows).view(num_new, *rows.shape[1:])])
