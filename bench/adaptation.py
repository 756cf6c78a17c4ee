"""What a few trained numbers buy on tasks that no model of the zoo has learned: the tables of docs/findings.md, and its picture.

    python -m bench.adaptation [FOLDER] [--write]

FOLDER (`zoos`) keeps three zoos of all 126 tasks of the nursery, and what was measured, one JSON line each: what is there,
made by the same recipe and settings, is not made again. Subspaces are fitted to 111 models; 12 tasks are held out for
measuring and 3 others for choosing learning rates. `--write` puts the tables between the marks in docs/findings.md and draws
its picture; the text around them stays. About four minutes of training zoos and forty of adapting on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import eigenzoo as ez
from bench.adaptation_methods import (
    Ground,
    Method,
    cnn_methods,
    cnn_start,
    lora_methods,
    names_of,
    untrained,
    vit_methods,
    vit_start,
)
from bench.adaptation_tables import NAMES, Found, Row, less_table, main_table, pair_table, rate_table
from bench.adaptation_training import Kept, Settings, adapt_all, answers, best_rate, correct, try_rates
from bench.pages import with_tables
from eigenzoo import nursery
from eigenzoo.nursery import digits
from eigenzoo.nursery.digits import Task
from eigenzoo.nursery.recipe import RECIPE, library_versions, plan_zoo

SEED = 0
"""Of the zoos."""

ZOOS = {"fine-tunes": "digits-vit", "adapters": "digits-lora", "networks": "digits-cnn"}

SHARED = ("head-start", "lora-4", "full-start")
"""Methods that do not depend on the zoo but by its parent."""

LESS = {"32 images": {"num_images": 32}, "30 steps": {"steps": 30}}
"""What is also tried, by title: other settings than the usual ones."""

LESS_KEYS = (
    "head-start",
    "head-mean",
    *(f"{kind}-{size}-mean" for size in ("k = 1", "k = 4", "k = 16") for kind in ("learned", "random")),
    "lora-4",
    "full-start",
)
"""With these methods."""

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURE = DOCS / "findings.md", DOCS / "pictures" / "adaptation.png"


@dataclass(frozen=True)
class Split:
    """The models of a zoo that are fitted, and the tasks of the others."""

    fitted: tuple[str, ...]
    held_out: tuple[str, ...]
    tuning: tuple[str, ...]

    @staticmethod
    def tasks(names: Sequence[str]) -> list[Task]:
        return [Task(tuple(map(int, name.rpartition("-")[2]))) for name in names]


def split(names: Sequence[str], settings: Settings) -> Split:
    """Take tasks at equal distances in the order of names, which is that of their digits."""
    count = settings.held_out + settings.tuning
    taken = [names[(2 * place + 1) * len(names) // (2 * count)] for place in range(count)]
    tuning = taken[count // (2 * settings.tuning) :: count // settings.tuning][: settings.tuning]
    fitted = tuple(name for name in names if name not in taken)
    return Split(fitted, tuple(name for name in taken if name not in tuning), tuple(tuning))


def make_zoo(kind: str, path: Path, num_models: int) -> dict[str, Any]:
    """Return the recipe of a zoo of one seed, trained now unless it is there already."""
    plan = plan_zoo(kind, num_models, SEED, False, False, None)
    wanted = {**asdict(plan), "versions": library_versions()}
    recipe = path / RECIPE
    saved = json.loads(recipe.read_text(encoding="utf-8")) if recipe.exists() else {}
    if {key: saved.get(key) for key in wanted} != wanted:
        tell(f"training {path.name}")
        nursery.make(kind, path, num_models=num_models, seed=SEED, force=True)
    return dict(json.loads(recipe.read_text(encoding="utf-8")))


@contextmanager
def ground(name: str, path: Path, fitted: Sequence[str], settings: Settings) -> Iterator[Ground]:
    """Fit every size of subspace to the fitted models."""
    exclude = ["classifier.*"] if name == "fine-tunes" else []
    zoo = ez.open_zoo(path, exclude=exclude).select(names=list(fitted))
    start = cnn_start(SEED) if name == "networks" else vit_start(path)
    sizes: dict[str, Any] = {f"k = {rank}": rank for rank in settings.ranks}
    sizes[f"cores {settings.core} × {settings.core}"] = {"outputs": settings.core, "inputs": settings.core}
    with tempfile.TemporaryDirectory() as workspace:
        spaces = {label: ez.fit(zoo, rank=rank, workspace=Path(workspace)) for label, rank in sizes.items()}
        names = names_of(start) if name == "fine-tunes" else {}
        head = ("head.*",) if name == "networks" else ("classifier.*",)
        yield Ground(name, start, spaces, head, names)


def measure(
    name: str, path: Path, recipe: Mapping[str, Any], settings: Settings, kept: Kept, keys: Sequence[str] | None = None
) -> Found:
    """Measure all methods of one zoo, or those of these keys."""
    parts = split(sorted(recipe["models"]), settings)
    data = digits.load()
    labels = torch.stack([task.label(data.test_digits) for task in Split.tasks(parts.held_out)])
    with ground(name, path, parts.fitted, settings) as prepared:
        rows = [_original(path, recipe, parts)]
        for key, (title, module) in untrained(prepared).items():
            rows.append(Row(key, title, tuple(correct(answers(module, {}, data.test_images), labels))))
        asked = [method for method in methods(prepared) if keys is None or method.key in keys]
        rates = {method.key: _rates(method, name, settings, kept, parts) for method in asked}
        measured = [method for method in asked if not method.only_rates]
        rows += [_row(method, name, settings, kept, parts, rates[method.key]) for method in measured]
        basis_bytes = {label: _basis_bytes(space) for label, space in prepared.spaces.items()}
    return Found(name, rows, {key: each["accuracy"] for key, each in rates.items()}, basis_bytes)


def _basis_bytes(space: ez.Subspace) -> int:
    """Return the bytes that all tasks share: the bundle without its models and moments."""
    with tempfile.TemporaryDirectory() as place:
        folder = space.save(Path(place) / "bundle", moments=False)
        return sum(file.stat().st_size for file in folder.rglob("basis*") if file.is_file())


def methods(prepared: Ground) -> list[Method]:
    """All methods of a zoo."""
    if prepared.name == "adapters":
        return lora_methods(prepared)
    if prepared.name == "networks":
        return cnn_methods(prepared)
    return vit_methods(prepared)


def _original(path: Path, recipe: Mapping[str, Any], parts: Split) -> Row:
    """The zoo's own models of the held-out tasks."""
    models = recipe["models"]
    first = path / parts.held_out[0]
    file = next(first.glob("*.safetensors")) if first.is_dir() else path / f"{parts.held_out[0]}.safetensors"
    accuracy = tuple(models[name]["test_accuracy"] for name in parts.held_out)
    return Row("original", "the zoo's own model", accuracy, 0, file.stat().st_size)


