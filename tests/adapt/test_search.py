"""Search without gradients: beside minima that are known, and beside itself when it is killed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo import adapt
from eigenzoo.adapt.search import SPREAD, _Evaluator, search
from eigenzoo.errors import DataError, FormatError, UsageError

pytest.importorskip("cma")

NUM_MODELS = 7


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(inputs)))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> ez.Subspace:
    stacks = {"one.weight": random_stack(NUM_MODELS, (6, 5)), "two.weight": random_stack(NUM_MODELS, (3, 6), seed=1)}
    return ez.fit(write_stacks(tmp_path_factory.mktemp("zoo"), stacks), 3)


def attached(space: ez.Subspace, start: str = "mean") -> adapt.Adapted:
    torch.manual_seed(0)
    return adapt.attach(Net(), space, start=start)


def far_from(space: ez.Subspace, weights: list[float]) -> tuple[Callable[[nn.Module], torch.Tensor], dict]:
    """The squared distance of both layers from M + Σ w_n (X̂_n − M), whose least value is zero; and the coefficients there."""
    values = {name: torch.tensordot(torch.tensor(weights), rows, 1) for name, rows in space.all_coefficients.items()}
    targets = [space.layers[name].rebuild(found).float() for name, found in values.items()]

    def distance(module: nn.Module) -> torch.Tensor:
        found = [module.one.weight, module.two.weight]
        return sum(((a - b).square().sum() for a, b in zip(found, targets, strict=True)), torch.zeros(()))

    return distance, values


WEIGHTS = [0.5, -0.2, 0.0, 0.3, 0.0, 0.0, -0.4]


@pytest.mark.parametrize("over", ["coefficients", "models"])
@pytest.mark.parametrize("maximize", [False, True])
def test_it_finds_the_one_minimum(space: ez.Subspace, over: str, maximize: bool) -> None:
    distance, expected = far_from(space, WEIGHTS)
    adapted = attached(space)
    sign = -1 if maximize else 1
    found = search(adapted, lambda module: sign * distance(module), budget=1200, over=over, maximize=maximize)
    assert sign * found.best < 1e-6 * sign * found.start
    with torch.no_grad():
        assert float(distance(adapted.module)) == sign * found.best
    for name, values in expected.items():
        assert torch.allclose(found.values[name], values, atol=1e-3 * float(values.abs().max()))
        assert torch.equal(found.values[name], adapted.coefficients()[name])
    assert found.evaluations <= 1200
    assert set(found.weights) == (set(space.names) if over == "models" else set())


def test_weights_over_models_are_those_of_the_coefficients_that_were_found(space: ez.Subspace) -> None:
    distance, _ = far_from(space, WEIGHTS)
    found = search(attached(space), distance, budget=100, over="models")
    weights = torch.tensor([found.weights[name] for name in space.names])
    for name, rows in space.all_coefficients.items():
        assert torch.allclose(found.values[name], torch.tensordot(weights, rows, 1), atol=1e-5)


def test_a_few_candidates_at_once_are_worth_what_they_are_one_by_one(space: ez.Subspace) -> None:
    adapted = attached(space, "m3")
    inputs, answers = torch.randn(9, 5), torch.randint(3, (9,))
    thetas = torch.randn(7, 6)

    def loss(module: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(module(inputs), answers)

    singly = _Evaluator(adapted, loss, None, 1.0)(thetas)
    for at_once in (1, 3, 20):
        together = _Evaluator(adapted, loss, at_once, 1.0)(thetas)
        assert np.allclose(singly, together, rtol=1e-5, atol=0)
    assert np.ptp(singly) > 0.01


class KilledError(Exception):
    """The end of a process."""


def dying(metric: Callable[[nn.Module], torch.Tensor], after: int) -> Callable[[nn.Module], torch.Tensor]:
    """The metric, for so many evaluations."""
    left = [after]

    def counted(module: nn.Module) -> torch.Tensor:
        if not left[0]:
            raise KilledError("no more")
        left[0] -= 1
        return metric(module)

    return counted


@pytest.mark.parametrize("after", [1, 10, 47, 60])
@pytest.mark.parametrize("over", ["coefficients", "models"])
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(
    space: ez.Subspace, tmp_path: Path, after: int, over: str
) -> None:
    distance, _ = far_from(space, WEIGHTS)
    options = {"budget": 80, "over": over, "seed": 5}
    whole = search(attached(space), distance, **options)
    file, adapted = tmp_path / "new" / "state.safetensors", attached(space)
    before = adapted.coefficients()
    with pytest.raises(KilledError, match="no more"):
        search(adapted, dying(distance, after), state=file, **options)
    assert all(torch.equal(values, before[name]) for name, values in adapted.coefficients().items())
    np.random.seed(11)
    again = search(attached(space), dying(distance, 80 - after + 9), state=file, **options)
    assert again.history == whole.history
    assert again.weights == whole.weights
    assert all(torch.equal(values, whole.values[name]) for name, values in again.values.items())


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(space: ez.Subspace, tmp_path: Path) -> None:
    distance, _ = far_from(space, WEIGHTS)
    file, adapted = tmp_path / "state.safetensors", attached(space)
    search(adapted, distance, budget=40, state=file)
    more = search(adapted, dying(distance, 60), budget=90, state=file)
    whole = search(attached(space), distance, budget=90)
    assert more.history == whole.history
    assert all(torch.equal(values, whole.values[name]) for name, values in more.values.items())


def test_only_what_is_named_changes(space: ez.Subspace) -> None:
    distance, _ = far_from(space, WEIGHTS)
    found = search(attached(space, "m1"), distance, budget=60, layers=["one.*"], leading=2)
    before = space.coefficients("m1").values
    assert torch.equal(found.values["two.weight"], before["two.weight"])
    changed = found.values["one.weight"] != before["one.weight"]
    assert changed.tolist() == [True, True, False]
    only = search(attached(space, "m1"), distance, budget=60, over="models", layers=["two.*"])
    assert torch.equal(only.values["one.weight"], before["one.weight"])


def test_the_first_generation_is_spread_as_asked(space: ez.Subspace) -> None:
    """With many candidates at θ = SPREAD · normal the mean squared θ is SPREAD², over models in the zoo's own covariance too."""
    adapted, seen = attached(space), []

    def watch(module: nn.Module) -> float:
        seen.append(torch.cat([weight.trained.theta.detach().clone() for weight in adapted.weights.values()]))
        return 0.0

    for over in ("coefficients", "models"):
        seen.clear()
        for seed in range(40):
            search(attached_again(adapted), watch, budget=12, over=over, seed=seed)
        drawn = torch.stack([theta for theta in seen if bool(theta.any())])
        assert float(drawn.square().mean().sqrt()) == pytest.approx(SPREAD, rel=0.15)


