"""What `attach` refuses, what it leaves behind when it fails, and several attaches on one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_attach import FLOAT32, IMAGES, SHAPES, Net, net
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo import adapt
from eigenzoo.adapt.calibrate import calibrate


def fitted(folder: Path, names: tuple[str, ...] = tuple(SHAPES), rank: int = 3) -> ez.Subspace:
    """A subspace of some of the layers of `Net`."""
    stacks = {name: random_stack(6, SHAPES[name], seed=place) for place, name in enumerate(names)}
    return ez.fit(write_stacks(folder, stacks), rank)


@pytest.fixture
def space(tmp_path: Path) -> ez.Subspace:
    return fitted(tmp_path / "zoo")


State = tuple[dict[str, Tensor], dict[str, bool], list[type], list[bool]]


def state(module: nn.Module) -> State:
    """Values, what is trainable, classes, and modes of a module and its parts."""
    parts = list(module.modules())
    return (
        {name: values.detach().clone() for name, values in module.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        [type(part) for part in parts],
        [part.training for part in parts],
    )


def same(one: State, other: State) -> bool:
    """Whether nothing differs but the order of a part's parameters, which torch's parametrization does not keep."""
    values = one[0].keys() == other[0].keys() and all(
        torch.equal(kept, other[0][name]) for name, kept in one[0].items()
    )
    return values and one[1:] == other[1:]


def test_a_second_attach_is_refused_by_name_and_changes_nothing(space: ez.Subspace, tmp_path: Path) -> None:
    adapted = adapt.attach(net(), space, start="m1")
    answer, before = adapted.module(IMAGES).detach(), state(adapted.module)
    for again in (space, fitted(tmp_path / "other", ("body.weight",))):
        with pytest.raises(ez.UsageError, match=r"(conv|body)\.weight.*attached already.*detach\(adapted\)"):
            adapt.attach(adapted.module, again)
        assert same(state(adapted.module), before)
        assert torch.equal(adapted.module(IMAGES), answer)


def test_attached_detached_and_attached_again(space: ez.Subspace) -> None:
    module = net()
    module.head.bias.requires_grad_(False)
    before = state(module)
    for start in ("m1", "zero", "m2"):
        adapted = adapt.attach(module, space, start=start, besides=["head.*"])
        answer = module(IMAGES).detach()
        assert adapt.detach(adapted) is module
        assert torch.equal(module(IMAGES), answer)
        assert state(module)[1:] == before[1:]
    with pytest.raises(ez.UsageError, match="not attached"):
        adapt.detach(adapted)


def by_a_parametrization(module: Net) -> None:
    parametrizations.weight_norm(module.body)


def by_a_hook(module: Net) -> None:
    nn.utils.spectral_norm(module.body)


def by_pruning(module: Net) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(module.body, "weight", 0.5)


def by_peft(module: Net) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["body"]))


@pytest.mark.parametrize("held", [by_a_parametrization, by_a_hook, by_pruning, by_peft])
def test_a_weight_that_something_else_holds_is_refused(space: ez.Subspace, held: Callable[[Net], None]) -> None:
    module = net()
    held(module)
    before = state(module)
    with pytest.raises(ez.UsageError, match=r"body.*weight.*held by"):
        adapt.attach(module, space)
    assert same(state(module), before)


def test_the_layer_inside_a_peft_layer_is_refused_too(space: ez.Subspace) -> None:
    module = net()
    by_peft(module)
    with pytest.raises(ez.UsageError, match=r"body\.base_layer.*held by.*Linear"):
        adapt.attach(module, space, names={"body.weight": "body.base_layer.weight"})


def test_a_failure_half_way_leaves_the_module_as_it_was(space: ez.Subspace, monkeypatch: pytest.MonkeyPatch) -> None:
    module = net().eval()
    module.body.train()
    before, register, calls = state(module), parametrize.register_parametrization, []

    def interrupted(*words: object, **options: object) -> nn.Module:
        calls.append(words)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return register(*words, **options)

    monkeypatch.setattr(parametrize, "register_parametrization", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt.attach(module, space, besides=["head.*"])
    assert same(state(module), before)
    monkeypatch.undo()
    for options in ({"augment": -1}, {"start": "nobody"}, {"besides": ["tail"]}):
        with pytest.raises(ez.UsageError, match=r"random directions|neither a model|matches 'tail'"):
            adapt.attach(module, space, **options)
        assert same(state(module), before)
    adapt.attach(module, space)


def test_attaches_on_disjoint_parts_train_beside_each_other(tmp_path: Path) -> None:
    body, conv = fitted(tmp_path / "a", ("body.weight",)), fitted(tmp_path / "b", ("conv.weight", "conv.bias"))
    module = net()
    before = state(module)
    one = adapt.attach(module, body, besides=["head.bias"])
    other = adapt.attach(module, conv, besides=["head.weight"])
    trained = {id(parameter) for adapted in (one, other) for parameter in adapted.parameters()}
    assert {id(parameter) for parameter in module.parameters() if parameter.requires_grad} == trained
    module(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None for adapted in (one, other) for parameter in adapted.parameters())
    answer = module(IMAGES).detach()
    adapt.detach(other)
    assert {id(p) for p in module.parameters() if p.requires_grad} == {id(p) for p in one.parameters()}
    assert torch.equal(module(IMAGES), answer)
    adapt.detach(one)
    assert torch.equal(module(IMAGES), answer)
    assert state(module)[1:] == before[1:]


def test_a_parameter_that_another_attach_trains_is_refused(tmp_path: Path) -> None:
    module = net()
    adapt.attach(module, fitted(tmp_path / "a", ("body.weight",)), besides=["conv.*"])
    before = state(module)
    with pytest.raises(ez.UsageError, match=r"conv\.weight.*trained by another attach"):
        adapt.attach(module, fitted(tmp_path / "b", ("conv.weight",)))
    with pytest.raises(ez.UsageError, match="matches 'body"):
        adapt.attach(module, _head(tmp_path), besides=["body*theta"])
    assert same(state(module), before)


def _head(folder: Path) -> ez.Subspace:
    return ez.fit(write_stacks(folder / "head", {"head.weight": random_stack(6, (2, 6))}), 3)


class Tied(nn.Module):
    """An embedding that is the output layer too, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embed(tokens))


