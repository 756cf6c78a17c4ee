"""LoRA from a subspace: beside dense singular vectors, and inside real PEFT models."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import eigenzoo as ez
from builders import random_factors, random_stack, read_update, seeded, write_adapter, write_model, write_stacks
from eigenzoo.adapt.lora_init import lora_factors, put_factors
from eigenzoo.errors import MismatchError, UsageError
from tolerance import tolerance

FLOAT32 = tolerance(256, dtype=torch.float32)
MODULES = {"one": (9, 8), "two": (7, 9)}


class Net(nn.Module):
    """Two layers that can have a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 9), nn.Linear(9, 7)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(inputs)))


def adapters(root: Path, num: int = 6) -> list[Path]:
    return [write_adapter(root / f"m{n}", random_factors(MODULES, 2, seed=n), lora_alpha=1 + n) for n in range(num)]


def fitted(root: Path, view: str, axes: str) -> tuple[ez.Subspace, dict[str, torch.Tensor]]:
    """A subspace that loses nothing, and the changes (N, O, I) that it is of."""
    if view == "update":
        paths = adapters(root)
        changes = {name: torch.stack([read_update(path, name) for path in paths]) for name in MODULES}
        return ez.fit(ez.open_zoo(paths, view="update"), {"models": 5} if axes == "models" else {"inputs": 9}), changes
    stacks = {f"{name}.weight": 0.1 * random_stack(6, shape, i) for i, (name, shape) in enumerate(MODULES.items())}
    base = write_model(root / "base", {name: torch.ones(stack.shape[1:]) for name, stack in stacks.items()})
    paths = write_stacks(root / "zoo", {name: 1 + stack for name, stack in stacks.items()})
    zoo = ez.open_zoo(paths, view="delta", base=base) if view == "delta" else ez.open_zoo(paths)
    changes = {name.removesuffix(".weight"): stack for name, stack in stacks.items()}
    if view == "weight":
        changes = {name: stack - stack.mean(0) for name, stack in changes.items()}
    return ez.fit(zoo, {"models": 5} if axes == "models" else {"inputs": 9}), changes


@pytest.mark.parametrize(("view", "axes"), list(itertools.product(("update", "delta", "weight"), ("models", "sides"))))
def test_rows_of_a_are_the_leading_input_directions(tmp_path: Path, view: str, axes: str) -> None:
    space, changes = fitted(tmp_path, view, axes)
    for name, (b_OR, a_RI) in lora_factors(space, 3).items():
        _, singular, right = torch.linalg.svd(changes[name].flatten(0, 1), full_matrices=False)
        expected = right[:3].T @ right[:3]
        gap = float((singular[2] - singular[3]) / singular[0])
        assert gap > 1e-3
        found = a_RI.double()
        assert torch.allclose(found.T @ found, expected, atol=FLOAT32 / gap)
        assert torch.allclose(found @ found.T, torch.eye(3, dtype=torch.float64), atol=FLOAT32)
        assert b_OR.shape == (MODULES[name][0], 3)
        assert not bool(b_OR.any())


@pytest.mark.parametrize(("view", "axes"), list(itertools.product(("update", "delta"), ("models", "sides"))))
def test_the_mean_is_approximated_as_well_as_the_rank_allows(tmp_path: Path, view: str, axes: str) -> None:
    space, changes = fitted(tmp_path, view, axes)
    for rank in (2, 7):
        for name, (b_OR, a_RI) in lora_factors(space, rank, start="mean").items():
            mean = changes[name].mean(0)
            left, singular, right = torch.linalg.svd(mean, full_matrices=False)
            expected = (left[:, :rank] * singular[:rank]) @ right[:rank]
            scale = float(singular[0])
            assert torch.allclose((b_OR @ a_RI).double(), expected, atol=FLOAT32 * scale * 10)
            assert torch.allclose(b_OR.T @ b_OR, a_RI @ a_RI.T, atol=FLOAT32 * scale * 10)


