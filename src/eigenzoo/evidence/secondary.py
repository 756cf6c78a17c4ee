"""The secondary subspace: is there anything shared outside the top k directions?"""

from __future__ import annotations

from dataclasses import dataclass

from eigenzoo.evidence.unseen import Capture


@dataclass(frozen=True)
class Secondary:
    """Directions k + 1 to `upto`, measured as the top ones are.

    Attributes:
        rank: k.
        upto: the last direction looked at: 2k, or the largest rank that the folds span.
        in_sample, captured, null: shares of the variance of the fitted models, of held-out models, and of unrelated ones, that
            these directions hold.
        ratio: captured of held-out models over what as many directions of no distinction hold.
    """

    rank: int
    upto: int
    in_sample: float
    captured: float
    null: float
    ratio: float


def secondary(sums: Capture | None, rank: int) -> Secondary | None:
    """Measure what is outside the top `rank`; from the sums over folds. None where the folds span no more than that.

    Ranks are looked at on the grid of the folds: `rank` counts as the largest one at or below it.
    """
    if sums is None:
        return None
    places = [place for place, known in enumerate(sums.rank) if known <= max(rank, 1)]
    top = places[-1]
    if top + 1 >= len(sums.rank):
        return None
    between = sums.rank[top + 1] - sums.rank[top]
    chance = between * sums.cloud
    return Secondary(
        sums.rank[top],
        sums.rank[top + 1],
        (sums.in_sample[top + 1] - sums.in_sample[top]) / sums.fitted,
        (sums.captured[top + 1] - sums.captured[top]) / sums.energy,
        (sums.null[top + 1] - sums.null[top]) / sums.energy,
        (sums.contrast[top + 1] - sums.contrast[top]) / chance if chance > 0 else 0.0,
    )