@pytest.mark.parametrize("start", ["m2", "zero"])
def test_tied_weights_stay_tied(tmp_path: Path, start: str) -> None:
    """The file has one of the two names; both layers compute with it, as they did in the model that was rebuilt."""
    torch.manual_seed(0)
    module = Tied()
    space = ez.fit(write_stacks(tmp_path, {"embed.weight": random_stack(6, (7, 4))}), 3)
    adapted = adapt.attach(module, space, start=start)
    with torch.no_grad():
        next(adapted.parameters()).add_(0.5)
    assert torch.equal(module.out.weight, module.embed.weight)
    tokens = torch.arange(7)
    answer = module(tokens)
    weight = module.embed.weight.detach().clone()
    torch.testing.assert_close(answer, weight @ weight.T, atol=FLOAT32, rtol=FLOAT32)
    answer.square().sum().backward()
    assert len(list(adapted.parameters())) == 1
    adapt.detach(adapted)
    assert module.out.weight is module.embed.weight
    assert torch.equal(module.embed.weight, weight)
    assert torch.equal(module(tokens), answer.detach())


def test_a_calibration_that_fails_puts_the_module_back(space: ez.Subspace) -> None:
    module = net()
    before = state(module)

    def broken(module: nn.Module, step: int) -> Tensor:
        return module(IMAGES).sum() * (float("nan") if step == 2 else 1.0)

    def interrupted(module: nn.Module, step: int) -> Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return module(IMAGES).sum()

    with pytest.raises(ez.DataError, match="step 2: the loss is nan"):
        calibrate(module, space, "m1", broken, besides=["head.*"])
    assert same(state(module), before)
    with pytest.raises(KeyboardInterrupt):
        calibrate(module, space, "m1", interrupted, besides=["head.*"])
    assert same(state(module), before)


def test_two_layers_of_a_bundle_for_one_weight_are_refused(tmp_path: Path) -> None:
    module, stack = Tied(), random_stack(6, (7, 4))
    space = ez.fit(write_stacks(tmp_path, {"embed.weight": stack, "out.weight": stack.clone()}), 3)
    before = state(module)
    with pytest.raises(ez.UsageError, match=r"out\.weight.*same parameter as layer 'embed\.weight'"):
        adapt.attach(module, space)
    assert same(state(module), before)
