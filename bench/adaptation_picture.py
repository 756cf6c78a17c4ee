"""The picture of the adaptation bench: accuracy against the number of trained numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.adaptation_tables import Found
from bench.findings import BLUE, GREEN, GREY, VERMILION

POINTS = {
    "head-start": ("head only", 0, -30, "center"),
    "biases-start": ("biases and norms", 8, -4, "left"),
    "lora-4": ("LoRA, r = 4", 2, -20, "left"),
    "lora-8": ("LoRA, r = 8", 0, -17, "center"),
    "vera": ("VeRA", -4, -24, "center"),
    "full-start": ("all weights", -8, -3, "right"),
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
        axes.axhline(found.row("original").mean, color=GREY, lw=0.8, ls=":")
        axes.set_title(title, fontsize=10)
    all_axes[0][0].set_ylabel("accuracy on 500 test images, 12 tasks held out")
    all_axes[0][0].plot([], [], color=GREY, lw=0.8, ls=":", label="the zoo's own models, 128 steps, all weights")
    all_axes[0][0].legend(frameon=False, fontsize=9, loc="lower right")
    mean = next(iter(panels.values())).row("mean").mean
    figure.suptitle(f"What a few trained numbers buy: a tiny ViT, from the zoo's mean, which untrained has {mean:.3f}")
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
        for row in flat if kind == "learned" else ():
            axes.annotate(
                row.basis[2], (row.num_trained, row.mean), (0, 18), textcoords="offset points", ha="center", fontsize=8
            )
    axes.plot([], [], "D", mfc="none", color=GREY, label="cores 8 × 8 instead of directions")
    for row in found.rows:
        if row.key in POINTS:
            text, right, up, side = POINTS[row.key]
            axes.errorbar(row.num_trained, row.mean, row.error, fmt="s", color=GREEN, ms=5, capsize=3)
            axes.annotate(
                text, (row.num_trained, row.mean), (right, up), textcoords="offset points", ha=side, fontsize=8
            )
    axes.set(xscale="log", xlabel="trained numbers a task", ylim=(0.75, 0.99))
    axes.spines[["top", "right"]].set_visible(False)
