"""Draw how much the updates of models get in each other's way: matrices of overlaps, beside those of unrelated updates."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas

from eigenzoo.report.static_figures import INK, SHADES, STYLE

MOST_NAMES = 24
"""Largest number of models whose names stand beside a matrix."""

LONGEST = 18
PANELS = (
    ("outputs", "outputs"),
    ("null_outputs", "outputs, unrelated"),
    ("inputs", "inputs"),
    ("null_inputs", "inputs, unrelated"),
)


def draw_interference(found: Mapping[str, Any], kind: str) -> bytes:
    """Return a picture, png or svg, of the overlaps of all pairs of models: the mean squared cosine of their principal angles.

    Args:
        found: `Interference.to_dict()` of a merge. Four matrices with one scale of colours: outputs and inputs, each beside that of
            unrelated updates with the same singular values. A model overlaps with itself wholly; the diagonal is left out.
    """
    names, out = [_short(name) for name in found["models"]], io.BytesIO()
    matrices = {key: np.array(found[key], dtype=float) for key, _ in PANELS}
    between = ~np.eye(len(names), dtype=bool)
    highest = max([0.01, *(float(matrix[between].max(initial=0.0)) for matrix in matrices.values())])
    with rc_context({**STYLE, "font.size": 8, "axes.titlesize": 9}):
        side = 2.6 + 0.09 * min(len(names), MOST_NAMES)
        canvas = Canvas(figsize=(2 * side + 1.2, 2 * side), layout="constrained")
        for axes, (key, title) in zip(canvas.subplots(2, 2).flat, PANELS, strict=True):
            shown = np.where(between, matrices[key], np.nan)
            image = axes.imshow(shown, cmap=SHADES, vmin=0, vmax=highest, interpolation="nearest")
            axes.set_title(title)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.tick_params(length=0)
            places = range(len(names)) if len(names) <= MOST_NAMES else ()
            axes.set_xticks(places, [names[place] for place in places], rotation=90)
            axes.set_yticks(places, [names[place] for place in places])
            if len(names) <= 9:
                for row, column in zip(*np.nonzero(between), strict=True):
                    share = matrices[key][row, column]
                    colour = "white" if share > 0.6 * highest else INK
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
        bar = canvas.colorbar(image, ax=canvas.axes, shrink=0.6, format=lambda value, _: f"{100 * value:.3g} %")
        bar.outline.set_visible(False)
        bar.set_label("mean squared cosine of principal angles")
        canvas.suptitle("Overlap of two models' updates, beside unrelated updates", fontsize=10)
        canvas.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else {})
    return out.getvalue()


def _short(text: str) -> str:
    """Shorten a name in the middle."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[-half + 1 :]}"
