"""What a bundle of any rank of the models axis would weigh, as sums that a page can redo while a slider moves.

bytes(k) = shared + N · per_model + Σ over layers (fixed + k · per_direction + N · k · per_coefficient)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eigenzoo.errors import UsageError
from eigenzoo.formats.bundle.folder import open_basis
from eigenzoo.records import Layer, plain
from eigenzoo.subspace.bases.basis import STACKED
from eigenzoo.subspace.fitting.allocation import contents, overhead
from eigenzoo.subspace.fitting.bytes import COEFFICIENT_BYTES, basis_bytes
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.stack import UpdateStack
from eigenzoo.zoo.zoo import Zoo

AXES = ("models",)
ITEMSIZE = 4


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of one layer: of its mean, of each direction (to first order in the rank), and of each coefficient."""

    fixed: int
    per_direction: int
    per_coefficient: int = COEFFICIENT_BYTES


@dataclass(frozen=True)
class Sizes:
    """What a bundle weighs at any rank.

    Attributes:
        whole_zoo: bytes of all models' files.
        num_models: N.
        shared: bytes that are there once at any rank: headers, manifest, carried contents that models share.
        per_model: bytes that every model brings on average, its coefficients apart.
        layers: each layer's bytes.
    """

    whole_zoo: int
    num_models: int
    shared: int
    per_model: int
    layers: dict[str, LayerSizes]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dict(plain(self))


def sizes(source: Zoo | Subspace) -> Sizes:
    """Count what bundles of the models axis weigh, from a zoo's headers or from a bundle; within a few percent of a saved one.

    Raises UsageError for a bundle of other axes, whose ranks are not the models'.
    """
    return _of_zoo(source) if isinstance(source, Zoo) else _of_bundle(source)


def _layer_sizes(layer: Layer, update_ranks: int, num_models: int, itemsize: int) -> LayerSizes:
    fixed, one = (basis_bytes(layer, {"models": k}, AXES, itemsize, update_ranks, num_models) for k in (0, 1))
    return LayerSizes(fixed, one - fixed)


def _of_zoo(zoo: Zoo) -> Sizes:
    known = overhead(zoo, AXES, contents(zoo))
    layers = {}
    for name, layer in zoo.layers.items():
        stack = zoo.stack(name)
        ranks = sum(stack.ranks) if isinstance(stack, UpdateStack) else 0
        layers[name] = _layer_sizes(layer, ranks, len(zoo), ITEMSIZE)
    return Sizes(zoo.num_bytes, len(zoo), known.shared, known.per_model, layers)


def _of_bundle(space: Subspace) -> Sizes:
    if space.axes != AXES:
        raise UsageError(
            f"a bundle of axes {', '.join(space.axes)}", rule="sizes by rank are those of axis models alone"
        )
    itemsize: int = getattr(torch, space.manifest.dtype).itemsize
    counted, num_models = space.report["bytes"], len(space.names)
    files = open_basis(space.path)
    layers = {}
    held = coefficients = 0
    for name, basis in space.layers.items():
        ranks = files.shape(f"{name}/factors_b")[0] if basis.form == STACKED else 0
        layers[name] = _layer_sizes(basis.layer, ranks, num_models, itemsize)
        held += layers[name].fixed + basis.ranks["models"] * layers[name].per_direction
        coefficients += basis.ranks["models"] * COEFFICIENT_BYTES
    per_model = counted["per_model"] - coefficients
    shared = counted["whole_bundle"] - num_models * counted["per_model"] - held
    return Sizes(counted["whole_zoo"], num_models, max(shared, 0), per_model, layers)