def attached_again(adapted: adapt.Adapted) -> adapt.Adapted:
    adapted.set_coefficients({name: torch.zeros_like(values) for name, values in adapted.coefficients().items()})
    return adapted


def test_the_start_is_kept_where_nothing_is_better(space: ez.Subspace) -> None:
    adapted = attached(space, "m2")
    before = space.coefficients("m2").values
    at_start = adapted.module.one.weight.detach().clone()
    found = search(adapted, lambda module: float((module.one.weight - at_start).abs().max()), budget=30, leading=1)
    assert found.best == found.start == 0.0
    assert all(torch.allclose(found.values[name], before[name]) for name in before)


def test_values_that_are_not_finite_lose(space: ez.Subspace) -> None:
    distance, _ = far_from(space, WEIGHTS)

    def halved(module: nn.Module) -> torch.Tensor:
        return distance(module) if module.one.weight[0, 0] >= first else torch.tensor(float("nan"))

    adapted = attached(space)
    first = adapted.module.one.weight[0, 0].detach() - 1e-3
    found = search(adapted, halved, budget=300)
    assert np.isfinite(found.best)
    assert found.best < 0.5 * found.start
    with pytest.raises(DataError, match="the start of the search: the metric is NaN"):
        search(attached(space), lambda module: float("inf"))


def test_states_of_others_are_refused(space: ez.Subspace, tmp_path: Path) -> None:
    distance, _ = far_from(space, WEIGHTS)
    file = tmp_path / "state.safetensors"
    search(attached(space), distance, budget=40, state=file)
    for options in ({"seed": 1}, {"over": "models"}, {"spread": 0.2}, {"leading": 2}, {"maximize": True}):
        with pytest.raises(UsageError, match="is of another search"):
            search(attached(space), distance, budget=40, state=file, **options)
    with pytest.raises(UsageError, match="is of another search"):
        search(attached(space, "m4"), distance, budget=40, state=file)
    adapter = adapt.save(attached(space), tmp_path / "adapter.safetensors")
    with pytest.raises(FormatError, match="holds no search"):
        search(attached(space), distance, budget=40, state=adapter)


def test_a_state_of_other_draws_is_refused(space: ez.Subspace, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    distance, _ = far_from(space, WEIGHTS)
    file = tmp_path / "state.safetensors"
    search(attached(space), distance, budget=40, state=file)
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file({**tensors, "last": tensors["last"] + 1e-9}, file, metadata)
    with pytest.raises(UsageError, match="drew other points"):
        search(attached(space), distance, budget=60, state=file)
    save_file({**tensors, "values": tensors["values"][:-2]}, file, metadata)
    with pytest.raises(UsageError, match="drew other points"):
        search(attached(space), distance, budget=60, state=file)
    save_file({**tensors, "origin": tensors["origin"][:-2]}, file, metadata)
    with pytest.raises(FormatError, match="6 coefficients"):
        search(attached(space), distance, budget=60, state=file)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": 8}, "a budget of 8 evaluations"),
        ({"layers": ["three.*"]}, "no layer matches three"),
        ({"over": "shared"}, "over 'shared'"),
        ({"over": "models", "leading": 2}, "leading does not apply"),
        ({"leading": 0}, "leading 0"),
        ({"leading": 1, "layers": ["one.*"]}, "1 numbers to search over"),
        ({"at_once": 0}, "0 candidates at once"),
    ],
)
def test_what_cannot_be_meant_is_refused(space: ez.Subspace, options: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        search(attached(space), lambda module: 0.0, **options)


def test_a_batched_metric_gives_one_value(space: ez.Subspace) -> None:
    with pytest.raises(UsageError, match=r"a tensor of shape \[5\]"):
        search(attached(space), lambda module: module.one.weight[0], at_once=4)


def test_without_cma_it_says_what_to_install(space: ez.Subspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(UsageError, match=r"'\.\[adapt\]'"):
        search(attached(space), lambda module: 0.0)
