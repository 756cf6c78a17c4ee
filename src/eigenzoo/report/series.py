"""Name, colour, dashes and symbol of each kind of number, the same in all figures of the page and on paper."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """One kind of number.

    Attributes:
        name: its name in legends.
        colour: the page's variable of its colour.
        dash: plotly's name of its dashes.
        symbol: plotly's name of its symbol; empty for none.
        width: width of its line on the page in pixels.
    """

    name: str
    colour: str
    dash: str
    symbol: str
    width: float = 2


SERIES = {
    "heldout": Series("held out", "heldout", "solid", "circle", 2.5),
    "in_sample": Series("in-sample", "insample", "dash", "square"),
    "all_models": Series("all models", "orange", "solid", "triangle-up", 2.5),
    "null": Series("chance, held out", "null", "dot", "x"),
    "leave_one_out": Series("leave-one-out", "green", "dashdot", "diamond"),
    "norm_matched": Series("unrelated (same norms)", "null", "dot", ""),
    "iid": Series("unrelated (iid)", "sky", "dot", "", 1.5),
    "permuted": Series("unrelated (permuted)", "mean", "longdash", "", 1.5),
    "spectrum_matched": Series("unrelated (same spectra)", "green", "longdashdot", "", 1.5),
    "outputs": Series("outputs", "heldout", "solid", "circle"),
    "outputs_null": Series("outputs, chance", "heldout", "dot", "", 1.5),
    "inputs": Series("inputs", "insample", "solid", "square"),
    "inputs_null": Series("inputs, chance", "insample", "dot", "", 1.5),
    "both": Series("outputs and inputs", "green", "solid", "diamond"),
    "axis_models": Series("axis models", "mean", "dashdot", ""),
    "alone": Series("each model cut alone", "orange", "dash", "triangle-up", 2.5),
    "alone_mean": Series("each cut alone about the mean", "orange", "dot", "triangle-up"),
    "bundle": Series("this bundle", "ink", "solid", "x", 2.5),
    "original": Series("originals", "ink", "solid", "", 1.5),
    "parent": Series("parent", "green", "dash", "", 1.5),
    "mean": Series("mean alone", "mean", "dashdot", "", 1.5),
    "head_only": Series("mean with own heads", "orange", "longdash", "", 1.5),
    "secondary": Series("secondary directions", "sky", "dot", "", 1.5),
    "limit": Series("limit", "null", "dot", "", 1.5),
}
