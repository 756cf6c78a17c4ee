"""Everything that writes an output: what it starts from, what it does, and which output it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from killed import command
from torch import nn

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo import adapt
from eigenzoo.adapt import unfinished

NUM_MODELS, SHAPE = 5, (6, 5)


@dataclass(frozen=True)
class Operation:
    """One kind of work in a folder that holds zoo/, more/ and bundle/.

    Attributes:
        output: the name of what it writes.
        work: does it once.
        again: does it where the output is there already; by default the same.
        prepare: what else is there before.
    """

    output: str
    work: Callable[[Path], object]
    again: Callable[[Path], object] | None = None
    prepare: Callable[[Path], object] | None = None


def write_start(root: Path) -> None:
    """A zoo, a model more, and a bundle of the zoo."""
    stacks = {f"layer.{n}.weight": random_stack(NUM_MODELS, SHAPE, n) for n in range(4)}
    write_stacks(root / "zoo", stacks)
    more = write_stacks(root / "more", {name: stack[:1] * 0.9 + stack[1:2] * 0.2 for name, stack in stacks.items()})
    more[0].rename(root / "more" / "new")
    ez.fit(root / "zoo", 2, cache=False).save(root / "bundle")


class Net(nn.Module):
    """A module with two of the zoo's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(5, 6, bias=False), nn.Linear(5, 6, bias=False)])


def _fit(root: Path, *words: object) -> None:
    command("fit", root / "zoo", "-o", root / "fitted", "--rank", 3, "--no-cache", "--quiet", *words)


def _adapted(root: Path) -> None:
    torch.manual_seed(0)
    zoo = root / "two"
    write_stacks(zoo, {f"layer.{n}.weight": random_stack(NUM_MODELS, SHAPE, n) for n in range(2)})
    ez.fit(zoo, 2, cache=False).save(root / "basis")
    adapt.save(adapt.attach(Net(), ez.load(root / "basis")), root / "task.safetensors")


def _save_adapted(root: Path) -> None:
    adapted = adapt.attach(Net(), ez.load(root / "basis"))
    ones = {name: torch.ones_like(values) for name, values in adapted.coefficients().items()}
    adapted.set_coefficients(ones)
    adapt.save(adapted, root / "task.safetensors", force=True)


def _save_training(root: Path, steps: int = 6) -> None:
    parameter = nn.Parameter(torch.zeros(7, 3))
    optimizer = torch.optim.Adam([parameter])
    for step in range(1, steps + 1):
        parameter.grad = torch.ones(7, 3)
        optimizer.step()
        if step in (1, steps):
            unfinished.write(root / "training", "run", [parameter], optimizer, [1.0] * step)


def _make_zoo(root: Path, seed: int = 1) -> None:
    """A zoo of the nursery, hardly trained."""
    from eigenzoo.nursery.making import make_zoo
    from eigenzoo.nursery.recipe import plan_zoo

    plan = plan_zoo("digits-cnn", 2, seed, False, False, None)
    make_zoo(replace(plan, schedule=replace(plan.schedule, steps=1)), root / "digits", True, None)


OPERATIONS = {
    "nursery": Operation("digits", _make_zoo),
    "nursery --force": Operation("digits", _make_zoo, prepare=lambda root: _make_zoo(root, 2)),
    "fit": Operation("fitted", _fit, lambda root: _fit(root, "--force")),
    "fit --force": Operation(
        "fitted", lambda root: _fit(root, "--force"), prepare=lambda root: (root / "bundle").rename(root / "fitted")
    ),
    "add": Operation(
        "bundle",
        lambda root: command("add", root / "bundle", root / "more" / "new", "--quiet"),
        again=lambda root: None,
    ),
    "add --refresh": Operation(
        "bundle",
        lambda root: command("add", root / "bundle", root / "more" / "new", "--refresh", "--quiet"),
        again=lambda root: None,
    ),
    "add -o": Operation(
        "grown",
        lambda root: command("add", root / "bundle", root / "more" / "new", "-o", root / "grown", "--quiet"),
        again=lambda root: command(
            "add", root / "bundle", root / "more" / "new", "-o", root / "grown", "--force", "--quiet"
        ),
    ),
    "rebuild": Operation(
        "model",
        lambda root: command("rebuild", root / "bundle", "m1", "-o", root / "model"),
        again=lambda root: command("rebuild", root / "bundle", "m1", "-o", root / "model", "--force"),
    ),
    "rebuild --force": Operation(
        "model",
        lambda root: command("rebuild", root / "bundle", "m1", "-o", root / "model", "--force"),
        prepare=lambda root: command("rebuild", root / "bundle", "m2", "-o", root / "model"),
    ),
    "project": Operation(
        "bundle", lambda root: command("project", root / "bundle", root / "more" / "new", "--json", "--quiet")
    ),
    "report --force": Operation(
        "page.csv",
        lambda root: command("report", root / "bundle", "-o", root / "page.csv", "--force", "--no-cache", "--quiet"),
        prepare=lambda root: (root / "page.csv").write_text("section,layer,model,series,x,y\nverdict,,,text,,old\n"),
    ),
    "adapted coefficients": Operation("task.safetensors", _save_adapted, prepare=_adapted),
    "training state": Operation("training", _save_training, prepare=lambda root: _save_training(root, 1)),
}
