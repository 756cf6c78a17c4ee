"""The verdicts on small real zoos, beside what rebuilt models can do: the tables and the picture of docs/findings.md.

    python -m bench.findings [FOLDER] [--write]

FOLDER (`zoos`) keeps the zoos: one that is there, trained by the same recipe with the same libraries, is not trained
again. `--write` puts the tables between the marks in docs/findings.md and draws its picture; the text around them stays.
About eight minutes of training and one or two of measuring on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import eigenzoo as ez
from bench.pages import markdown, with_tables
from eigenzoo import nursery
from eigenzoo.cli.demo import HELD_OUT
from eigenzoo.display import in_percent
from eigenzoo.evidence.function import FunctionEvidence, Measured
from eigenzoo.nursery.recipe import PARENT, RECIPE, library_versions, plan_zoo

RANK, FEW = 16, 4
"""Directions per layer, all of them and the first few."""

DEALS = 20
"""Times that kernels are dealt anew to places."""

NO_GAP = 0.02
"""Where originals are no more accurate than the mean by this, there is nothing to recover."""

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURE = DOCS / "findings.md", DOCS / "pictures" / "findings.png"


@dataclass(frozen=True)
class Regime:
    """One row of the tables: a zoo of the nursery, how it is trained and how it is looked at.

    Attributes:
        common_start: whether one channel of all models is the same one, as a common start leaves it.
    """

    title: str
    folder: str
    kind: str
    options: Mapping[str, bool] = field(default_factory=dict)
    view: str | None = None
    common_start: bool = True


REGIMES = (
    Regime("ViT fine-tunes, head frozen", "vit-head-frozen", "digits-vit", view="delta"),
    Regime("the same, as weights", "vit-head-frozen", "digits-vit", view="weight"),
    Regime("ViT fine-tunes, head trained", "vit-head-trained", "digits-vit", {"train_head": True}, "delta"),
    Regime("LoRA, own seeds", "lora-own-seeds", "digits-lora"),
    Regime("LoRA, one seed", "lora-one-seed", "digits-lora", {"own_init": False}),
    Regime("CNN, one start", "cnn-one-start", "digits-cnn"),
    Regime("CNN, own starts", "cnn-own-starts", "digits-cnn", {"own_init": True}, common_start=False),
    Regime("CNN, one start, permuted", "cnn-permuted", "digits-cnn", {"permuted": True}, common_start=False),
    Regime("CNN, same task, one start", "cnn-same-task", "digits-cnn", {"same_task": True}),
    Regime(
        "CNN, same task, own starts",
        "cnn-same-task-own-starts",
        "digits-cnn",
        {"same_task": True, "own_init": True},
        common_start=False,
    ),
    Regime("CNN, random labels, one start", "cnn-random-labels", "digits-cnn", {"random_labels": True}),
    Regime("ViT, random labels", "vit-random-labels", "digits-vit", {"random_labels": True}, "delta"),
)


@dataclass(frozen=True)
class Found:
    """What one regime shows: geometry of all models, function of every sixth; without a common start also `dealt_anew`."""

    regime: Regime
    evidence: ez.Evidence
    function: FunctionEvidence
    dealt_anew: Mapping[str, int]


def train(regime: Regime, folder: Path) -> Path:
    """Return the regime's zoo, trained now unless it is there already."""
    path = folder / regime.folder
    if _recipe(path) != _wanted(regime):
        _tell(f"training {regime.folder}")
        nursery.make(regime.kind, path, force=True, **regime.options)
    return path


def _wanted(regime: Regime) -> dict[str, Any]:
    options = {"random_labels": False, "train_head": False, "own_init": None, **regime.options}
    plan = plan_zoo(regime.kind, num_models=None, seed=0, **options)
    return {**asdict(plan), "versions": library_versions()}


