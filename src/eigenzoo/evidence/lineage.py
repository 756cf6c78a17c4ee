"""Find groups of models with a common initialisation or parent.

Models with a common origin have cosines far from zero, of their weights or of LoRA's A-factors, which training changes least.
Groups are found by average linkage. The cut is in the largest gap between the levels at which clusters join, since origins are few
and far apart, while models of a subspace join at every level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from eigenzoo.display import counted
from eigenzoo.records import Layer
from eigenzoo.subspace.moments.layer_moments import LayerMoments

GAP = 0.2
"""Least gap between two levels of joining (cosines). Smaller ones also occur by chance in a subspace of few directions."""

SMALL_GAP, STANDS_OUT, ENOUGH_GAPS = 0.08, 5.0, 8
"""A smaller gap is enough if it is many times the next of many gaps, because origins may have only a tenth of the energy."""

FACTOR_A = ".lora_A"

MOST_SHOWN = 10
"""Number of groups with sizes in `repr`."""


@dataclass(frozen=True)
class Lineage:
    """Groups of common origin.

    Attributes:
        groups: names of the models of each group of two or more, the largest first.
        duplicates: pairs of models that are the same function: the first one, and each other one.
        measure: the compared values: `weights` (about each model's mean entry), `differences` from the base, `A-factors`, or
            `updates and A-factors`, the larger of the two.
        cosines: N × N, in the zoo's order of models; weighted over layers by their number of values.
        order: clustered order of the models, for a picture.
        level: the cosine that separates groups; None if nothing joins.
    """

    groups: tuple[tuple[str, ...], ...]
    duplicates: tuple[tuple[str, str], ...]
    measure: str
    cosines: tuple[tuple[float, ...], ...]
    order: tuple[int, ...]
    level: float | None

    def __repr__(self) -> str:
        sizes = [str(len(group)) for group in self.groups[:MOST_SHOWN]] + ["…"] * (len(self.groups) > MOST_SHOWN)
        groups = f"groups of {', '.join(sizes)} models" if sizes else "no groups"
        copies = counted(len(self.duplicates), "duplicate")
        return f"Lineage({counted(len(self.order), 'model')}, cosines of {self.measure}): {groups}; {copies}"


class Cosines:
    """Cosines between models, gathered layer by layer."""

    def __init__(self, num_models: int, view: str) -> None:
        self.view = view
        self.measure = {"weight": "weights", "delta": "differences", "update": "updates and A-factors"}.get(
            view, "A-factors"
        )
        self._parts = [_Average(num_models), _Average(num_models)]

    def add(self, layer: Layer, moments: LayerMoments) -> None:
        """Add one layer, for a LoRA update also its A-factors. A layer that is equal in all models is not added."""
        if self.view == "factors" and not layer.name.endswith(FACTOR_A):
            return
        if moments.variance > 0:
            raw_NN = moments.raw_NN
            if moments.sums_N is not None:
                # Entries that are positive in every model, or gains about one, do not indicate a common origin.
                raw_NN = raw_NN - torch.outer(moments.sums_N, moments.sums_N) / layer.num_values
            self._parts[0].add(raw_NN, layer.num_values)
        if moments.starts_NN is not None:
            self._parts[1].add(moments.starts_NN, layer.shape[1])

    @property
    def mean_NN(self) -> Tensor:
        """The weighted mean over layers, the larger of updates' and A-factors'; the identity if no layer was added."""
        known = [part.mean_NN for part in self._parts if part.weight > 0]
        if not known:
            return torch.eye(self._parts[0].sum_NN.shape[0], dtype=torch.float64)
        return torch.stack(known).amax(0).clamp(-1, 1)


class _Average:
    """A weighted average of cosines."""

    def __init__(self, num_models: int) -> None:
        self.sum_NN = torch.zeros(num_models, num_models, dtype=torch.float64)
        self.weight = 0.0

    def add(self, gram_NN: Tensor, weight: float) -> None:
        """Add the cosines of a Gram. A Gram with a zero model has none."""
        norms_N = gram_NN.diagonal().clamp_min(0).sqrt()
        if float(norms_N.min()) > 0:
            self.sum_NN += weight * gram_NN / (norms_N[:, None] * norms_N)
            self.weight += weight

    @property
    def mean_NN(self) -> Tensor:
        """The average so far."""
        return self.sum_NN / self.weight


def lineage(names: Sequence[str], cosines: Cosines, pairs: Iterable[tuple[str, str]]) -> Lineage:
    """Group the models of a zoo. `pairs` are models that are the same function. Cost N² log N."""
    cosines_NN = cosines.mean_NN
    duplicates = stars(pairs)
    places = {name: place for place, name in enumerate(names)}
    copies = {places[other]: places[first] for first, other in duplicates}
    groups, level = find_groups(cosines_NN, copies)
    return Lineage(
        tuple(tuple(names[place] for place in group) for group in groups),
        duplicates,
        cosines.measure,
        tuple(tuple(row) for row in cosines_NN.tolist()),
        tuple(_leaves(cosines_NN)),
        level,
    )


def stars(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Select the pairs of duplicates with the first of each set: 196 instead of 19,306 for 197 copies.

    >>> stars([("a", "b"), ("a", "c"), ("b", "c")])
    (('a', 'b'), ('a', 'c'))
    """
    known = list(pairs)
    later = {other for _, other in known}
    return tuple((first, other) for first, other in known if first not in later)


def find_groups(cosines_NN: Tensor, copies: Mapping[int, int]) -> tuple[list[list[int]], float | None]:
    """Return groups of two or more models, the largest first, and the cosine that separates them.

    Copies count as one model during the search, so that they do not hide related models.
    """
    single = [place for place in range(cosines_NN.shape[0]) if place not in copies]
    level = None
    clusters = [[place] for place in single]
    if len(single) > 1:
        from scipy.cluster.hierarchy import fcluster

        tree = _tree(cosines_NN[single][:, single])
        level = _largest_gap([1 - height for height in tree[:, 2].tolist()])
        if level is not None:
            labels = fcluster(tree, 1 - level, criterion="distance")
            clusters = [[single[i] for i in (labels == label).nonzero()[0]] for label in sorted(set(labels))]
    with_copies = [
        sorted([*cluster, *(copy for copy, first in copies.items() if first in cluster)]) for cluster in clusters
    ]
    groups = sorted((cluster for cluster in with_copies if len(cluster) > 1), key=lambda group: (-len(group), group))
    return groups, level


def _largest_gap(levels: Sequence[float]) -> float | None:
    """Return the middle of the largest gap between levels of joining, or None if it is small.

    The last level is zero, for unrelated models.
    """
    falling = sorted(levels, reverse=True)
    if falling[-1] > 0:
        falling.append(0.0)
    gaps = [(above - below, (above + below) / 2) for above, below in pairwise(falling)]
    widest, *rest = sorted(gaps, reverse=True) or [(0.0, 0.0)]
    many = len(rest) >= ENOUGH_GAPS
    stands_out = many and widest[0] >= SMALL_GAP and widest[0] >= STANDS_OUT * rest[0][0]
    return widest[1] if widest[0] >= GAP or stands_out else None


def _tree(cosines_NN: Tensor) -> Any:
    """Return the tree of average linkage as SciPy's array. Heights are one minus the cosine at which clusters join."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    distances = (1 - cosines_NN).clamp_min(0)
    distances = ((distances + distances.T) / 2).fill_diagonal_(0)
    return linkage(squareform(distances.numpy(), checks=False), method="average")


def _leaves(cosines_NN: Tensor) -> list[int]:
    from scipy.cluster.hierarchy import leaves_list

    return [int(leaf) for leaf in leaves_list(_tree(cosines_NN))] if cosines_NN.shape[0] > 1 else [0]


def as_lineages(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the models' indices by lineage: the groups, and every other model as its own lineage."""
    places = {name: place for place, name in enumerate(names)}
    grouped = [[places[name] for name in group] for group in groups]
    inside = {place for group in grouped for place in group}
    return [*grouped, *([place] for place in range(len(names)) if place not in inside)]
