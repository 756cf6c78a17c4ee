"""Lineage: which models share an initialisation or a parent, and is what the zoo shares more than that?

Models of common origin have a common part, which shows as cosines far from zero: of the weights, or of LoRA's A-factors, which
training moves least from their random start. Groups are found by average linkage; the cut lies in the largest gap between the
levels at which clusters join, since origins are few and far apart while a mere subspace joins its models at every level.
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
"""Least gap between two levels of joining (cosines): smaller ones also open by chance in a subspace of few directions."""

SMALL_GAP, STANDS_OUT, ENOUGH_GAPS = 0.08, 5.0, 8
"""A smaller gap will do where it is many times the next of many: origins that hold a tenth of the energy are origins."""

FACTOR_A = ".lora_A"

MOST_SHOWN = 10
"""Groups whose sizes `repr` shows."""


@dataclass(frozen=True)
class Lineage:
    """Groups of common origin.

    Attributes:
        groups: names of the models of each group of two or more, the largest first.
        duplicates: pairs of models that are one function: the first of them, and each other.
        measure: what cosines are of: `weights` (about each model's mean entry), `differences` from the base, `A-factors`, or
            `updates and A-factors`, the larger of the two.
        cosines: N × N, in the zoo's order of models; weighted over layers by their number of values.
        order: the models clustered, for a picture.
        level: the cosine at which groups are told apart; None where nothing joins.
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
        """Add one layer; one that is equal in all models says nothing. Of a LoRA update also its A-factors."""
        if self.view == "factors" and not layer.name.endswith(FACTOR_A):
            return
        if moments.variance > 0:
            raw_NN = moments.raw_NN
            if moments.sums_N is not None:
                # Entries that are positive in every model, or gains about one, are no common origin.
                raw_NN = raw_NN - torch.outer(moments.sums_N, moments.sums_N) / layer.num_values
            self._parts[0].add(raw_NN, layer.num_values)
        if moments.starts_NN is not None:
            self._parts[1].add(moments.starts_NN, layer.shape[1])

    @property
    def mean_NN(self) -> Tensor:
        """The weighted mean over layers, the larger of updates' and A-factors'; the identity where no layer told anything."""
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
        """Add the cosines of a Gram; one with a model of zero has none."""
        norms_N = gram_NN.diagonal().clamp_min(0).sqrt()
        if float(norms_N.min()) > 0:
            self.sum_NN += weight * gram_NN / (norms_N[:, None] * norms_N)
            self.weight += weight

    @property
    def mean_NN(self) -> Tensor:
        """The average so far."""
        return self.sum_NN / self.weight


def lineage(names: Sequence[str], cosines: Cosines, pairs: Iterable[tuple[str, str]]) -> Lineage:
    """Group the models of a zoo; `pairs` are those that are one function. Cost N² log N."""
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
    """Keep of all pairs of duplicates those with the first of each set: 196 and not 19,306 for 197 copies.

    >>> stars([("a", "b"), ("a", "c"), ("b", "c")])
    (('a', 'b'), ('a', 'c'))
    """
    known = list(pairs)
    later = {other for _, other in known}
    return tuple((first, other) for first, other in known if first not in later)


def find_groups(cosines_NN: Tensor, copies: Mapping[int, int]) -> tuple[list[list[int]], float | None]:
    """Groups of two or more models, the largest first, and the cosine that tells them apart.

    Copies are one model while groups are looked for, so that what is equal does not hide what is only akin.
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
    """The middle of the largest gap between levels of joining, unrelated models' zero the last of them; None where it is small."""
    falling = sorted(levels, reverse=True)
    if falling[-1] > 0:
        falling.append(0.0)
    gaps = [(above - below, (above + below) / 2) for above, below in pairwise(falling)]
    widest, *rest = sorted(gaps, reverse=True) or [(0.0, 0.0)]
    many = len(rest) >= ENOUGH_GAPS
    stands_out = many and widest[0] >= SMALL_GAP and widest[0] >= STANDS_OUT * rest[0][0]
    return widest[1] if widest[0] >= GAP or stands_out else None


def _tree(cosines_NN: Tensor) -> Any:
    """The tree of average linkage, as SciPy's array: heights are one minus the cosine at which clusters join."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    distances = (1 - cosines_NN).clamp_min(0)
    distances = ((distances + distances.T) / 2).fill_diagonal_(0)
    return linkage(squareform(distances.numpy(), checks=False), method="average")


def _leaves(cosines_NN: Tensor) -> list[int]:
    from scipy.cluster.hierarchy import leaves_list

    return [int(leaf) for leaf in leaves_list(_tree(cosines_NN))] if cosines_NN.shape[0] > 1 else [0]


def as_lineages(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[list[int]]:
    """Every model's place, by lineage: the groups, and every other model as its own."""
    places = {name: place for place, name in enumerate(names)}
    grouped = [[places[name] for name in group] for group in groups]
    inside = {place for group in grouped for place in group}
    return [*grouped, *([place] for place in range(len(names)) if place not in inside)]
