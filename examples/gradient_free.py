"""A new task without gradients: `python examples/gradient_free.py [FOLDER]`, about a minute.

All that is asked for is one number for each candidate; here the loss on 256 images. It could be a judge's score or a game's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import ViTForImageClassification

import eigenzoo as ez
from eigenzoo import adapt, nursery
from eigenzoo.adapt.search import search
from eigenzoo.integrations.transformers_names import saved_names
from eigenzoo.nursery import digits


def main(folder: Path) -> None:
    """Make the zoo, fit, and search over coefficients and over the zoo's models."""
    zoo = folder / "zoo"
    if not zoo.exists():
        nursery.make("digits-vit", zoo)
    paths = sorted(zoo.glob("task-*"))
    space = ez.fit(ez.open_zoo(paths[:-6], exclude=["classifier.*"]), rank=16)
    task = digits.Task(tuple(int(digit) for digit in paths[-1].name.removeprefix("task-")))
    images, labels = digits.load().training_set(task)
    test_images, test_labels = digits.load().test_set(task)

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(images[:256]).logits, labels[:256])

    print(f"task {task}")
    for over in ("coefficients", "models"):
        model = ViTForImageClassification.from_pretrained(zoo / "_base")
        adapted = adapt.attach(model, space, names=saved_names(model))
        found = search(adapted, loss, budget=600, over=over, state=folder / f"search-{over}.safetensors")
        with torch.no_grad():
            accuracy = float((adapted.module(test_images).logits.argmax(-1) == test_labels).double().mean())
        print(
            f"over {over}: loss {found.start:.3f} to {found.best:.3f} in {found.evaluations} evaluations, accuracy {accuracy:.3f}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples-output"))
