"""The verdict: one of four words, by a rule that is written down in docs/evidence.md with the reason of every threshold.

A layer is judged on models held out of the fit, once with models dealt to folds at random, and where groups of common origin were
found once more with whole lineages held out together: what is gone then was lineage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from eigenzoo.evidence.mean import MeanShare
from eigenzoo.evidence.unseen import TESTED_RANK, Capture

NO_SHARED_STRUCTURE, SHARED_MEAN = "no-shared-structure", "shared-mean"
SHARED_LINEAGE, SHARED_SUBSPACE = "shared-lineage", "shared-subspace"
NO_VARIANCE = "no-variance"
CODES = (NO_SHARED_STRUCTURE, SHARED_MEAN, SHARED_LINEAGE, SHARED_SUBSPACE)
"""From the most to the least sceptical: on equal weights the former is said."""

SIGNIFICANCE = 1e-3
"""Chance that a layer of noise is found to share directions; zoos have tens of layers."""

DISTINCT = 1.25
"""Leading directions hold this many times what an average one does, or they are no directions but a cloud."""

MATERIAL_SHARE, MATERIAL_RATIO = 0.05, 2.0
"""Few directions that hold this share of unseen models, and this many times chance, are a subspace even if the cloud is flat."""

MEAN_SHARE, MEAN_DEVIATIONS = 0.05, 4.0
"""The mean counts from this share of a model's energy on, this many standard deviations away from none."""


@dataclass(frozen=True)
class Directions:
    """Whether unseen models lie along the fitted ones' leading directions.

    Attributes:
        shared: the answer; `distinct` and `material` are the two ways to it.
        rank: the number of directions at which it is clearest.
        p_value: of the contrasts at that rank against a cloud without directions, times the number of ranks tried.
        ratio: captured over what as many average directions hold.
    """

    shared: bool
    distinct: bool
    material: bool
    rank: int
    p_value: float
    ratio: float


NOWHERE = Directions(False, False, False, 0, 1.0, 0.0)


@dataclass(frozen=True)
class Findings:
    """What held-out models say, under one way of dealing them to folds."""

    directions: Directions
    mean: MeanShare

    @property
    def mean_is_shared(self) -> bool:
        """Whether the mean holds more than chance, and enough of it."""
        return self.mean.common >= MEAN_SHARE and self.mean.deviations >= MEAN_DEVIATIONS


def directions(layers: Sequence[tuple[Capture, float]]) -> Directions:
    """Judge one layer, or several together, each with its weight (its number of values).

    Per rank, Σ w·f·(captured / average direction) is compared with a χ² of matched mean and variance (Satterthwaite 1946).
    """
    known = [(sums, weight) for sums, weight in layers if sums.freedom > 0 and sums.cloud > 0]
    if not known:
        return NOWHERE
    shortest = min((sums.rank for sums, _ in known), key=len)
    tested = [place for place, rank in enumerate(shortest) if rank <= TESTED_RANK and _same_rank(known, place)]
    tried = [_at_rank(known, place, len(tested)) for place in tested]
    if not tried:
        return NOWHERE
    best = min(tried, key=lambda found: (not found.shared, found.p_value, -found.ratio))
    return Directions(
        any(found.shared for found in tried),
        any(found.distinct for found in tried),
        any(found.material for found in tried),
        best.rank,
        best.p_value,
        best.ratio,
    )


def _same_rank(layers: Sequence[tuple[Capture, float]], place: int) -> bool:
    """Ranks are powers of two but for the last of each layer."""
    return len({sums.rank[place] for sums, _ in layers}) == 1


def _at_rank(layers: Sequence[tuple[Capture, float]], place: int, num_tried: int) -> Directions:
    rank = layers[0][0].rank[place]
    weighted = sum(weight * sums.freedom for sums, weight in layers)
    squared = sum(weight**2 * sums.freedom for sums, weight in layers)
    ratio = sum(weight * sums.freedom * sums.ratio[place] for sums, weight in layers) / weighted
    freedom = rank * weighted**2 / squared
    p_value = min(1.0, _chi_square_tail(ratio * freedom, freedom) * num_tried)
    distinct = p_value < SIGNIFICANCE and ratio >= DISTINCT
    total = sum(weight for _, weight in layers)
    share = sum(weight * sums.contrast[place] / sums.contrast_energy for sums, weight in layers) / total
    chance = sum(weight * sums.over_chance[place] for sums, weight in layers) / total
    isotropic = min(1.0, _chi_square_tail(chance * freedom, freedom) * num_tried)
    material = share >= MATERIAL_SHARE and chance >= MATERIAL_RATIO and isotropic < SIGNIFICANCE
    decisive = isotropic if material and not distinct else p_value
    return Directions(distinct or material, distinct, material, rank, decisive, ratio)


def _chi_square_tail(value: float, freedom: float) -> float:
    halves = torch.tensor([freedom / 2, value / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def judge(dealt: Findings, across: Findings | None) -> tuple[str, str]:
    """Return the code, and the control that decided: models dealt at random, and whole lineages held out where there are any."""
    if dealt.directions.shared:
        if across is not None and not across.directions.shared:
            return SHARED_LINEAGE, "lineage"
        return SHARED_SUBSPACE, "unseen"
    if dealt.mean_is_shared:
        if across is not None and not across.mean_is_shared:
            return SHARED_LINEAGE, "lineage"
        return SHARED_MEAN, "mean"
    return NO_SHARED_STRUCTURE, "unseen"


def judge_zoo(
    codes: Mapping[str, tuple[str, int]], together: tuple[str, str] | None
) -> tuple[str, str, dict[str, int], dict[str, float]]:
    """Judge the zoo from its layers' codes and numbers of values, and from all layers together.

    The code of the layers that hold most values; where that is no structure or the mean, but all layers together show directions
    that none shows alone, that. Returns code, control, and per code the count of layers and the share of values.
    """
    varying = {name: found for name, found in codes.items() if found[0] != NO_VARIANCE}
    total = sum(num_values for _, num_values in varying.values())
    layers = {code: sum(found == code for found, _ in codes.values()) for code in (*CODES, NO_VARIANCE)}
    if not total:
        return SHARED_MEAN, "variance", layers, dict.fromkeys(CODES, 0.0)
    values = {code: sum(num for found, num in varying.values() if found == code) / total for code in CODES}
    code = max(CODES, key=lambda each: (values[each], -CODES.index(each)))
    if code in (NO_SHARED_STRUCTURE, SHARED_MEAN) and together is not None:
        return *together, layers, values
    return code, DECIDED_BY[code], layers, values


DECIDED_BY = {
    NO_SHARED_STRUCTURE: "unseen",
    SHARED_MEAN: "mean",
    SHARED_LINEAGE: "lineage",
    SHARED_SUBSPACE: "unseen",
}
"""The control that decides each code."""
