"""Train one zoo by its plan and write it to disk, completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load
from torch import Tensor

from eigenzoo.formats.output.own import recorded, write_record
from eigenzoo.formats.output.whole import new_folder
from eigenzoo.formats.safetensors.writer import write_file
from eigenzoo.nursery import arranged, digits, docstrings
from eigenzoo.nursery.cnn import CnnKind, permute
from eigenzoo.nursery.recipe import (
    DEFAULTS,
    DOCSTRINGS,
    HELD_OUT,
    NUM_TASKS,
    PARENT,
    PASSAGES,
    RECIPE,
    TASKS,
    ZOO,
    Plan,
    Recipe,
    library_versions,
)
from eigenzoo.nursery.training import Weights, predict, share, train
from eigenzoo.passes.draws import preserve_generators
from eigenzoo.passes.process import quietly, single_threaded

Progress = Callable[[str, int, int], None]

AT_ONCE = 250
"""Items on which a chunk's models are measured at once, if one item takes much memory."""


@dataclass(frozen=True)
class Child:
    """One model to train: its name, its task, and the seed of its own random draws."""

    name: str
    task: digits.Task | docstrings.Task | arranged.Task
    seed: int


class Data(Protocol):
    """Training and test data of each task."""

    def training_set(self, task: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and labels; tasks that are trained together have the same inputs."""

    def test_set(self, task: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and labels that no model is trained on."""


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
        kind, parent, data = _build(plan, folder, progress)
        models: dict[str, dict[str, Any]] = {}
        children = choose_children(plan)
        fitted, held_out = children[: plan.num_models], children[plan.num_models :]
        for chunk in (*_chunks(fitted, plan), *_chunks(held_out, plan)):
            models |= _raise_chunk(plan, kind, data, chunk, folder, progress, len(models))
        recipe = Recipe(plan, dict(sorted(models.items())), parent, library_versions())
        (folder / RECIPE).write_text(json.dumps(recipe.to_dict(), indent=1) + "\n", encoding="utf-8")
        write_record(folder, ZOO)
    return recipe


def choose_children(plan: Plan) -> list[Child]:
    """Return the models of the plan: tasks drawn from the 126 by the zoo's seed, or runs of the first.

    A larger zoo of the same seed contains the models of the smaller one. Zoos of two seeds have no model's seed in common. Models
    that are held out come last.
    """
    if plan.kind == DOCSTRINGS:
        return _choose_readers(plan)
    if plan.kind == TASKS:
        first = plan.seed * NUM_TASKS + 1
        return [
            Child(arranged.Task(number).name, arranged.Task(number), number)
            for number in range(first, first + plan.num_models)
        ]
    every = digits.tasks()
    first_seed = plan.seed * len(every) + 1
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    if plan.same_task:
        task = every[order[0]]
        return [Child(f"{task.name}-run-{run:03d}", task, first_seed + run) for run in range(plan.num_models)]
    children = []
    for number in order[: plan.num_models]:
        seed = first_seed + number
        task = digits.Task(every[number].digits, seed if plan.random_labels else None)
        children.append(Child(task.name, task, seed))
    return children


def _choose_readers(plan: Plan) -> list[Child]:
    """Return the models of a zoo on docstrings: fitted ones from one end of a random order of the tasks, others from the other."""
    every, first_seed = docstrings.tasks(), plan.seed * NUM_TASKS + 1
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    children = [Child(every[number].name, every[number], first_seed + number) for number in order[: plan.num_models]]
    for number in order[len(order) - plan.num_held_out :]:
        task = replace(every[number], held_out=True)
        children.append(Child(f"{HELD_OUT}/{task.name}", task, first_seed + number))
    return children


def _build(plan: Plan, folder: Path, progress: Progress | None) -> tuple[Kind, dict[str, float], Data]:
    """Return the kind, its parent trained and saved, what is to be told of the parent, and the data."""
    if plan.kind == DOCSTRINGS:
        return _build_reader(plan, folder, progress)
    if plan.kind == TASKS:
        return _build_arranged(plan, folder, progress)
    data = digits.load()
    if plan.pretraining is None:
        return CnnKind(plan), {}, data
    from eigenzoo.nursery.vit import VitKind, pretrain, save_checkpoint

    steps = plan.pretraining.steps
    parent, correct = pretrain(plan, lambda done: progress("pretraining", done, steps) if progress else None)
    _label(save_checkpoint(parent, folder / PARENT), {"kind": plan.kind, "role": "parent"})
    facts = {"ten_class_test_accuracy": correct}
    if plan.kind == "digits-vit":
        return VitKind(plan, parent), facts, data
    from eigenzoo.nursery.lora import LoraKind

    return LoraKind(plan, parent), facts, data


def _build_arranged(plan: Plan, folder: Path, progress: Progress | None) -> tuple[Kind, dict[str, float], Data]:
    """Return what models with heads of their own need: the heads are beside the parent."""
    from eigenzoo.nursery.vit import save_checkpoint

    tasks, steps = [child.task for child in choose_children(plan)], plan.pretraining.steps if plan.pretraining else 0
    parent, heads, correct = arranged.build_parent(
        plan,
        [task for task in tasks if isinstance(task, arranged.Task)],
        lambda done: progress("pretraining", done, steps) if progress else None,
    )
    _label(save_checkpoint(parent, folder / PARENT), {"kind": plan.kind, "role": "parent"})
    arranged.save_heads(heads, folder / PARENT)
    return (
        arranged.ArrangedKind(plan, parent, heads),
        {"ten_class_test_accuracy": correct},
        arranged.ArrangedData(digits.load()),
    )


def _build_reader(plan: Plan, folder: Path, progress: Progress | None) -> tuple[Kind, dict[str, float], Data]:
    """Return what adapters of an encoder need: the encoder with its tokenizer and the passages are the zoo's parent."""
    from eigenzoo.nursery.encoder import TextKind, build_parent, find_encoder, prepare

    parent, tokenizer = build_parent(find_encoder() if plan.encoder is None else Path(plan.encoder))
    passages = docstrings.load()
    data = prepare(parent, tokenizer, passages, plan.seed, progress)
    with quietly():
        parent.save_pretrained(folder / PARENT)
        tokenizer.save_pretrained(folder / PARENT)
    (folder / PARENT / PASSAGES).write_text(passages.to_json(), encoding="utf-8")
    _label(folder / PARENT / "model.safetensors", {"kind": plan.kind, "role": "parent"})
    return TextKind(plan, parent), {}, data


def _raise_chunk(
    plan: Plan, kind: Kind, data: Data, chunk: list[Child], folder: Path, progress: Progress | None, before: int
) -> dict[str, dict[str, Any]]:
    """Train, measure and save some models at once. Return their records for the recipe."""
    seeds, num_models = [child.seed for child in chunk], plan.num_models + plan.num_held_out
    starts = [kind.start(seed) for seed in seeds]
    stacked = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
    sets = [data.training_set(child.task) for child in chunk]
    images, labels = sets[0][0], torch.stack([each for _, each in sets])

    def tick(step: int) -> None:
        if progress is not None:
            progress("models", before + len(chunk) * step // plan.schedule.steps, num_models)

    frozen = _frozen(kind, chunk)
    trained = train(kind.forward, stacked, images, labels, plan.schedule, seeds, tick, frozen)
    test_images = data.test_set(chunk[0].task)[0]
    at_once = AT_ONCE if plan.kind == DOCSTRINGS else None
    fitted, tested = (predict(kind.forward, {**trained, **frozen}, each, at_once) for each in (images, test_images))
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


def _frozen(kind: Kind, chunk: list[Child]) -> Weights:
    """Return the stacked weights that models have of their tasks and do not train; of most kinds there are none."""
    if not isinstance(kind, arranged.ArrangedKind):
        return {}
    each = [kind.frozen(child.task) for child in chunk if isinstance(child.task, arranged.Task)]
    return {name: torch.stack([own[name] for own in each]) for name in each[0]}


def _metadata(plan: Plan, child: Child) -> dict[str, str]:
    facts = {"task": str(child.task), "kind": plan.kind, "random_labels": json.dumps(plan.random_labels)}
    labels_seed = getattr(child.task, "labels_seed", None)
    if labels_seed is not None:
        facts["labels_seed"] = str(labels_seed)
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


def _chunks(models: list[Child], plan: Plan) -> Iterator[list[Child]]:
    """Split into as few chunks of nearly equal size as the kind allows."""
    count = -(-len(models) // DEFAULTS[plan.kind].at_once)
    for number in range(count):
        yield models[number * len(models) // count : (number + 1) * len(models) // count]
