"""A zoo of small networks for the digits of scikit-learn, trained in a second: one parent, five digits against five."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import eigenzoo as ez
from builders import seeded, write_model
from eigenzoo.nursery import digits

HIDDEN, STEPS = 24, 150


class Net(nn.Module):
    """Pixels, two hidden layers, and the frozen head that all tasks share."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.one(images.flatten(1))))))


@dataclass(frozen=True)
class DigitNets:
    """What was made.

    Attributes:
        space: fitted to all but the held-out models.
        held: the paths of the others, by task.
        parent: the weights that all began with.
    """

    space: ez.Subspace
    held: dict[digits.Task, Path]
    parent: dict[str, Tensor]

    def net(self, path: Path | None = None) -> Net:
        """The parent, or a model from its file."""
        from safetensors.torch import load_file

        made = Net()
        made.load_state_dict(self.parent | (load_file(path / "model.safetensors") if path else {}))
        return made


def accuracy(module: nn.Module, task: digits.Task) -> float:
    """The share of test images that are answered rightly."""
    images, labels = digits.load().test_set(task)
    with torch.no_grad():
        return float((module(images).argmax(-1) == labels).float().mean())


def make(root: Path, rank: int, num_models: int = 26, num_held: int = 3) -> DigitNets:
    """Train a parent on ten digits, then a model for each of some tasks, and fit all but the last few."""
    data, draw = digits.load(), seeded(0)
    torch.manual_seed(0)
    parent = Net(10)
    _train(parent, data.train_digits, 400, draw)
    body = {name: values.detach() for name, values in parent.named_parameters() if not name.startswith("head")}
    head = {"head.weight": 0.5 * torch.randn(2, HIDDEN, generator=draw), "head.bias": torch.zeros(2)}
    tasks, held, paths = digits.tasks()[:: 126 // num_models][:num_models], {}, []
    for place, task in enumerate(tasks):
        model = Net()
        model.load_state_dict(body | head)
        model.head.requires_grad_(False)
        _train(model, task.label(data.train_digits), STEPS, draw)
        path = write_model(root / task.name, {name: model.state_dict()[name] for name in body})
        if place % 9 == 4 and len(held) < num_held:
            held[task] = path
        else:
            paths.append(path)
    return DigitNets(ez.fit(paths, rank), held, body | head)


def _train(model: nn.Module, labels: Tensor, steps: int, draw: torch.Generator) -> None:
    images = digits.load().train_images
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=draw)
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
