"""Seeds: one rule wherever one is taken, in Python and on the command line."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo import adapt, nursery
from eigenzoo.adapt.augment import Augmentation
from eigenzoo.adapt.search import search
from eigenzoo.adapt.trained import find_start
from eigenzoo.adapt.training import TensorData, train
from eigenzoo.cli.app import main
from eigenzoo.errors import UsageError

RULE = r"seed .*\. A seed is a whole number from 0 to 2\*\*{} - 1"
BAD = [2**63, 2**64, 10**30, 10**5000, -(10**5000), -1, 1.5, 1.0, "3", True, None, float("nan")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6, bias=False)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seeds") / "zoo"
    write_stacks(root, {"layer.weight": random_stack(8, (6, 5))})
    return root


def _one(path: Path | nn.Module) -> float:
    return 1.0


def _train(space: ez.Subspace, seed: Any) -> object:
    data = TensorData(torch.zeros(4, 5))
    loss = lambda module, batch: module.layer(batch[0]).square().sum()  # noqa: E731
    return train(adapt.attach(Net(), space), data, loss, steps=1, batch_size=2, seed=seed)


def _config(seed: Any) -> object:
    from eigenzoo.integrations.peft_tuner import EigenzooConfig

    return EigenzooConfig(bundle="b", seed=seed)


CALLS: dict[str, Callable[[ez.Subspace, Path, Any], object]] = {
    "fit": lambda space, zoo, seed: ez.fit(zoo, 2, seed=seed, cache=False),
    "evidence": lambda space, zoo, seed: ez.evidence(zoo, seed=seed, cache=False),
    "evidence of a bundle": lambda space, zoo, seed: ez.evidence(space, seed=seed),
    "evaluate": lambda space, zoo, seed: ez.evaluate(space, _one, ranks=[1], seed=seed),
    "attach": lambda space, zoo, seed: adapt.attach(Net(), space, seed=seed),
    "find_start": lambda space, zoo, seed: find_start(space, "random", seed),
    "Augmentation": lambda space, zoo, seed: Augmentation(1, seed),
    "train": lambda space, zoo, seed: _train(space, seed),
    "search": lambda space, zoo, seed: search(adapt.attach(Net(), space), _one, budget=30, seed=seed),
    "EigenzooConfig": lambda space, zoo, seed: _config(seed),
}


@pytest.fixture(scope="module")
def space(zoo: Path) -> ez.Subspace:
    return ez.fit(zoo, 3, cache=False)


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_seed_is_refused_by_the_one_rule(name: str, space: ez.Subspace, zoo: Path) -> None:
    for seed in BAD:
        with pytest.raises(UsageError, match=RULE.format(63)):
            CALLS[name](space, zoo, seed)


@pytest.mark.parametrize("name", CALLS)
def test_the_largest_seed_and_numpys_are_seeds(name: str, space: ez.Subspace, zoo: Path) -> None:
    for seed in (2**63 - 1, np.int64(7), np.uint64(2**63 - 1)):
        CALLS[name](space, zoo, seed)


def test_seeds_of_zoos_are_fewer(tmp_path: Path) -> None:
    """Each zoo has 126 seeds of its own for its models."""
    for seed in (*BAD, 2**31):
        with pytest.raises(UsageError, match=RULE.format(31)):
            nursery.make("digits-cnn", tmp_path / "zoo", seed=seed)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "zoo", "-o", "out"],
        ["evidence", "zoo"],
        ["report", "zoo", "-o", "out.md"],
        ["evaluate", "bundle", "--metric", "math:isfinite"],
        ["adapt", "bundle", "5-against-5:0,1,2,3,4", "--model", "m", "-o", "out"],
        ["nursery", "make", "digits-cnn", "-o", "out"],
        ["demo", "-o", "out"],
    ],
    ids=lambda words: words[0],
)
def test_commands_refuse_a_bad_seed_before_any_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (2**63, 2**64, -1):
        monkeypatch.setattr(sys, "argv", ["eigenzoo", *words, "--seed", str(seed)])
        said = io.StringIO()
        with contextlib.redirect_stderr(said), pytest.raises(SystemExit, match="2"):
            main()
        assert f"--seed: seed {seed}. A seed is a whole number from 0 to 2**63 - 1" in said.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_random_bases_of_a_peft_adapter_take_every_seed() -> None:
    pytest.importorskip("peft")
    from eigenzoo.integrations.peft_tuner.tuner import layer_seed

    seeds = [layer_seed(seed, layer) for seed in (0, 7, 2**31, 2**32, 2**63 - 1) for layer in ("a.weight", "b.weight")]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)
