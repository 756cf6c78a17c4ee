"""All methods of merging on tasks that one network can do at once: the tables of docs/merge.md.

    python -m bench.merge_tasks [FOLDER] [--write]

Trains zoos of kind `digits-tasks` of three seeds in FOLDER (`zoos`), adapters and fine-tunes of eight tasks each, and keeps them.
Every method is measured as it comes, and at the best of four sizes of its result by the validation part; all figures are of the
test part. `--write` puts the tables between the marks in docs/merge.md. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import ViTForImageClassification

import eigenzoo as ez
from bench.pages import markdown, with_tables
from eigenzoo import nursery
from eigenzoo.display import in_percent
from eigenzoo.merge.choosing import SIZES, nai
from eigenzoo.merge.input_grams import collect
from eigenzoo.merge.methods import METHODS
from eigenzoo.nursery import arranged, digits
from eigenzoo.nursery.recipe import PARENT, plan_zoo
from eigenzoo.passes.process import quietly
from eigenzoo.zoo.zoo import Zoo

PAGE = Path(__file__).parent.parent / "docs" / "merge.md"
SEEDS, KINDS = (0, 1, 2), (False, True)
VALIDATION, TEST = arranged.PARTS


def mean(scores: Mapping[str, float]) -> float:
    """The mean over tasks."""
    return statistics.fmean(scores.values())


def grams_of(zoo: Zoo, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Moments of the inputs of every layer, each model's on its own task's training images."""
    data = arranged.ArrangedData(digits.load())
    found = {}
    for name, path in zip(zoo.names, (model.path for model in zoo.models), strict=True):
        task = arranged.Task(int(name.removeprefix("task-")))
        images = arranged.arrange(data.training_set(task)[0], task.order)
        with quietly():
            model: Any = PeftModel.from_pretrained(
                ViTForImageClassification.from_pretrained(folder / PARENT), str(path)
            )
        found[name] = collect(model.eval(), list(zoo.layers), [{"pixel_values": images}])
    return found


def measure_zoo(folder: Path, full: bool, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Scores on the test part of every control and of every method, as it comes and tuned, by task."""
    metric = nursery.tasks_metric(folder)
    zoo = ez.open_zoo(sorted(folder.glob("task-*")), base=folder / PARENT if full else None)
    grams = {} if full else grams_of(zoo, folder)
    found: dict[str, dict[str, dict[str, float]]] = {"controls": {}, "untuned": {}, "tuned": {}}
    paths = {name: model.path for name, model in zip(zoo.names, zoo.models, strict=True)}
    validated = {name: mean(metric(path, VALIDATION)) for name, path in paths.items()}
    found["controls"] = {
        "base": metric(folder / PARENT, TEST),
        "best single model": metric(paths[max(validated, key=lambda name: validated[name])], TEST),
        "own": {name: metric(path, TEST)[name] for name, path in paths.items()},
        "joint training": joint_scores(folder, full, seed),
    }
    size = ez.merge(zoo, "mean").certificate.norm
    for name, method in METHODS.items():
        # Moments of a loaded model have transformers' names of modules, which are not those of the files' tensors.
        if method.models[1] < len(zoo) or (full and (method.space == "columns" or name == "regmean")):
            continue
        options: dict[str, Any] = {"grams": grams} if name == "regmean" else {}
        norm = ez.merge(zoo, name, **options).certificate.norm
        tried = {}
        for scale in (1.0, *(each * size / norm for each in SIZES)):
            with tempfile.TemporaryDirectory() as place:
                merged = ez.merge(zoo, name, scale=scale, **options).save(Path(place) / "merged")
                tried[scale] = mean(metric(merged, VALIDATION)), metric(merged, TEST)
        found["untuned"][name] = tried[1.0][1]
        found["tuned"][name] = max(tried.values(), key=lambda pair: pair[0])[1]
    return found


def joint_scores(folder: Path, full: bool, seed: int) -> dict[str, float]:
    """Scores of one model that was trained on all tasks at once."""
    plan = plan_zoo("digits-tasks", None, seed, False, False, None, full=full)
    parent, heads = (
        ViTForImageClassification.from_pretrained(folder / PARENT).eval(),
        arranged.read_heads(folder / PARENT),
    )
    tasks = arranged.tasks_of(heads)
    kind, weights = arranged.train_joint(plan, parent, heads, tasks)
    images, labels = arranged.ArrangedData(digits.load()).part(TEST)
    scores = {}
    for task in tasks:
        with torch.no_grad():
            answers = kind.forward({**weights, **kind.frozen(task)}, images).argmax(-1)
        scores[task.name] = float((answers == labels).double().mean())
    return scores


def shown(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    return f"{in_percent(statistics.fmean(values))} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def table(runs: list[dict[str, dict[str, dict[str, float]]]]) -> list[str]:
    """One kind's table: controls first, methods by their tuned scores."""
    rows: list[list[str]] = []
    for name in runs[0]["controls"]:
        scores = [run["controls"][name] for run in runs]
        rows.append([f"*{name}*", shown([mean(each) for each in scores]), "", _nai(runs, scores)])
    methods = sorted(runs[0]["tuned"], key=lambda name: -sum(mean(run["tuned"][name]) for run in runs))
    for name in methods:
        tuned, untuned = [run["tuned"][name] for run in runs], [run["untuned"][name] for run in runs]
        rows.append(
            [
                f"`{name}`",
                shown([mean(each) for each in tuned]),
                shown([mean(each) for each in untuned]),
                _nai(runs, tuned),
            ]
        )
    return markdown(("method", "accuracy, size chosen", "accuracy, as it comes", "normalised, size chosen"), rows)


def _nai(runs: list[dict[str, dict[str, dict[str, float]]]], scores: list[dict[str, float]]) -> str:
    values = []
    for run, each in zip(runs, scores, strict=True):
        value = nai({"base": run["controls"]["base"], "own": run["controls"]["own"], "merged": each})
        assert value is not None
        values.append(value)
    return shown(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("zoos"))
    parser.add_argument("--write", action="store_true")
    words = parser.parse_args()
    torch.set_num_threads(1)
    tables = {}
    for full in KINDS:
        runs = []
        for seed in SEEDS:
            folder = words.folder / f"tasks-{'full' if full else 'lora'}-{seed}"
            if not folder.exists():
                nursery.make("digits-tasks", folder, seed=seed, full=full)
            runs.append(measure_zoo(folder, full, seed))
            print(folder, {name: round(mean(scores), 4) for name, scores in runs[-1]["tuned"].items()}, flush=True)
        tables["tasks of fine-tunes" if full else "tasks of adapters"] = table(runs)
    for name, text in tables.items():
        print("\n".join(["", name, "", *text]))
    if words.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables, PAGE), encoding="utf-8")


if __name__ == "__main__":
    main()
