"""Train one zoo by its plan and write it to disk, completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load
from torch import Tensor

from eigenzoo.formats.output.own import recorded, write_record
from eigenzoo.formats.output.whole import new_folder
from eigenzoo.formats.safetensors.writer import write_file
from eigenzoo.nursery import digits
from eigenzoo.nursery.cnn import CnnKind, permute
from eigenzoo.nursery.digits import Task
from eigenzoo.nursery.recipe import PARENT, RECIPE, ZOO, Plan, Recipe, library_versions
from eigenzoo.nursery.training import Weights, predict, share, train
from eigenzoo.passes.draws import preserve_generators
from eigenzoo.passes.process import single_threaded

Progress = Callable[[str, int, int], None]

# Time per model decreases up to about this number (24 at once: 254 ms, 42: 216 ms). Memory increases further.
CHUNK = 32


@dataclass(frozen=True)
class Child:
    """One model to train: its name, its task, and the seed of its own random draws."""

    name: str
    task: Task
    seed: int


class Kind(Protocol):
    """Interface of a kind of zoo: start a model, run it, save it."""

    def forward(self, weights: Weights, images: Tensor) -> Tensor:
        """Return one model's logits."""

    def start(self, seed: int) -> Weights:
        """Return the trained weights of one model before training."""

    def save(self, weights: Weights, folder: Path, name: str) -> Path:
        """Write one model below `folder` and return its weight file."""


def make_zoo(plan: Plan, out: Path, force: bool, progress: Progress | None) -> Recipe:
    """Train and save a zoo; see `eigenzoo.nursery.make`."""
    # Always one thread. Two gain a quarter on an idle machine of two cores, but beside another process they take ten times as long
    # (234 s against 22), since each small operator waits for the slower one. The bytes depend on the number, too.
    with new_folder(out, force=force, foreign=recorded(ZOO)) as folder, preserve_generators(), single_threaded():
        kind, parent = _build(plan, folder, progress)
        models: dict[str, dict[str, Any]] = {}
        for chunk in _chunks(choose_children(plan)):
            models |= _raise_chunk(plan, kind, chunk, folder, progress, len(models))
        recipe = Recipe(plan, dict(sorted(models.items())), parent, library_versions())
        (folder / RECIPE).write_text(json.dumps(recipe.to_dict(), indent=1) + "\n", encoding="utf-8")
        write_record(folder, ZOO)
    return recipe


def choose_children(plan: Plan) -> list[Child]:
    """Return the models of the plan: tasks drawn from the 126 by the zoo's seed, or runs of the first.

    A larger zoo of the same seed contains the models of the smaller one. Zoos of two seeds have no model's seed in common.
    """
    every = digits.tasks()
    first_seed = plan.seed * len(every) + 1
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    if plan.same_task:
        task = every[order[0]]
        return [Child(f"{task.name}-run-{run:03d}", task, first_seed + run) for run in range(plan.num_models)]
    children = []
    for number in order[: plan.num_models]:
        seed = first_seed + number
        task = Task(every[number].digits, seed if plan.random_labels else None)
        children.append(Child(task.name, task, seed))
    return children


def _build(plan: Plan, folder: Path, progress: Progress | None) -> tuple[Kind, dict[str, float]]:
    """Return the kind and the record of its parent, which is trained and saved."""
    if plan.pretraining is None:
        return CnnKind(plan), {}
    from eigenzoo.nursery.vit import VitKind, pretrain, save_checkpoint

    steps = plan.pretraining.steps
    parent, correct = pretrain(plan, lambda done: progress("pretraining", done, steps) if progress else None)
    _label(save_checkpoint(parent, folder / PARENT), {"kind": plan.kind, "role": "parent"})
    facts = {"ten_class_test_accuracy": correct}
    if plan.kind == "digits-vit":
        return VitKind(plan, parent), facts
    from eigenzoo.nursery.lora import LoraKind

    return LoraKind(plan, parent), facts


def _raise_chunk(
    plan: Plan, kind: Kind, chunk: list[Child], folder: Path, progress: Progress | None, before: int
) -> dict[str, dict[str, Any]]:
    """Train, measure and save some models at once. Return their records for the recipe."""
    data, seeds = digits.load(), [child.seed for child in chunk]
    starts = [kind.start(seed) for seed in seeds]
    stacked = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
    sets = [data.training_set(child.task) for child in chunk]
    images, labels = sets[0][0], torch.stack([each for _, each in sets])

    def tick(step: int) -> None:
        if progress is not None:
            progress("models", before + len(chunk) * step // plan.schedule.steps, plan.num_models)

    trained = train(kind.forward, stacked, images, labels, plan.schedule, seeds, tick)
    fitted, tested = (predict(kind.forward, trained, each) for each in (images, data.test_images))
    models = {}
    for row, child in enumerate(chunk):
        weights = {name: tensor[row].contiguous() for name, tensor in trained.items()}
        if plan.permuted:
            weights = permute(weights, child.seed)
        _label(kind.save(weights, folder, child.name), _metadata(plan, child))
        models[child.name] = {
            "task": str(child.task),
            "seed": child.seed,
            "test_accuracy": share(tested[row], data.test_set(child.task)[1]),
            "train_accuracy": share(fitted[row], labels[row]),
        }
    return models


def _metadata(plan: Plan, child: Child) -> dict[str, str]:
    facts = {"task": str(child.task), "kind": plan.kind, "random_labels": json.dumps(plan.random_labels)}
    if child.task.labels_seed is not None:
        facts["labels_seed"] = str(child.task.labels_seed)
    if plan.permuted:
        facts["permutation_seed"] = str(child.seed)
    return facts


def _label(path: Path, metadata: dict[str, str]) -> None:
    """Write the file again with these metadata and the same tensors.

    safetensors writes metadata in an order that differs from run to run. Here they are sorted, so that the same zoo has the same
    bytes.
    """
    tensors = sorted(load(path.read_bytes()).items())
    path.unlink()
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
    facts = dict(sorted({"format": "pt", **metadata}.items()))
    write_file(path, entries, (tensor for _, tensor in tensors), facts, sync=False)


def _chunks(models: list[Child]) -> Iterator[list[Child]]:
    """Split into as few chunks of nearly equal size as `CHUNK` allows."""
    count = -(-len(models) // CHUNK)
    for number in range(count):
        yield models[number * len(models) // count : (number + 1) * len(models) // count]
