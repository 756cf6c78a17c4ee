"""Low-rank cores are trained as two factors: what is computed, how many numbers, what files hold, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_model
from eigenzoo import adapt
from eigenzoo.adapt import rebuilding
from eigenzoo.adapt.search import search
from tolerance import tolerance

SIDES = ("outputs", "inputs")
FLOAT32 = tolerance(64, dtype=torch.float32)
OUTPUTS, INPUTS, RANK, NUM = 10, 9, 2, 2 * (6 + 5)
INPUT = torch.randn(7, INPUTS, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """One layer that a zoo holds, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, OUTPUTS), nn.Linear(OUTPUTS, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(values)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module", params=["weights", "updates"])
def space(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ez.Subspace:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "updates":
        shared = random_factors({"body": (OUTPUTS, INPUTS)}, 3, 99)
        for place in range(6):
            own = random_factors({"body": (OUTPUTS, INPUTS)}, 3, place)
            mixed = {"body": tuple(0.5 * (x + y) for x, y in zip(own["body"], shared["body"], strict=True))}
            write_adapter(root / f"m{place}", mixed)
    else:
        stack = random_stack(6, (OUTPUTS, INPUTS), 1).float()
        for place in range(6):
            write_model(root / f"m{place}", {"body.weight": stack[place]})
    ranks = {"outputs": 6, "inputs": 5}
    return ez.load(ez.fit(root, axes=SIDES, rank=ranks, core_rank=RANK).save(root.parent / f"{root.name}-bundle"))


def names_of(space: ez.Subspace) -> dict[str, str]:
    return dict.fromkeys(space.layers, "body.weight")


def change(space: ez.Subspace, module: nn.Module) -> torch.Tensor:
    """What is on top of the zoo's mean (full weights), or of the model's own weight (updates)."""
    (basis,) = space.layers.values()
    own = basis.removed().float() if space.view == "weight" else net().body.weight
    return (module.body.weight - own).detach()


def attached(space: ez.Subspace, **options: object) -> adapt.Adapted:
    return adapt.attach(net(), space, names=names_of(space), **options)


def loss(module: nn.Module) -> torch.Tensor:
    return (module(INPUT) - 1).square().sum()


def metric(module: nn.Module) -> float:
    with torch.no_grad():
        return loss(module).item()


def train(adapted: adapt.Adapted) -> None:
    optimiser = torch.optim.Adam(adapted.parameters(), 0.05)
    for _ in range(20):
        optimiser.zero_grad()
        loss(adapted.module).backward()
        optimiser.step()


def test_a_model_begins_where_the_bundle_rebuilds_it(space: ez.Subspace) -> None:
    adapted = attached(space, start="m2")
    expected = space.rebuild("m2").layer(next(iter(space.layers))).float()
    found = adapted.module.body.weight if space.view == "weight" else change(space, adapted.module)
    assert (found - expected).abs().max() <= FLOAT32 * float(expected.abs().max())
    assert adapted.num_trained == NUM


@pytest.mark.parametrize("start", ["mean", "zero", "random", "m1"])
def test_both_factors_are_trained_and_the_change_keeps_its_rank(space: ez.Subspace, start: str) -> None:
    adapted = attached(space, start=start)
    before = loss(adapted.module).item()
    if start == "zero":
        assert torch.allclose(adapted.module.body.weight, net().body.weight, atol=FLOAT32)
    train(adapted)
    assert loss(adapted.module).item() < 0.9 * before
    (weight,) = adapted.weights.values()
    left, right = torch.split(weight.trained.theta.detach(), [6 * RANK, RANK * 5])
    assert float(left.abs().min()) > 0
    assert float(right.abs().min()) > 0
    own = net().body.weight if start == "zero" else None
    moved = change(space, adapted.module) if own is None else (adapted.module.body.weight - own).detach()
    values = torch.linalg.svdvals(moved.double())
    assert int((values > 1e-5 * values[0]).sum()) == RANK


def test_the_mean_of_full_weights_is_where_it_is(space: ez.Subspace) -> None:
    if space.view != "weight":
        pytest.skip("the mean of updates has more than the rank")
    assert float(change(space, attached(space).module).abs().max()) <= FLOAT32


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_files_hold_the_factors_and_give_the_same_model(space: ez.Subspace, start: str, tmp_path: Path) -> None:
    adapted = attached(space, start=start)
    train(adapted)
    adapt.save(adapted, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["coefficients"].shape == (NUM,)
    again = attached(space, start=start)
    adapt.load(tmp_path / "a.safetensors", again)
    assert torch.allclose(again.module(INPUT), adapted.module(INPUT), atol=FLOAT32, rtol=FLOAT32)
    if start == "zero" and space.view == "weight":
        return
    rebuilt = rebuilding.rebuild(space, tmp_path / "a.safetensors")
    layer = next(iter(space.layers))
    found = rebuilt.layer(layer).float()
    expected = adapted.module.body.weight.detach() if space.view == "weight" else change(space, adapted.module)
    assert (found - expected).abs().max() <= FLOAT32 * float(expected.abs().max())
    if space.view == "update":
        assert rebuilt.factors(layer)[1].shape[0] == RANK


def test_random_directions_besides_widen_both_factors(space: ez.Subspace, tmp_path: Path) -> None:
    adapted = attached(space, augment=2, seed=3)
    assert adapted.num_trained == RANK * (6 + 2 + 5 + 2)
    assert torch.allclose(adapted.module.body.weight, attached(space).module.body.weight, atol=FLOAT32)
    train(adapted)
    adapt.save(adapted, tmp_path / "a.safetensors")
    again = attached(space, augment=2, seed=3)
    adapt.load(tmp_path / "a.safetensors", again)
    assert torch.allclose(again.module(INPUT), adapted.module(INPUT), atol=FLOAT32, rtol=FLOAT32)


def test_a_random_basis_begins_at_the_mean_and_trains(space: ez.Subspace) -> None:
    adapted = attached(space, random_basis=True)
    assert adapted.num_trained == NUM
    (basis,) = space.layers.values()
    mean = (
        basis.removed() if space.view == "weight" else basis.side("outputs") @ basis.removed() @ basis.side("inputs").T
    )
    found = adapted.module.body.weight.detach().double() - (
        0 if space.view == "weight" else net().body.weight.detach().double()
    )
    assert (found - mean).abs().max() <= FLOAT32 * float(mean.abs().max())
    before = loss(adapted.module).item()
    train(adapted)
    assert loss(adapted.module).item() < before


def test_a_search_goes_over_the_numbers_and_not_over_sums_of_models(space: ez.Subspace) -> None:
    adapted = attached(space)

    with pytest.raises(ez.UsageError, match="over 'models' with low-rank cores"):
        search(adapted, metric, budget=8, over="models")
    begun = metric(adapted.module)
    assert search(adapted, metric, budget=60).best <= begun
