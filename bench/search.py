"""Coefficients searched for without gradients, beside coefficients trained with them, on tasks that the zoo has not seen.

    python -m bench.search ZOO [--tasks 4] [--budgets 250 500 1000 2000] [--images 512]

ZOO is a zoo of digits-vit (`eigenzoo nursery make digits-vit -o ZOO`). Every twelfth model is held out, the others are fitted at
rank 16 a layer. The metric sees training images only, the accuracies are of the 500 test images. The gradient: Adam, rate 0.03,
200 steps of 64 images, 12,800 forward and backward passes of one image; an evaluation is one forward pass of `--images` images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import eigenzoo as ez
from eigenzoo import adapt
from eigenzoo.adapt.search import search
from eigenzoo.integrations.transformers_names import saved_names
from eigenzoo.nursery import digits
from eigenzoo.passes.process import quietly

RANK, STEPS, BATCH, EVERY = 16, 200, 64, 12
ENOUGH = 0.9
METHODS: tuple[tuple[str, str, bool], ...] = (
    ("coefficients, loss", "coefficients", False),
    ("models, loss", "models", False),
    ("coefficients, accuracy", "coefficients", True),
    ("models, accuracy", "models", True),
)
"""What is searched, and by which metric: whether it is the accuracy."""

Data = tuple[Tensor, Tensor]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print the table, and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--budgets", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=[name for name, _, _ in METHODS])
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    paths = sorted(path for path in asked.zoo.glob("task-*"))
    held = paths[5::EVERY][: asked.tasks]
    space = ez.fit(ez.open_zoo([path for path in paths if path not in held], exclude=["classifier.*"]), rank=RANK)
    print(
        f"{len(space.names)} models, {len(held)} held out; test accuracy, in brackets the share of the gradient's gain",
        flush=True,
    )
    print("task start gradient method " + " ".join(map(str, asked.budgets)), flush=True)
    rows = []
    for path in held:
        for row in measure_task(space, asked.zoo / "_base", path.name, asked):
            rows.append(row)
            found = " ".join(f"{value:.3f} ({share(row, value):.0%})" for value in row["found"])
            print(f"{row['task']} {row['start']:.3f} {row['gradient']:.3f} {row['method']}: {found}", flush=True)
    return rows


def share(row: dict[str, Any], accuracy: float) -> float:
    """The share of what the gradient gains over the start."""
    gain: float = row["gradient"] - row["start"]
    return (accuracy - row["start"]) / gain if gain else 0.0


def measure_task(space: ez.Subspace, base: Path, name: str, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the gradient and every search on one task."""
    task, data = digits.Task(tuple(map(int, name.removeprefix("task-")))), digits.load()
    training, test = data.training_set(task), data.test_set(task)
    seen = training[0][: asked.images], training[1][: asked.images]
    adapted = attached(space, base)
    start = accuracy(adapted.module, *test)
    train(adapted, training)
    row = {"task": name, "start": start, "gradient": accuracy(adapted.module, *test)}
    for method, over, by_accuracy in METHODS:
        if method in asked.methods:
            metric = accuracy if by_accuracy else loss
            with tempfile.TemporaryDirectory() as folder:
                yield row | {
                    "method": method,
                    "found": [
                        at_budget(space, base, budget, over, metric, seen, test, Path(folder) / "state")
                        for budget in asked.budgets
                    ],
                }


def at_budget(
    space: ez.Subspace,
    base: Path,
    budget: int,
    over: str,
    metric: Callable[[nn.Module, Tensor, Tensor], float],
    seen: Data,
    test: Data,
    state: Path,
) -> float:
    """Go on with a search up to a budget; returns the test accuracy of what it has found."""
    adapted = attached(space, base)
    maximize = metric is accuracy
    search(adapted, lambda module: metric(module, *seen), budget=budget, over=over, maximize=maximize, state=state)
    return accuracy(adapted.module, *test)


def attached(space: ez.Subspace, base: Path) -> adapt.Adapted:
    from transformers import ViTForImageClassification

    with quietly():
        module: Any = ViTForImageClassification.from_pretrained(base, attn_implementation="eager").eval()
    return adapt.attach(module, space, names=saved_names(module))


def train(adapted: adapt.Adapted, training: Data) -> None:
    """Train with gradients, as a user would."""
    images, labels = training
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.03)
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=draw)
        optimizer.zero_grad()
        cross_entropy(adapted.module(images[batch]).logits, labels[batch]).backward()
        optimizer.step()


def loss(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the cross-entropy."""
    return float(cross_entropy(module(images).logits, labels))


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers."""
    return float((module(images).logits.argmax(-1) == labels).float().mean())


if __name__ == "__main__":
    main()
