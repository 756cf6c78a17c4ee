"""`digits-tasks`: models whose tasks one network can do at once, as merging needs.

A task is to name the digits of images in which six of the 4 x 4 patches have changed places. Its ten-class head is a linear probe
of the unchanged parent, and is never trained again. So tasks do not contradict each other: one body can do all of them, each
with its own head, and the parent does each to some degree.

All heads lie in one file beside the parent. Models have the same ten-class head, which is zero: a task's head is put in its place
when the task is measured. The last 250 training images are kept for validation, on which merges are chosen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eigenzoo.errors import FormatError, UsageError
from eigenzoo.formats.json_file import read_json
from eigenzoo.nursery import digits
from eigenzoo.nursery.lora import LoraKind
from eigenzoo.nursery.recipe import Plan
from eigenzoo.nursery.training import Weights, batches, rate, share
from eigenzoo.nursery.vit import VitKind, build, pretrain

NUM_PATCHES, NUM_MOVED, NUM_VALIDATION = 16, 6, 250
HEADS = "heads.json"
"""File in the parent's folder with the heads of all tasks. A second file of weights there would look like a part of the parent."""
VALIDATION, TEST = "validation", "test"
PARTS = (VALIDATION, TEST)

_PREFIX = "arranged:"
_ORDER = "order"


@dataclass(frozen=True)
class Task:
    """Digits with some patches in other places, which a seed draws.

    >>> str(Task(7)), Task(7).name, Task.parse("arranged:7")
    ('arranged:7', 'task-007', Task(seed=7))
    """

    seed: int

    @property
    def name(self) -> str:
        """The name of a model that learns this task."""
        return f"task-{self.seed:03d}"

    def __str__(self) -> str:
        return f"{_PREFIX}{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Task:
        """Parse the result of `str`. Raises UsageError for any other text."""
        number = text.removeprefix(_PREFIX)
        task = cls(int(number)) if number.isascii() and number.isdigit() and len(number) < 10 else None
        if task is None or str(task) != text:
            raise UsageError(f"{text[:60]!r} is not a task", rule="a task is written like 'arranged:7'")
        return task

    @property
    def order(self) -> Tensor:
        """Which patch comes first, second, …: (16,). Six of them, drawn by the seed, have changed places in a circle."""
        moved = torch.randperm(NUM_PATCHES, generator=torch.Generator().manual_seed(self.seed))[:NUM_MOVED]
        order = torch.arange(NUM_PATCHES)
        order[moved] = moved.roll(1)
        return order


def is_task(text: str) -> bool:
    """Tell whether a text names such a task."""
    return text.startswith(_PREFIX)


def arrange(images: Tensor, order: Tensor) -> Tensor:
    """Return images (n, 1, 8, 8) with their 16 patches of 2 x 2 in another order."""
    patches = images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, NUM_PATCHES, 4)[:, order]
    return patches.reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 1, 8, 8)


