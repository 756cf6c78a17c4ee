"""Zoos of a few hastily trained models, made once for all tests of the nursery."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from eigenzoo.nursery.making import make_zoo
from eigenzoo.nursery.recipe import Plan, Recipe, Schedule, plan_zoo
from once import once


@dataclass(frozen=True)
class Made:
    folder: Path
    recipe: Recipe

    def model(self, name: str) -> Path:
        path = self.folder / name
        return path if path.exists() else path.with_suffix(".safetensors")


def _hasty_plan(kind: str, steps: int = 60, pretraining: int = 200, **options: Any) -> Plan:
    """The plan that `make` follows, with fewer models and steps."""
    wanted = {"num_models": 4, "seed": 0, "random_labels": False, "train_head": False, "own_init": None, **options}
    plan = plan_zoo(kind, **wanted)
    return replace(
        plan,
        schedule=replace(plan.schedule, steps=steps),
        pretraining=Schedule(pretraining, 64, 5e-3) if plan.pretraining else None,
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads train such small models a third faster on idle cores, and many times slower on busy ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Make a zoo of hastily trained models; the same arguments give the same folder, not made again."""

    def make(kind: str, **options: Any) -> Made:
        def fill(root: Path) -> None:
            recipe = make_zoo(_hasty_plan(kind, **options), root / kind, False, None)
            (root / "recipe.pickle").write_bytes(pickle.dumps(recipe))

        words = [kind, *(f"{name}={value}" for name, value in sorted(options.items()))]
        root = once(tmp_path_factory, "-".join(["nursery", *words]), fill)
        return Made(root / kind, pickle.loads((root / "recipe.pickle").read_bytes()))

    return make


@pytest.fixture(scope="session")
def hasty_plan() -> Callable[..., Plan]:
    """The plan of a hasty zoo, for tests that make it themselves."""
    return _hasty_plan
