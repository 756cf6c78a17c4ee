"""The picture of the adaptation bench: accuracy against the number of trained numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.adaptation_tables import Found
from bench.findings import BLUE, GREEN, GREY, VERMILION

POINTS = {
    "head-start": ("head only", 8, -3, "left"),
    "learned-k = 16-mean-head": ("k = 16 and head", 6, 6, "left"),
    "biases-start": ("biases and norms", 7, -11, "left"),
    "lora-4": ("LoRA, r = 4", 7, -11, "left"),
    "lora-8": ("LoRA, r = 8, all layers", 7, -11, "left"),
    "vera": ("VeRA", 7, -11, "left"),
    "full-start": ("all weights", -6, -13, "center"),
}
"""Labels of the other methods, and where they stand beside their points, in points."""

LINES = {
    "learned": ("coefficients in the zoo's basis", BLUE),
    "random": ("in a random basis of the same size", VERMILION),
}


def draw(panels: Mapping[str, Found], path: Path) -> None:
    """Draw one panel for each number of training images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(5.6 * len(panels), 5.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (title, found) in zip(all_axes[0], panels.items(), strict=True):
        _panel(axes, found)
        axes.set_title(title, fontsize=10)
    all_axes[0][0].set_ylabel("accuracy on 500 test images, 12 tasks held out")
    all_axes[0][-1].legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle("What a few trained numbers buy: fine-tunes of a tiny ViT, started at the zoo's mean")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axes: Any, found: Found) -> None:
    for kind, (label, color) in LINES.items():
        rows = [row for row in found.rows if row.basis and row.basis[:2] == (kind, "mean")]
        flat = [row for row in rows if row.basis and row.basis[2].startswith("k")]
        cores = [row for row in rows if row not in flat]
        across = [row.num_trained for row in flat]
        axes.errorbar(
            across,
            [row.mean for row in flat],
            [row.error for row in flat],
            fmt="o-",
            color=color,
            capsize=3,
            label=label,
        )
        for row in cores:
            axes.errorbar(row.num_trained, row.mean, row.error, fmt="D", mfc="none", color=color, capsize=3)
        for row in flat if kind == "random" else ():
            axes.annotate(
                row.basis[2], (row.num_trained, row.mean), (0, -15), textcoords="offset points", ha="center", fontsize=8
            )
    axes.plot([], [], "D", mfc="none", color=GREY, label="cores 8 × 8 instead of directions")
    for row in found.rows:
        if row.key in POINTS:
            text, right, up, side = POINTS[row.key]
            axes.errorbar(row.num_trained, row.mean, row.error, fmt="s", color=GREEN, ms=5, capsize=3)
            axes.annotate(
                text, (row.num_trained, row.mean), (right, up), textcoords="offset points", ha=side, fontsize=8
            )
    for key, text in {"original": "the zoo's own models, 128 steps", "mean": "the zoo's mean, untrained"}.items():
        axes.axhline(found.row(key).mean, color=GREY, lw=0.8, ls=":")
        axes.annotate(
            text,
            (1, found.row(key).mean),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GREY,
        )
    axes.set(xscale="log", xlabel="trained numbers a task")
    axes.spines[["top", "right"]].set_visible(False)