@dataclass(frozen=True)
class ArrangedData:
    """The digits, as every task has them before it arranges them."""

    data: digits.Digits

    def training_set(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return the training images and their digits, without those for validation."""
        return self.data.train_images[:-NUM_VALIDATION], self.data.train_digits[:-NUM_VALIDATION]

    def test_set(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return the test images and their digits."""
        return self.part(TEST)

    def part(self, part: str) -> tuple[Tensor, Tensor]:
        """Return the images and digits for validation, or those for testing."""
        if part == VALIDATION:
            return self.data.train_images[-NUM_VALIDATION:], self.data.train_digits[-NUM_VALIDATION:]
        return self.data.test_images, self.data.test_digits


class ArrangedKind:
    """Starts, runs and saves the models of a `digits-tasks` zoo: adapters, or with `full` fine-tunes of all weights of the body."""

    def __init__(self, plan: Plan, parent: Any, heads: Mapping[str, Tensor]) -> None:
        self._inner = VitKind(plan, parent) if plan.full else LoraKind(plan, parent)
        self._heads = heads
        names = [name for name, _ in self._inner.model.named_parameters()]
        self._head = {
            end: next(name for name in names if name.endswith(f"classifier.{end}")) for end in ("weight", "bias")
        }

    def forward(self, weights: Weights, images: Tensor) -> Tensor:
        """Return one model's logits for its task; `weights` has what `frozen` gives."""
        own = dict(weights)
        return self._inner.forward(own, arrange(images, own.pop(_ORDER)))

    def frozen(self, task: Task) -> Weights:
        """Return what a model has of its task and does not train: its head, and the order of patches."""
        head = {name: self._heads[f"{task.name}.{end}"] for end, name in self._head.items()}
        return {**head, _ORDER: task.order}

    def start(self, seed: int) -> Weights:
        """Return the initial weights of one model."""
        return {name: values for name, values in self._inner.start(seed).items() if name not in self._head.values()}

    def save(self, weights: Weights, folder: Path, name: str) -> Path:
        """Write one adapter or checkpoint and return its weight file."""
        return self._inner.save(weights, folder, name)


def build_parent(
    plan: Plan, tasks: Sequence[Task], tick: Callable[[int], None] | None = None
) -> tuple[Any, dict[str, Tensor], float]:
    """Return the parent with a head of zeros, the heads of the tasks, and the parent's accuracy on upright digits."""
    from sklearn.linear_model import LogisticRegression

    learner, correct = pretrain(plan, tick)
    parent = build(10, plan.seed)
    body = {name: values for name, values in learner.state_dict().items() if not name.startswith("classifier.")}
    parent.load_state_dict({**body, "classifier.weight": torch.zeros(10, 32), "classifier.bias": torch.zeros(10)})
    data, heads = ArrangedData(digits.load()), {}
    for task in tasks:
        images, labels = data.training_set(task)
        probe = LogisticRegression(max_iter=2000).fit(_features(parent, images, task).numpy(), labels.numpy())
        heads[f"{task.name}.weight"] = torch.from_numpy(probe.coef_).float().contiguous()
        heads[f"{task.name}.bias"] = torch.from_numpy(probe.intercept_).float()
    return parent, heads, correct


def _features(parent: Any, images: Tensor, task: Task) -> Tensor:
    with torch.no_grad():
        states: Tensor = parent.vit(arrange(images, task.order)).last_hidden_state[:, 0]
    return states


def save_heads(heads: Mapping[str, Tensor], folder: Path) -> None:
    """Write the heads of all tasks beside the parent."""
    listed = {name: values.tolist() for name, values in sorted(heads.items())}
    (folder / HEADS).write_text(json.dumps(listed) + "\n", encoding="utf-8")


def read_heads(folder: Path) -> dict[str, Tensor]:
    """Read the heads of all tasks from the parent's folder."""
    if not (folder / HEADS).is_file():
        raise FormatError(
            f"has no {HEADS}", where=str(folder), rule="the parent of a digits-tasks zoo has the tasks' heads"
        )
    heads = {name: torch.tensor(values) for name, values in read_json(folder / HEADS, where=str(folder)).items()}
    wrong = [
        name for name, values in heads.items() if values.shape != ((10, 32) if name.endswith(".weight") else (10,))
    ]
    if wrong:
        raise FormatError(f"head {wrong[0][:60]!r} has shape {list(heads[wrong[0]].shape)}", where=str(folder / HEADS))
    return heads


def tasks_of(heads: Mapping[str, Tensor]) -> list[Task]:
    """Return the tasks that have heads."""
    return [Task(int(name.removeprefix("task-").removesuffix(".weight"))) for name in heads if name.endswith(".weight")]


def accuracies(model: Any, heads: Mapping[str, Tensor], tasks: Sequence[Task], part: str) -> dict[str, float]:
    """Return a loaded model's accuracy on each task, with that task's head, by the task's name."""
    images, labels = ArrangedData(digits.load()).part(part)
    own = copy.deepcopy(model)
    classifier = next(module for name, module in own.named_modules() if name.endswith("classifier"))
    found = {}
    for task in tasks:
        with torch.no_grad():
            classifier.weight.copy_(heads[f"{task.name}.weight"])
            classifier.bias.copy_(heads[f"{task.name}.bias"])
            answer = own(arrange(images, task.order))
        found[task.name] = share(answer.logits.argmax(-1), labels)
    return found


def train_joint(
    plan: Plan, parent: Any, heads: Mapping[str, Tensor], tasks: Sequence[Task]
) -> tuple[ArrangedKind, Weights]:
    """Train one model on all tasks at once, as a control of merging: with the schedule of a model, every task in every step.

    Cost: that of training all models of the zoo.
    """
    kind = ArrangedKind(plan, parent, heads)
    frozen = [kind.frozen(task) for task in tasks]
    images, labels = ArrangedData(digits.load()).training_set(tasks[0])
    weights = {name: values.clone().requires_grad_() for name, values in kind.start(plan.seed + 1).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=plan.schedule.learning_rate)
    for step, batch in enumerate(batches(len(images), plan.schedule, plan.seed)):
        losses = [
            nn.functional.cross_entropy(kind.forward({**weights, **own}, images[batch]), labels[batch])
            for own in frozen
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = rate(plan.schedule, step)
        optimizer.step()
    return kind, {name: values.detach() for name, values in weights.items()}
