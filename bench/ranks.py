"""Held-out accuracy against numbers per layer, on the demo's zoo: the README's table and picture.

python -m bench.ranks demo/zoo docs/pictures/ranks.png
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import eigenzoo as ez
from eigenzoo import nursery
from eigenzoo.cli.demo import HELD_OUT
from eigenzoo.records import weighted_share

RANKS = (1, 2, 4, 8, 16, 32, 59)


def measure(zoo_folder: Path) -> dict[str, list[float]]:
    """Average accuracies of held-out models: as they were, rebuilt at every rank, as the mean, as the parent."""
    zoo, base = ez.open_zoo(zoo_folder), zoo_folder / "_base"
    held_out = zoo.names[HELD_OUT - 1 :: HELD_OUT]
    fitted = zoo.select(names=[name for name in zoo.names if name not in held_out])
    table: dict[str, list[float]] = {
        key: [] for key in ("rank", "rebuilt", "captured", "heldout", "null", "ratio", "per_model")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in RANKS:
            space = ez.fit(fitted, rank=rank, workspace=folder)
            space.save(folder / f"bundle-{rank}")
            report = ez.load(folder / f"bundle-{rank}").report
            scores = []
            for model, coefficients in space.project_many(zoo.select(names=held_out)).items():
                space.rebuild(coefficients).save(folder / f"{rank}" / model)
                scores.append(nursery.accuracy(folder / f"{rank}" / model, base=base))
                if rank == RANKS[0]:
                    space.rebuild(coefficients, mean_only=True).save(folder / "mean" / model)
            table["rank"].append(rank)
            table["rebuilt"].append(sum(scores) / len(scores))
            for key in ("captured", "heldout", "null"):
                table[key].append(weighted_share(list(report["layers"].values()), key) or 0.0)
            table["ratio"].append(report["bytes"]["whole_zoo"] / report["bytes"]["whole_bundle"])
            table["per_model"].append(report["bytes"]["per_model"])
        table["original"] = [_average(nursery.accuracy(zoo_folder / model, base=base) for model in held_out)]
        table["mean"] = [_average(nursery.accuracy(folder / "mean" / model, base=base) for model in held_out)]
        tasks = [next(iter(zoo.models[zoo.place(model)].metadata.values()))["task"] for model in held_out]
        table["parent"] = [_average(nursery.accuracy(base, task=task) for task in tasks)]
    return table


def _average(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def draw(table: dict[str, list[float]], path: Path) -> None:
    """Draw accuracy and captured variance against the rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ink, blue, grey, orange = "#222222", "#1f6feb", "#8b949e", "#d4762c"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.axhline(table["original"][0], color=ink, lw=1.2, ls="--", label="original")
    left.plot(table["rank"], table["rebuilt"], color=blue, marker="o", label="rebuilt from k numbers per layer")
    left.axhline(table["mean"][0], color=orange, lw=1.2, label="mean only (the control)")
    left.axhline(table["parent"][0], color=grey, lw=1.2, label="parent")
    left.set(
        xscale="log",
        ylabel="accuracy on the task's test images",
        title="Models that the fit has never seen",
        ylim=(0.45, 1),
    )
    right.plot(table["rank"], table["captured"], color=ink, marker="o", label="fitted models (in-sample)")
    right.plot(table["rank"], table["heldout"], color=blue, marker="o", label="models held out (five folds)")
    right.plot(table["rank"], table["null"], color=orange, marker="o", label="unrelated models, in-sample (null)")
    right.set(xscale="log", ylabel="share of the variance about the mean", title="Is anything shared?", ylim=(0, 1))
    for axis in (left, right):
        axis.set_xlabel("directions per layer, k")
        axis.set_xticks(table["rank"], [str(int(rank)) for rank in table["rank"]])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5, loc="center right" if axis is left else "lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Print the table, draw the picture."""
    table = measure(Path(sys.argv[1]))
    print(
        "| k | held-out accuracy | variance kept in-sample | … held out | … null | whole zoo / whole bundle | one more model |"
    )
    print("|---|---|---|---|---|---|---|")
    for place, rank in enumerate(table["rank"]):
        shares = " | ".join(f"{table[key][place]:.3f}" for key in ("rebuilt", "captured", "heldout", "null"))
        print(f"| {rank} | {shares} | {table['ratio'][place]:.2f} | {table['per_model'][place] / 1000:.1f} kB |")
    print(f"original {table['original'][0]:.3f}, mean only {table['mean'][0]:.3f}, parent {table['parent'][0]:.3f}")
    if len(sys.argv) > 2:
        draw(table, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
