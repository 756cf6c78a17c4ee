"""Zoos whose models share less, or more, than a task each: permuted networks, and many runs of one task."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.func import functional_call
from zoo_checks import ONE_KIND, weight_file

from eigenzoo.nursery import accuracy, digits
from eigenzoo.nursery.cnn import Cnn
from eigenzoo.nursery.making import choose_children
from tolerance import ONE_IMAGE

Hasty = Callable[..., Any]
Planner = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    doubled = {name: weight.double() for name, weight in weights.items()}
    return functional_call(Cnn().double(), doubled, (digits.load().test_images.double(),))


@pytest.mark.parametrize("own_init", [True, False])
def test_a_permuted_zoo_is_the_same_functions_with_neurons_elsewhere(hasty: Hasty, own_init: bool) -> None:
    plain, permuted = (hasty("digits-cnn", num_models=3, own_init=own_init, permuted=flag) for flag in (False, True))
    assert list(permuted.recipe.models) == list(plain.recipe.models)
    firsts = []
    for name, facts in permuted.recipe.models.items():
        assert facts == plain.recipe.models[name]
        before, after = (load_file(zoo.model(name)) for zoo in (plain, permuted))
        # In float64 from the same float32 weights: what differs is the order of sums alone.
        torch.testing.assert_close(logits(after), logits(before), rtol=0, atol=1e-11)
        assert {key for key in before if torch.equal(before[key], after[key])} <= {"head.bias"}
        for key in before:
            assert torch.equal(before[key].flatten().sort().values, after[key].flatten().sort().values)
        firsts.append([(before["conv3.bias"] == bias).nonzero().item() for bias in after["conv3.bias"]])
        assert accuracy(permuted.model(name)) == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)
    assert all(one != other for one, other in itertools.combinations(firsts, 2))


def test_a_permuted_zoo_says_so(hasty: Hasty) -> None:
    zoo = hasty("digits-cnn", num_models=3, own_init=False, permuted=True)
    assert json.loads((zoo.folder / "zoo.json").read_text())["permuted"] is True
    assert json.loads((hasty("digits-cnn").folder / "zoo.json").read_text())["permuted"] is False
    for name, facts in zoo.recipe.models.items():
        with safe_open(zoo.model(name), framework="pt") as file:
            assert file.metadata()["permutation_seed"] == str(facts["seed"])


@pytest.mark.parametrize("kind", ONE_KIND)
def test_many_runs_of_one_task(hasty: Hasty, kind: str, hasty_plan: Planner) -> None:
    zoo = hasty(kind, same_task=True, num_models=3)
    (task,) = {facts["task"] for facts in zoo.recipe.models.values()}
    first = choose_children(hasty_plan(kind))[0]
    assert task == str(first.task)
    assert list(zoo.recipe.models) == [f"{first.name}-run-{run:03d}" for run in range(3)]
    assert json.loads((zoo.folder / "zoo.json").read_text())["same_task"] is True
    seen = []
    for name, facts in zoo.recipe.models.items():
        path = zoo.model(name)
        assert accuracy(path) == pytest.approx(facts["test_accuracy"], abs=ONE_IMAGE)
        assert facts["test_accuracy"] > 0.75
        seen.append(load_file(weight_file(path)))
    for one, other in itertools.combinations(seen, 2):
        assert any((one[key] - other[key]).abs().max() > 1e-3 for key in one)


@pytest.mark.parametrize("own_init", [True, False])
def test_runs_of_one_task_start_as_told_and_differ_in_the_order_ofbatches(hasty: Hasty, own_init: bool) -> None:
    zoo = hasty("digits-cnn", same_task=True, steps=1, num_models=2, own_init=own_init)
    one, other = (load_file(zoo.model(name))["conv1.weight"] for name in zoo.recipe.models)
    assert not torch.equal(one, other)
    # One step moves no weight by more than the first rate, 0.01 over a warm-up of one.
    assert ((one - other).abs().max() <= 0.021) != own_init


def test_runs_are_named_once_and_have_seeds_of_their_own(hasty_plan: Planner) -> None:
    def runs(num_models: int, seed: int) -> list[Any]:
        return choose_children(hasty_plan("digits-cnn", num_models=num_models, seed=seed, same_task=True))

    assert len({child.name for child in runs(126, 0)}) == len({child.seed for child in runs(126, 0)}) == 126
    assert runs(126, 0)[:5] == runs(5, 0)
    assert not {child.seed for child in runs(126, 0)} & {child.seed for child in runs(126, 1)}
    assert runs(1, 0)[0].task != runs(1, 1)[0].task
