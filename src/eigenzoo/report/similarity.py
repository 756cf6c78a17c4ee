"""Order the matrix of the models' cosines by clusters, and choose the range of its colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eigenzoo.report.document import Report
from eigenzoo.report.numbers import Floats, floats


@dataclass(frozen=True)
class Similarity:
    """The matrix for drawing.

    Attributes:
        names: names of the models, similar ones side by side.
        cosines_NN: rows and columns in that order.
        low, high: the least and the largest cosine between different models, in hundredths, rounded outwards; both as far from
            zero as the farther one where a cosine is negative. Colours run from one to the other.
        runs: neighbours of one lineage group: (group, first place, last place).
    """

    names: list[str]
    cosines_NN: Floats
    low: float
    high: float
    runs: list[tuple[int, int, int]]


def clustered(report: Report) -> Similarity:
    """Return the matrix of a report in clustered order, if it has one."""
    names, found = report.evidence["names"], report.evidence["lineage"]
    order = found["order"] if sorted(found["order"]) == list(range(len(names))) else list(range(len(names)))
    cosines_NN = np.nan_to_num(np.stack([floats(row) for row in found["cosines"]]))[np.ix_(order, order)]
    names = [names[place] for place in order]
    low, high = colour_range(cosines_NN)
    return Similarity(names, cosines_NN, low, high, group_runs(names, found["groups"]))


def colour_range(cosines_NN: Floats) -> tuple[float, float]:
    """Return the range of the cosines between different models; see `Similarity`.

    >>> colour_range(np.array([[1.0, 0.934], [0.934, 1.0]])), colour_range(np.array([[1.0, -0.2], [-0.2, 1.0]]))
    ((0.93, 0.94), (-0.2, 0.2))
    """
    between = cosines_NN[~np.eye(len(cosines_NN), dtype=bool)].clip(-1, 1)
    # Round-off must not move a cosine of whole hundredths to the next one.
    low = round(float(np.floor(100 * between.min() + 1e-6))) / 100
    high = round(float(np.ceil(100 * between.max() - 1e-6))) / 100
    if low < 0:
        return -max(-low, high), max(-low, high)
    return (low, high) if high > low else (round(low - 0.01, 2), high)


def group_runs(names: list[str], groups: list[list[str]]) -> list[tuple[int, int, int]]:
    """Runs of neighbours of one lineage group: (group, first place, last place).

    >>> group_runs(["a", "b", "c", "d"], [["a", "b"], ["d", "c"]])
    [(0, 0, 1), (1, 2, 3)]
    """
    group_of = {name: number for number, group in enumerate(groups) if len(group) > 1 for name in group}
    runs: list[tuple[int, int, int]] = []
    for place, name in enumerate(names):
        group = group_of.get(name)
        if group is None:
            continue
        if runs and runs[-1][0] == group and runs[-1][2] == place - 1:
            runs[-1] = (group, runs[-1][1], place)
        else:
            runs.append((group, place, place))
    return runs
