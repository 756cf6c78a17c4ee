"""A new task for a few hundred numbers, on any torch module: `python examples/plain_torch.py [FOLDER]`, about a minute.

Trains a zoo of 72 small transformers if FOLDER has none, fits a subspace to 66 of them, and learns a task that none of those has
seen by training coefficients alone. A random basis of the same size does the same for comparison.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import ViTForImageClassification

import eigenzoo as ez
from eigenzoo import adapt, nursery
from eigenzoo.adapt.training import TensorData, train
from eigenzoo.integrations.transformers_names import saved_names
from eigenzoo.nursery import digits


def learn(space: ez.Subspace, parent: Path, task: digits.Task, *, random_basis: bool) -> adapt.Adapted:
    """Train coefficients on the task's training images."""
    model = ViTForImageClassification.from_pretrained(parent)
    adapted = adapt.attach(model, space, names=saved_names(model), random_basis=random_basis)
    images, labels = digits.load().training_set(task)

    def loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]).logits, batch[1])

    train(adapted, TensorData(images, labels), loss, steps=200, batch_size=64)
    return adapted


def accuracy(model: torch.nn.Module, task: digits.Task) -> float:
    """Accuracy on the task's 500 test images."""
    images, labels = digits.load().test_set(task)
    with torch.no_grad():
        return float((model(images).logits.argmax(-1) == labels).double().mean())


def main(folder: Path) -> None:
    """Make the zoo, fit, train, save, and load the file."""
    zoo = folder / "zoo"
    if not zoo.exists():
        nursery.make("digits-vit", zoo)
    paths = sorted(zoo.glob("task-*"))
    space = ez.fit(ez.open_zoo(paths[:-6], exclude=["classifier.*"]), rank=16)
    task = digits.Task(tuple(int(digit) for digit in paths[-1].name.removeprefix("task-")))
    adapted = learn(space, zoo / "_base", task, random_basis=False)
    control = learn(space, zoo / "_base", task, random_basis=True)
    file = adapt.save(adapted, folder / f"{paths[-1].name}.safetensors", force=True)

    model = ViTForImageClassification.from_pretrained(zoo / "_base")
    again = adapt.attach(model, space, names=saved_names(model))
    adapt.load(file, again)
    print(f"task {task}: {adapted.num_trained} trained numbers, a file of {file.stat().st_size:,} bytes")
    print(f"the model's own weights have {(paths[-1] / 'model.safetensors').stat().st_size:,} bytes")
    print(f"accuracy: trained in the zoo's basis {accuracy(adapted.module, task):.3f}")
    print(f"          the same from the file     {accuracy(adapt.detach(again), task):.3f}")
    print(f"          in a random basis          {accuracy(control.module, task):.3f}")
    print(f"          its own fine-tune          {nursery.accuracy(paths[-1]):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples-output"))
