"""The loop of the adaptation bench: one module, many tasks side by side, each with a rate of its own; and what is kept of it.

Whatever a method trains are the parameters of one module that ask for a gradient. They are stacked for all tasks and the
module is called by `functional_call` under `vmap`, as in `eigenzoo.nursery.training`; here Adam is written out, because a learning
rate for each model is what lets a whole grid of rates train at once.

Legend: T models side by side, n images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from eigenzoo.nursery import digits
from eigenzoo.nursery.digits import Task
from eigenzoo.nursery.recipe import Schedule
from eigenzoo.nursery.training import rate as warmed

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's, as torch has them."""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What everybody gets.

    Attributes:
        num_models: of a zoo; `held_out` and `tuning` of them are for measuring and for choosing rates, the rest are fitted.
        num_images: training images that a task has, of 1,297; those for measuring are 500 others.
        num_checked: the last so many of the 1,297 tell the rates apart, and are not trained on meanwhile.
        ranks: directions per layer; `few` and `core` are the numbers of the other forms.
    """

    steps: int = 300
    batch_size: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    num_models: int = 126
    held_out: int = 12
    tuning: int = 3
    num_images: int = 1297
    num_checked: int = 297
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    core: int = 8


def train(module: nn.Module, images: Tensor, labels: Tensor, rates: Sequence[float], orders: Tensor) -> Weights:
    """Train T copies of what a module trains, (T, n) labels, T rates and (T, steps, batch) image numbers; return them stacked."""
    weights = stacked(module, len(rates))
    moments = {name: (torch.zeros_like(each), torch.zeros_like(each)) for name, each in weights.items()}
    forward = vmap(lambda own, batch: logits_of(functional_call(module, own, (batch,))))
    steps, batch_size = orders.shape[1:]
    unit = Schedule(steps, batch_size, 1.0)
    for step in range(steps):
        chosen = orders[:, step]
        out = forward(weights, images[chosen])
        loss = cross_entropy(out.flatten(0, 1), labels.gather(1, chosen).flatten(), reduction="sum") / batch_size
        gradients = torch.autograd.grad(loss, list(weights.values()))
        now = torch.tensor(rates) * warmed(unit, step)
        for name, gradient in zip(weights, gradients, strict=True):
            weights[name] = _moved(weights[name], gradient, moments[name], now, step + 1)
    return {name: each.detach() for name, each in weights.items()}


def _moved(weight: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], rates: Tensor, step: int) -> Tensor:
    first, second = moments
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    change = first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
    return (weight.detach() - rates.view(-1, *[1] * (weight.dim() - 1)) * change).requires_grad_()


def stacked(module: nn.Module, count: int) -> Weights:
    """Return what a module trains, so many times."""
    asked = {name: each.detach() for name, each in module.named_parameters() if each.requires_grad}
    return {name: each.expand(count, *each.shape).clone().requires_grad_() for name, each in asked.items()}


def logits_of(answer: Any) -> Tensor:
    logits: Tensor = answer if isinstance(answer, Tensor) else answer.logits
    return logits


def answers(module: nn.Module, weights: Weights, images: Tensor) -> Tensor:
    """Return the logits (T, n, 2) of stacked weights for the same images."""
    with torch.no_grad():
        if not weights:
            return logits_of(module(images))[None]
        return vmap(lambda own: logits_of(functional_call(module, own, (images,))))(weights)


def correct(logits: Tensor, labels: Tensor) -> list[float]:
    """Return each model's share of right answers."""
    return (logits.argmax(-1) == labels).double().mean(-1).tolist()


def put(module: nn.Module, weights: Weights, place: int) -> None:
    """Write one model's trained weights into the module."""
    held = dict(module.named_parameters())
    with torch.no_grad():
        for name, each in weights.items():
            held[name].copy_(each[place])


def orders(settings: Settings, num_images: int, tasks: Sequence[Task], seed: int) -> Tensor:
    """Draw each task's batches (T, steps, batch) of the first so many images; of a seed and a task the same for all methods."""
    return torch.stack([_order(settings, num_images, task, seed) for task in tasks])


def _order(settings: Settings, num_images: int, task: Task, seed: int) -> Tensor:
    """Whole epochs in shuffled order of the images that the task has, of which a seed draws others where it has not all."""
    generator = torch.Generator().manual_seed(int("".join(map(str, task.digits))) * 1000 + seed)
    had = torch.randperm(num_images, generator=generator)[: settings.num_images]
    needed = settings.steps * settings.batch_size
    epochs = [had[torch.randperm(len(had), generator=generator)] for _ in range(-(-needed // len(had)))]
    return torch.cat(epochs)[:needed].view(settings.steps, settings.batch_size)


def try_rates(module: nn.Module, settings: Settings, tasks: Sequence[Task]) -> dict[str, Any]:
    """Train every task at every rate on a part of its images; return accuracy and loss by rate on the rest of them."""
    data = digits.load()
    count = len(data.train_digits) - settings.num_checked
    rates = [rate for rate in settings.rates for _ in tasks]
    every = list(tasks) * len(settings.rates)
    labels = torch.stack([task.label(data.train_digits) for task in every])
    trained = train(module, data.train_images, labels, rates, orders(settings, count, every, settings.seeds[0]))
    logits = answers(module, trained, data.train_images[count:])
    right = torch.tensor(correct(logits, labels[:, count:]), dtype=torch.float64).view(len(settings.rates), -1).mean(1)
    loss = cross_entropy(logits.flatten(0, 1), labels[:, count:].flatten(), reduction="none")
    loss = loss.view(len(settings.rates), -1).mean(1).nan_to_num(torch.inf)
    return {"accuracy": right.tolist(), "loss": [round(each, 4) for each in loss.tolist()]}


def best_rate(settings: Settings, tried: Mapping[str, Sequence[float]]) -> float:
    """Return the rate of the highest accuracy; of equal ones the one of the lowest loss."""
    places = range(len(settings.rates))
    return settings.rates[max(places, key=lambda place: (tried["accuracy"][place], -tried["loss"][place]))]


def adapt_all(
    module: nn.Module, settings: Settings, tasks: Sequence[Task], rate: float, seed: int
) -> tuple[Weights, dict[str, Any]]:
    """Train every task at one rate; return the weights, and accuracy on the test images and processor seconds a model."""
    data = digits.load()
    labels = torch.stack([task.label(data.train_digits) for task in tasks])
    drawn = orders(settings, len(data.train_digits), tasks, seed)
    started = time.process_time()
    trained = train(module, data.train_images, labels, [rate] * len(tasks), drawn)
    seconds = (time.process_time() - started) / len(tasks)
    truth = torch.stack([task.label(data.test_digits) for task in tasks])
    return trained, {"accuracy": correct(answers(module, trained, data.test_images), truth), "seconds": seconds}


class Kept:
    """What was measured, one JSON line each, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path, self._settings = path, json.loads(json.dumps(asdict(settings)))
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        self._found = {self._key(each): each["value"] for each in records if each["settings"] == self._settings}

    @staticmethod
    def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return record["zoo"], record["method"], record["part"]

    def get(self, zoo: str, method: str, part: str) -> Any:
        """Return what was put there, or None."""
        return self._found.get((zoo, method, part))

    def put(self, zoo: str, method: str, part: str, value: Any) -> Any:
        """Append a line; returns the value as it will be read."""
        record = {"zoo": zoo, "method": method, "part": part, "value": value, "settings": self._settings}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._found[self._key(record)] = json.loads(json.dumps(value))
        return self._found[self._key(record)]
