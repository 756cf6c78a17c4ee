"""What the docstrings of adaptation promise at their edges: batch norms, other shapes, refusals that change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_attach import SHAPES, net
from test_attach_twice import same, state
from torch import Tensor, nn

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo import adapt
from eigenzoo.adapt.continual import Stream
from eigenzoo.adapt.lora_init import put_factors
from eigenzoo.adapt.rebuilding import rebuild
from eigenzoo.adapt.training import TensorData, train
from tolerance import tolerance


@pytest.fixture
def space(tmp_path: Path) -> ez.Subspace:
    stacks = {name: random_stack(6, shape, seed=place) for place, (name, shape) in enumerate(SHAPES.items())}
    return ez.fit(write_stacks(tmp_path / "zoo", stacks), 3)


class Normed(nn.Module):
    """A linear layer and a batch norm, whose statistics a zoo of checkpoints holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.lin(inputs))


def test_statistics_of_a_batch_norm_are_those_that_are_rebuilt(tmp_path: Path) -> None:
    """A sum of directions may take a variance below zero, where a rebuilt model has the least positive number."""
    stacks = {
        "lin.weight": random_stack(8, (6, 4)),
        "norm.running_mean": random_stack(8, (6,), seed=4),
        "norm.running_var": random_stack(8, (6,), seed=3).abs() + 0.01,
    }
    space = ez.fit(write_stacks(tmp_path / "zoo", stacks), 3)
    adapted = adapt.attach(Normed().eval(), space)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(5.0)
    expected = rebuild(space, adapt.save(adapted, tmp_path / "task.safetensors"))
    assert float(space.layers["norm.running_var"].rebuild(adapted.coefficients()["norm.running_var"]).min()) < 0
    for name in stacks:
        path, _, leaf = name.rpartition(".")
        found, wanted = getattr(adapted.module.get_submodule(path), leaf), expected.exact(name).float()
        assert torch.allclose(found, wanted, atol=tolerance(64, dtype=torch.float32, scale=float(wanted.abs().max())))
    assert not bool(adapted.module(torch.ones(2, 4)).isnan().any())


def test_a_module_with_adapted_statistics_trains_without_them(tmp_path: Path) -> None:
    """Torch has no gradient of a batch norm's statistics: they stay where they begin, and all else is trained."""
    stacks = {"lin.weight": random_stack(8, (6, 4)), "norm.running_mean": random_stack(8, (6,), seed=4)}
    adapted = adapt.attach(Normed(), ez.fit(write_stacks(tmp_path, stacks), 3), start="m1")
    before = adapted.coefficients()
    data = TensorData(torch.ones(5, 4), torch.zeros(5))
    train(adapted, data, lambda module, batch: module(batch[0]).square().sum(), steps=3, batch_size=2)
    after = adapted.coefficients()
    assert torch.equal(after["norm.running_mean"], before["norm.running_mean"])
    assert not torch.equal(after["lin.weight"], before["lin.weight"])


def test_coefficients_of_other_layers_or_shapes_are_refused(space: ez.Subspace) -> None:
    adapted = adapt.attach(net(), space)
    before = adapted.coefficients()
    whole = {name: torch.ones_like(values) for name, values in before.items()}
    for broken in ({}, whole | {"tail": torch.ones(3)}):
        with pytest.raises(ez.UsageError, match="coefficients of the layers"):
            adapted.set_coefficients(broken)
    with pytest.raises(ez.MismatchError, match=r"conv\.weight.*\[1\].*\[3\]"):
        adapted.set_coefficients(whole | {"conv.weight": torch.ones(1)})
    assert all(torch.equal(values, before[name]) for name, values in adapted.coefficients().items())
    module = net()
    untouched = state(module)
    with pytest.raises(ez.UsageError, match=r"'tail'.*not a layer"):
        adapt.attach(module, space, start=adapt.Start(True, {"tail": torch.ones(3)}))
    with pytest.raises(ez.MismatchError, match=r"conv\.weight.*\[2\].*\[3\]"):
        adapt.attach(module, space, start=adapt.Start(True, {"conv.weight": torch.ones(2)}))
    assert same(state(module), untouched)


def test_a_file_whose_head_does_not_fit_changes_nothing(space: ez.Subspace, tmp_path: Path) -> None:
    """A bias of one class would be copied into all of them."""
    small = net()
    small.head = nn.Linear(6, 1)
    file = adapt.save(adapt.attach(small, space, start="m1", besides=["head.*"]), tmp_path / "task.safetensors")
    adapted = adapt.attach(net(), space, besides=["head.*"])
    before = state(adapted.module)
    with pytest.raises(ez.BundleError, match=r"head\.(bias|weight).*has shape"):
        adapt.load(file, adapted)
    assert same(state(adapted.module), before)


def test_a_task_that_cannot_be_put_into_a_module_leaves_it(space: ez.Subspace, tmp_path: Path) -> None:
    small, stream = net(), Stream(space, tmp_path / "stream")
    small.head = nn.Linear(6, 1)
    stream.learn("one", adapt.attach(small, stream.space, besides=["head.*"]))
    module = net()
    before = state(module)
    with pytest.raises(ez.BundleError, match=r"head\.(bias|weight).*has shape"):
        stream.attach("one", module)
    assert same(state(module), before)


def test_factors_that_do_not_fit_one_module_change_none() -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)), peft.LoraConfig(r=2, target_modules=["0", "1"])
    )
    before = state(tuned)
    factors = {"0": (torch.ones(5, 2), torch.ones(2, 4)), "1": (torch.ones(6, 3), torch.ones(3, 5))}
    with pytest.raises(ez.MismatchError, match=r"lora_B of .*1': has shape \[6, 2\]"):
        put_factors(tuned, factors)
    assert same(state(tuned), before)