def test_a_mean_of_low_rank_leaves_rows_that_have_no_effect_yet(tmp_path: Path) -> None:
    draw = seeded(0)
    parts = torch.randn(6, 7, 9, generator=draw)
    parts -= parts.mean(0)
    mean = torch.outer(torch.randn(7, generator=draw), torch.randn(9, generator=draw))
    base = write_model(tmp_path / "base", {"two.weight": torch.zeros(7, 9)})
    paths = write_stacks(tmp_path / "zoo", {"two.weight": parts.double() + mean})
    space = ez.fit(ez.open_zoo(paths, view="delta", base=base), {"models": 5})
    b_OR, a_RI = lora_factors(space, 3, start="mean")["two"]
    assert torch.allclose(b_OR @ a_RI, mean, atol=1e-4)
    # The mean is a float32 sum: what its round-off spans has no weight.
    assert float(b_OR[:, 1:].abs().max()) < 1e-2 * float(b_OR[:, 0].abs().max())
    assert float((a_RI[0] @ a_RI[1:].T).abs().max()) < 1e-4


@pytest.mark.parametrize("start", ["zero", "mean"])
def test_an_ordinary_peft_model_takes_them(tmp_path: Path, start: str) -> None:
    peft = pytest.importorskip("peft")
    paths = adapters(tmp_path)
    space = ez.fit(ez.open_zoo(paths, view="update"), {"models": 5})
    torch.manual_seed(0)
    net, inputs = Net(), torch.randn(5, 8, generator=seeded(3))
    before = net(inputs).detach()
    weights = {name: net.get_submodule(name).weight.detach().double().clone() for name in MODULES}
    config = peft.LoraConfig(r=7, lora_alpha=21, target_modules=list(MODULES))
    model = peft.get_peft_model(net, config)
    assert set(put_factors(model, lora_factors(space, 7, start=start))) == set(MODULES)
    answer = model(inputs).detach()
    if start == "zero":
        assert torch.equal(answer, before)
        return
    plain = Net()
    state = {}
    for name, weight in weights.items():
        left, singular, right = torch.linalg.svd(torch.stack([read_update(path, name) for path in paths]).mean(0))
        state[f"{name}.weight"] = (weight + (left[:, :7] * singular[:7]) @ right[:7]).float()
        state[f"{name}.bias"] = model.get_submodule(f"base_model.model.{name}.base_layer").bias
    plain.load_state_dict(state)
    assert torch.allclose(answer, plain(inputs), atol=1e-4)
    assert not torch.allclose(answer, before, atol=0.1)


def test_only_what_the_adapter_has_is_touched(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    space = ez.fit(ez.open_zoo(adapters(tmp_path), view="update"), {"models": 5})
    factors = lora_factors(space, 2)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["two"]))
    assert put_factors(model, factors) == ("two",)
    assert torch.equal(model.get_submodule("base_model.model.two").lora_A["default"].weight, factors["two"][1])
    with pytest.raises(MismatchError, match="no module has an adapter 'other'"):
        put_factors(model, factors, "other")
    with pytest.raises(MismatchError, match=r"has shape \[7, 2\]"):
        put_factors(model, lora_factors(space, 3))


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    updates, _ = fitted(tmp_path / "a", "update", "models")
    weights, _ = fitted(tmp_path / "b", "weight", "models")
    with pytest.raises(UsageError, match="rank 9"):
        lora_factors(updates, 9)
    with pytest.raises(UsageError, match="the start 'middle'"):
        lora_factors(updates, 2, start="middle")
    with pytest.raises(UsageError, match="the mean of whole weights"):
        lora_factors(weights, 2, start="mean")
    apart = ez.fit(ez.open_zoo(adapters(tmp_path / "c"), view="factors"), 3)
    with pytest.raises(UsageError, match="view 'factors'"):
        lora_factors(apart, 2)


def test_names_of_the_module_are_used(tmp_path: Path) -> None:
    space, _ = fitted(tmp_path, "delta", "models")
    found = lora_factors(space, 2, names={"one.weight": "body.first.weight"})
    assert set(found) == {"body.first", "two"}