def _recipe(path: Path) -> dict[str, Any] | None:
    """What decided how a zoo came out; None where there is none."""
    try:
        saved = json.loads((path / RECIPE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return {key: value for key, value in saved.items() if key not in OUTCOMES}


OUTCOMES = ("mean_test_accuracy", "mean_train_accuracy", "parent", "models")
"""What a zoo's recipe says of the trained models."""


def measure(regime: Regime, folder: Path) -> Found:
    """Put one zoo to every control, and its held-out models to their tasks."""
    path = train(regime, folder)
    _tell(f"measuring {regime.folder}")
    parent = path / PARENT
    base = parent if regime.view == "delta" else None
    zoo = ez.open_zoo(path, view=regime.view, base=base)
    held_out = zoo.names[HELD_OUT - 1 :: HELD_OUT]
    fitted = zoo.select(names=[name for name in zoo.names if name not in held_out])
    with tempfile.TemporaryDirectory() as workspace:
        space = ez.fit(fitted, rank=RANK, workspace=Path(workspace))
        function = ez.evaluate(
            space,
            nursery.metric(path),
            models=zoo.select(names=held_out),
            ranks=[FEW, RANK],
            parent=parent if regime.view == "weight" else None,
        )
    return Found(regime, ez.evidence(zoo), function, {} if regime.common_start else dealt_anew(zoo))


def dealt_anew(zoo: ez.Zoo) -> dict[str, int]:
    """Count the deals, of `DEALS`, in which convolutions are still said to share directions.

    In each deal every model's own kernels are put at places of its own. What is shared then is how kernels look, whatever the
    channels: but for sums over all channels, no direction can be common to the models.
    """
    convolutions = [name for name, layer in zoo.layers.items() if len(layer.tensor_shape) == 4]
    stacks = {name: torch.stack([model.read(name) for model in zoo.models]) for name in convolutions}
    counts = dict.fromkeys(convolutions, 0)
    for deal in range(DEALS):
        draw = torch.Generator().manual_seed(deal)
        with tempfile.TemporaryDirectory() as folder:
            for place, model in enumerate(zoo.names):
                kernels = {name: stack[place].flatten(0, 1) for name, stack in stacks.items()}
                moved = {
                    name: each[torch.randperm(len(each), generator=draw)].view_as(stacks[name][place])
                    for name, each in kernels.items()
                }
                save_file(moved, Path(folder) / f"{model}.safetensors")
            for name, layer in ez.evidence(folder, seed=deal).layers.items():
                counts[name] += layer.dealt.directions.shared
    return counts


def geometry_table(rows: Sequence[Found]) -> list[str]:
    head = ["zoo", "models", "verdict", "values that say so", f"held out, k = {RANK}", "in-sample", "chance"]
    return markdown([*head, "mean, held out", "common origin", "auto rank"], map(_geometry, rows))


def _geometry(found: Found) -> list[str]:
    evidence = found.evidence
    verdict = evidence.verdict
    groups = [len(group) for group in evidence.lineage.groups]
    autos = [layer.chance.auto for layer in evidence.layers.values() if layer.variance > 0]
    return [
        found.regime.title,
        str(len(evidence.names)),
        f"`{verdict.code}`",
        in_percent(verdict.values[verdict.code]),
        *map(in_percent, _pooled(found)),
        in_percent(evidence.summary.mean_heldout),
        f"{len(groups)} (largest {groups[0]})" if groups else "none",
        f"{min(autos)}–{max(autos)} ({statistics.median(autos):g})",
    ]


def _pooled(found: Found) -> tuple[float, float, float]:
    """Shares of variance in the top directions, all layers together: of held-out models, of fitted ones, by chance."""
    pooled = found.evidence.to_dict()["summary"]
    place = pooled["rank"].index(RANK)
    return pooled["captured"][place], pooled["in_sample"][place], pooled["null"][place]


def function_table(rows: Sequence[Found]) -> list[str]:
    head = ["zoo", "held out", "original", "parent", "mean only", "head only", f"random, {RANK}"]
    head += [f"rebuilt, {FEW}", f"rebuilt, {RANK}", f"without the first {RANK // 2}"]
    return markdown(head, map(_function, rows))


def _function(found: Found) -> list[str]:
    means, errors = (_figures(part) for part in (found.function.mean, found.function.spread))
    cells = ("–" if mean is None else f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
    return [found.regime.title, str(found.function.num_models), *cells]


def _figures(part: Measured) -> list[Any]:
    few, full = part.rebuilt[FEW], part.rebuilt[RANK]
    return [part.original, part.parent, part.mean, part.head_only, part.random_basis[RANK], few, full, part.secondary]


def layer_table(rows: Iterable[Found]) -> list[str]:
    """The tests of the layers of some zoos, but for those that so few directions hold whatever they are."""
    head = [
        "zoo",
        "layer",
        "values",
        "verdict",
        "at k",
        "p",
        "ratio",
        "directions",
        f"held out, k = {RANK}",
        "in-sample",
        "chance",
    ]
    layers = [(found, name) for found in rows for name in found.evidence.layers]
    cells = [_layer(*each) for each in layers if each[0].evidence.layers[each[1]].layer.num_values > RANK]
    return markdown([*head, "kernels dealt anew"], cells)


def _layer(found: Found, name: str) -> list[str]:
    layer = found.evidence.layers[name]
    test, held = layer.dealt.directions, layer.unseen
    assert held is not None
    place = held.rank.index(RANK)
    return [
        found.regime.title,
        name,
        str(layer.layer.num_values),
        f"`{layer.code}`",
        str(test.rank),
        f"{test.p_value:.1g}",
        f"{test.ratio:.2f}",
        "–" if test.effective is None else f"{test.effective:.0f}",
        *(in_percent(part[place]) for part in (held.captured, held.in_sample, held.null)),
        f"shared in {found.dealt_anew[name]} of {DEALS}" if name in found.dealt_anew else "–",
    ]


def recovered(function: FunctionEvidence) -> tuple[float, float] | None:
    """Share of the gap between mean and originals that rebuilt models close, and its standard error (of a ratio of means)."""
    rows = [_figures(model) for model in function.models.values()]
    gaps, gains = [row[0] - row[2] for row in rows], [row[6] - row[2] for row in rows]
    gap = statistics.fmean(gaps)
    if gap < NO_GAP:
        return None
    share = statistics.fmean(gains) / gap
    rest = [gain - share * whole for gain, whole in zip(gains, gaps, strict=True)]
    return share, statistics.stdev(rest) / sqrt(len(rest)) / gap


BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
"""Of the palette of Okabe and Ito (2008); the grey is not."""
COLORS = {"digits-vit": BLUE, "digits-lora": VERMILION, "digits-cnn": GREEN}
LEGEND = {"digits-vit": "ViT fine-tunes", "digits-lora": "LoRA adapters", "digits-cnn": "CNNs from scratch"}
LABELS = {
    "vit-head-trained": (8, -13, "left"),
    "vit-head-frozen": (8, 5, "left"),
    "cnn-same-task": (9, 5, "left"),
    "cnn-own-starts": (9, 5, "left"),
    "cnn-permuted": (9, -13, "left"),
}
"""Where a label stands beside its point, in points, if not to the right of it."""


def draw(rows: Sequence[Found], path: Path) -> None:
    """Draw geometry across and function up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
    shown = [found for found in rows if found.regime.view != "weight"]
    chances = [_pooled(found)[2] for found in shown]
    axes.axvspan(min(chances), max(chances), color="#DDDDDD", lw=0, label="chance, from zoo to zoo")
    for line in (0.0, 1.0):
        axes.axhline(line, color=GREY, lw=0.8, ls=":")
    for found in shown:
        regime, color, across = found.regime, COLORS[found.regime.kind], _pooled(found)[0]
        point, title = recovered(found.function), regime.title
        share, error = point or (0.0, None)
        if point is None:
            title += ": nothing to recover"
        faint = "none" if point is None else color
        marker = "^" if regime.options.get("random_labels") else "o" if regime.common_start else "X"
        axes.errorbar(across, share, error, color=color, marker=marker, ms=8, mfc=faint, capsize=3, lw=1.2)
        right, up, side = LABELS.get(regime.folder, (9, -3, "left"))
        axes.annotate(title, (across, share), (right, up), textcoords="offset points", ha=side, fontsize=9)
    for kind, color in COLORS.items():
        axes.plot([], [], "o", color=color, label=LEGEND[kind])
    axes.plot([], [], "^", color=GREY, label="random labels")
    axes.plot([], [], "X", color=GREY, label="no channel in common")
    axes.set(
        xlabel=f"geometry: held-out models' variance in the top {RANK} directions of each layer",
        ylabel="function: (rebuilt − mean) / (original − mean), accuracy",
        title="A share of variance is not a share of what models can do",
        xlim=(0, 0.85),
        ylim=(-0.28, 1.08),
    )
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1, 0.4))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Print the tables; write them and the picture if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("zoos"))
    parser.add_argument("--write", action="store_true", help="write docs/findings.md and its picture")
    asked = parser.parse_args()
    started = time.perf_counter()
    rows = [measure(regime, asked.folder) for regime in REGIMES]
    unrelated = [found for found in rows if not found.regime.common_start]
    tables = {"geometry": geometry_table(rows), "function": function_table(rows), "layers": layer_table(unrelated)}
    for lines in tables.values():
        print("\n".join(lines), end="\n\n")
    if asked.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables, PAGE), encoding="utf-8")
        draw(rows, PICTURE)
    _tell(f"{time.perf_counter() - started:.0f} s")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
