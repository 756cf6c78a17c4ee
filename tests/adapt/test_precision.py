"""The map from coefficients to weights, whatever precision surrounds it: autocast, models in half, models moved later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_attach import SHAPES, net
from torch import Tensor, nn

import eigenzoo as ez
from builders import random_stack, seeded, write_stacks
from eigenzoo import adapt
from tolerance import tolerance

# PEFT's own use of what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

AXES = {"flat": ("models",), "tucker": ("outputs", "inputs"), "all": ("models", "outputs", "inputs")}


@pytest.fixture(params=AXES)
def space(request: pytest.FixtureRequest, tmp_path: Path) -> ez.Subspace:
    stacks = {name: random_stack(8, shape, seed=place) for place, (name, shape) in enumerate(SHAPES.items())}
    return ez.fit(write_stacks(tmp_path, stacks), 4, axes=AXES[request.param])


def weight_of(module: nn.Module, layer: str) -> Tensor:
    path, _, leaf = layer.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def reference(space: ez.Subspace, adapted: adapt.Adapted, layer: str) -> tuple[Tensor, Tensor]:
    """W and dW/dc · G for a fixed G, dense in float64."""
    basis = space.layers[layer]
    values = adapted.coefficients()[layer].double()
    shape = basis.layer.tensor_shape
    zero = basis.rebuild(torch.zeros_like(values))
    units = torch.eye(values.numel(), dtype=torch.float64).view(-1, *values.shape)
    rows = torch.stack([(basis.rebuild(unit) - zero).flatten() for unit in units])
    weight = zero.flatten() + values.flatten() @ rows
    gradient = rows @ outer(shape).flatten().double()
    return weight.view(shape), gradient.view(values.shape)


def outer(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=seeded(4))


@pytest.mark.parametrize("start", ["mean", "m2", "zero"])
def test_weights_and_gradients_under_autocast_are_those_of_float64(space: ez.Subspace, start: str) -> None:
    module = net()
    before = {layer: weight_of(module, layer).detach().clone() for layer in SHAPES}
    with torch.autocast("cpu", torch.bfloat16):
        adapted = adapt.attach(module, space, start=start)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(5)))
    for layer in SHAPES:
        expected, gradient = reference(space, adapted, layer)
        if start == "zero":
            mean = space.layers[layer].rebuild(torch.zeros(space.layers[layer].coefficient_shape)).view(expected.shape)
            expected = expected - mean + before[layer].double()
        with torch.autocast("cpu", torch.bfloat16):
            found = weight_of(module, layer)
            assert found.dtype == torch.float32
            loss = (found * outer(tuple(found.shape))).sum()
        loss.backward()
        close = tolerance(64, dtype=torch.float32)
        assert float((found.detach().double() - expected).abs().max()) < close * float(expected.abs().max()), layer
        trained = adapted.weights[layer].trained
        error = trained.theta.grad.double() - gradient * trained.scales.double()
        assert float(error.abs().max()) < close * float((gradient * trained.scales.double()).abs().max()), layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("moved", ["before", "after"])
def test_a_weight_of_another_dtype_is_rounded_once(space: ez.Subspace, dtype: torch.dtype, moved: str) -> None:
    """Half an ulp of the weight and not more: bases and coefficients stay in float32, moved before or after."""
    module = net().to(dtype) if moved == "before" else net()
    before = {layer: weight_of(net().to(dtype), layer).detach().double() for layer in SHAPES}
    adapted = adapt.attach(module, space, start="zero")
    if moved == "after":
        module.to(dtype)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(5)))
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float32}
    for layer in SHAPES:
        expected, _ = reference(space, adapted, layer)
        mean = space.layers[layer].rebuild(torch.zeros(space.layers[layer].coefficient_shape)).view(expected.shape)
        expected = expected - mean + before[layer]
        found = weight_of(module, layer).detach()
        assert found.dtype == dtype
        if dtype == torch.float64:
            # The bases are float32 values; their sum is not rounded to it where the module was float64 when it was attached.
            close = tolerance(64, dtype=torch.float64 if moved == "before" else torch.float32)
            assert float((found - expected).abs().max()) < close * float(expected.abs().max()), layer
            continue
        rounding = expected.abs() * torch.finfo(dtype).eps / 2 * 1.001 + tolerance(4, dtype=torch.float32)
        assert bool(((found.detach().double() - expected).abs() <= rounding).all()), layer


def test_a_random_basis_drawn_under_autocast_is_the_same(space: ez.Subspace) -> None:
    plain = adapt.attach(net(), space, random_basis=True, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = adapt.attach(net(), space, random_basis=True, seed=3)
    for layer in SHAPES:
        assert torch.equal(weight_of(plain.module, layer), weight_of(cast.module, layer))


@pytest.mark.parametrize(
    "name", ["llama-sides", "llama-models", "llama-factors", "llama-weights", "conv-sides", "gpt2-sides"]
)
def test_what_peft_adds_to_a_weight_is_not_rounded_by_autocast(made: Callable[[str], object], name: str) -> None:
    pytest.importorskip("peft")
    from peft_models import shake, tuned

    from eigenzoo.integrations.peft_tuner.layer import EigenzooLayer

    case = made(name)
    model = tuned(case)
    shake(model)
    layers = [layer for layer in model.modules() if isinstance(layer, EigenzooLayer)]
    plain = [layer.get_delta_weight("default").detach() for layer in layers]
    with torch.autocast("cpu", torch.bfloat16):
        for layer, expected in zip(layers, plain, strict=True):
            assert torch.equal(layer.get_delta_weight("default"), expected)
        weights = [layer.get_base_layer().weight.detach().clone() for layer in layers]
        model.merge_adapter()
    for layer, weight, change in zip(layers, weights, plain, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight + change)


def test_rows_of_an_embedding_are_not_rounded_by_autocast(made: Callable[[str], object]) -> None:
    pytest.importorskip("peft")
    from peft_models import TOKENS, shake, tuned

    model = tuned(made("llama-sides"))
    shake(model)
    embed, ids = model.get_input_embeddings(), TOKENS["input_ids"]
    expected = embed(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed(ids), expected)