def _rates(method: Method, zoo: str, settings: Settings, kept: Kept, parts: Split) -> dict[str, list[float]]:
    found = kept.get(zoo, method.key, "rates")
    if found is None:
        tell(f"{zoo}, rates: {method.title}")
        module = method.build(settings.seeds[0]).module
        found = kept.put(zoo, method.key, "rates", try_rates(module, settings, Split.tasks(parts.tuning)))
    return dict(found)


def _row(
    method: Method, zoo: str, settings: Settings, kept: Kept, parts: Split, tried: Mapping[str, Sequence[float]]
) -> Row:
    rate = best_rate(settings, tried)
    runs = [_run(method, zoo, settings, kept, parts, rate, seed) for seed in settings.seeds]
    accuracy = tuple(map(statistics.fmean, zip(*(run["accuracy"] for run in runs), strict=True)))
    seconds = statistics.fmean(run["seconds"] for run in runs)
    return Row(method.key, method.title, accuracy, *_sizes(method, settings), rate, seconds, method.basis)


def _sizes(method: Method, settings: Settings) -> tuple[int, int]:
    """Return how many numbers are trained, and the size of the file that holds them."""
    built = method.build(settings.seeds[0])
    with tempfile.TemporaryDirectory() as place:
        num_bytes = built.save(Path(place)).stat().st_size
    return sum(each.numel() for each in built.module.parameters() if each.requires_grad), num_bytes


def _run(
    method: Method, zoo: str, settings: Settings, kept: Kept, parts: Split, rate: float, seed: int
) -> dict[str, Any]:
    found = kept.get(zoo, method.key, f"seed {seed}")
    if found is None:
        tell(f"{zoo}, seed {seed}: {method.title}")
        _, found = adapt_all(method.build(seed).module, settings, Split.tasks(parts.held_out), rate, seed)
        kept.put(zoo, method.key, f"seed {seed}", found)
    return dict(found)


def main() -> None:
    """Print the tables; write them and the picture if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("zoos"))
    parser.add_argument("--write", action="store_true", help="write docs/findings.md and its picture")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started, settings = time.perf_counter(), Settings()
    asked.folder.mkdir(parents=True, exist_ok=True)
    found = {name: measure_zoo(name, asked.folder, settings) for name in ZOOS}
    whole = found["fine-tunes"]
    found["adapters"] = with_shared(found["adapters"], whole)
    less = {
        title: measure_zoo("fine-tunes", asked.folder, replace(settings, **other), LESS_KEYS)
        for title, other in LESS.items()
    }
    made = {NAMES[name]: main_table(each) for name, each in found.items()}
    pairs = [*found.values(), *(replace(each, name=f"fine-tunes, {title}") for title, each in less.items())]
    made |= {"adaptation-pairs": pair_table(pairs), "adaptation-less": less_table(less, whole)}
    for lines in [*made.values(), rate_table(whole, settings)]:
        print("\n".join(lines), end="\n\n")
    if asked.write:
        from bench.adaptation_picture import draw

        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), made, PAGE), encoding="utf-8")
        draw({"1,297 training images": whole, "32 training images": less["32 images"]}, PICTURE)
    tell(f"{time.perf_counter() - started:.0f} s")


def with_shared(adapters: Found, whole: Found) -> Found:
    """Return the rows of the adapters with what is the same for them as for the fine-tunes, since they have one parent."""
    if adapters.row("start").accuracy != whole.row("start").accuracy:
        sys.exit("the zoos of fine-tunes and of adapters have different parents: remove them, and they are made anew")
    return replace(adapters, rows=[*adapters.rows, *(whole.row(key) for key in SHARED)])


def measure_zoo(name: str, folder: Path, settings: Settings, keys: Sequence[str] | None = None) -> Found:
    """Measure one of `ZOOS`, in a folder that keeps it and what was measured."""
    path = folder / f"adaptation-{name}"
    recipe = make_zoo(ZOOS[name], path, settings.num_models)
    return measure(name, path, recipe, settings, Kept(folder / "adaptation.jsonl", settings), keys)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
