"""The tuner on real models: what it computes is what PEFT computes with the zoo's own adapters, and every verb of PEFT works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft_models import FITS, KINDS, Made, coefficients, shake, tuned

import eigenzoo as ez
from eigenzoo.integrations.peft_tuner import EigenzooConfig
from eigenzoo.integrations.peft_tuner.layer import EigenzooLayer
from tolerance import tolerance

# PEFT's own use of what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

CASES = list(FITS)
ADAPTERS = [name for name, fit in FITS.items() if fit.of == "adapters"]
CLOSE = {"atol": tolerance(64, dtype=torch.float32, scale=4), "rtol": 0}


@pytest.mark.parametrize("name", CASES)
def test_a_start_of_zero_changes_nothing_and_everything_can_be_trained(made: Callable[[str], Made], name: str) -> None:
    case = made(name)
    model = tuned(case)
    torch.testing.assert_close(case.outputs(model), case.outputs(case.base()), **CLOSE)
    assert coefficients(model)
    assert all(".theta" in parameter for parameter in coefficients(model))
    found = model(**KINDS[case.kind].inputs)
    getattr(found, "logits", found).square().sum().backward()
    for parameter, values in coefficients(model).items():
        # With B = 0 there is no gradient in A yet.
        assert values.grad is not None
        assert "eigenzoo_a" in parameter or float(values.grad.abs().max()) > 0, parameter


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_of_the_zoo_computes_what_stock_peft_computes_with_its_adapter(
    made: Callable[[str], Made], name: str
) -> None:
    case = made(name)
    model = tuned(case, start="m3")
    stock = PeftModel.from_pretrained(case.base(), case.paths[3]).eval()
    assert (case.outputs(stock) - case.outputs(case.base())).abs().max() > 0.01
    torch.testing.assert_close(case.outputs(model), case.outputs(stock), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [name for name, fit in FITS.items() if fit.of == "checkpoints"])
def test_a_checkpoint_of_the_zoo_has_its_own_weights(made: Callable[[str], Made], name: str) -> None:
    from safetensors.torch import load_file

    case = made(name)
    with pytest.warns(UserWarning, match="layers of the bundle are no weights"):
        model = tuned(case, start="m2")
    (file,) = case.paths[2].glob("*.safetensors")
    stored = load_file(file)
    layers = [layer for layer in model.modules() if isinstance(layer, EigenzooLayer)]
    assert len(layers) == len(model.peft_config["default"].modules)
    for place, (_, name_in_file) in model.peft_config["default"].modules.items():
        layer = model.base_model.model.get_submodule(place)
        weight = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(weight.detach(), stored[name_in_file], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_compute_the_same_and_are_unmerged_again(made: Callable[[str], Made], name: str) -> None:
    case = made(name)
    model = tuned(case)
    shake(model)
    before, weights = case.outputs(model), {key: value.clone() for key, value in model.state_dict().items()}
    assert (before - case.outputs(case.base())).abs().max() > 1e-3
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(case.outputs(model), before, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[key], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.outputs(model), before, atol=1e-4, rtol=1e-4)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is type(case.base())
    torch.testing.assert_close(case.outputs(merged), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(case.outputs(model.unload()), case.outputs(case.base()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_what_is_trained_and_comes_back_to_the_bit(
    made: Callable[[str], Made], name: str, tmp_path: Path
) -> None:
    case = made(name)
    model = tuned(case)
    shake(model)
    before = case.outputs(model)
    model.save_pretrained(tmp_path / "saved")
    state = get_peft_model_state_dict(model)
    sizes = {key.replace(".default.theta", ".coefficients"): value.shape for key, value in coefficients(model).items()}
    assert {key: value.shape for key, value in state.items()} == sizes
    assert all(value.dtype == torch.float32 for value in state.values())
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "saved").eval()
    for key, value in get_peft_model_state_dict(loaded).items():
        assert torch.equal(value, state[key]), key
    torch.testing.assert_close(case.outputs(loaded), before, **CLOSE)
    assert not coefficients(loaded)
    lazily = PeftModel.from_pretrained(case.base(), tmp_path / "saved", low_cpu_mem_usage=True).eval()
    assert torch.equal(case.outputs(lazily), case.outputs(loaded))
    again = PeftModel.from_pretrained(case.base(), tmp_path / "saved", is_trainable=True)
    assert set(coefficients(again)) == set(coefficients(model))


@pytest.mark.parametrize("name", ["llama-sides", "llama-factors", "gpt2-models", "vit-sides", "conv-weights"])
def test_adapters_lie_beside_each_other(made: Callable[[str], Made], name: str) -> None:
    case = made(name)
    model = tuned(case)
    shake(model, 1)
    first = case.outputs(model)
    model.add_adapter("other", EigenzooConfig(bundle=str(case.bundle)))
    torch.testing.assert_close(case.outputs(model), first, **CLOSE)
    model.set_adapter("other")
    assert all(".other." in parameter for parameter in coefficients(model))
    torch.testing.assert_close(case.outputs(model), case.outputs(case.base()), **CLOSE)
    shake(model, 2)
    second = case.outputs(model)
    assert (second - first).abs().max() > 1e-3
    for layer in model.modules():
        if isinstance(layer, EigenzooLayer):
            assert len(layer.eigenzoo_bases) == len(layer.eigenzoo_uses["default"])
    with model.disable_adapter():
        torch.testing.assert_close(case.outputs(model), case.outputs(case.base()), **CLOSE)
    model.set_adapter("default")
    torch.testing.assert_close(case.outputs(model), first, **CLOSE)
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["default", "other"])
    both = case.outputs(model)
    model.unmerge_adapter()
    torch.testing.assert_close(case.outputs(model), both, atol=1e-4, rtol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    torch.testing.assert_close(case.outputs(model), first, atol=1e-4, rtol=1e-4)


def test_deleting_the_last_adapter_of_a_basis_frees_it(made: Callable[[str], Made]) -> None:
    case = made("llama-sides")
    model = tuned(case)
    model.add_adapter("other", EigenzooConfig(bundle=str(made("llama-models").bundle)))
    layers = [layer for layer in model.modules() if isinstance(layer, EigenzooLayer)]
    assert {len(layer.eigenzoo_bases) for layer in layers} == {2}
    model.delete_adapter("other")
    assert {len(layer.eigenzoo_bases) for layer in layers} == {1}


@pytest.mark.parametrize("name", ["llama-sides", "llama-models", "llama-factors", "vit-weights", "conv-sides"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_keeps_its_coefficients_in_float32(
    made: Callable[[str], Made], name: str, dtype: torch.dtype
) -> None:
    case = made(name)
    reference = tuned(case)
    shake(reference)
    model = get_peft_model(case.base().to(dtype), EigenzooConfig(bundle=str(case.bundle))).eval()
    shake(model)
    assert {values.dtype for values in coefficients(model).values()} == {torch.float32}
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in KINDS[case.kind].inputs.items()
    }
    found = model(**inputs)
    logits = getattr(found, "logits", found)
    assert logits.dtype == dtype
    expected = case.outputs(reference)
    # Eight bits of mantissa, through a few layers.
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
    logits.float().square().sum().backward()
    assert all(bool(torch.isfinite(values.grad).all()) for values in coefficients(model).values())
    # Moving what is there already rounds bases once, and coefficients never.
    before = get_peft_model_state_dict(reference)
    moved = copy.deepcopy(reference).to(dtype)
    assert all(torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(moved).items())


@pytest.mark.parametrize("name", ["llama-sides", "llama-models", "llama-factors", "llama-weights", "gpt2-sides"])
def test_autocast_and_gradient_checkpointing_train(made: Callable[[str], Made], name: str) -> None:
    case = made(name)
    model = tuned(case).train()
    shake(model)
    model(**KINDS[case.kind].inputs).logits.square().mean().backward()
    plain = {key: value.grad.clone() for key, value in coefficients(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**KINDS[case.kind].inputs).logits.square().mean().backward()
    for key, value in coefficients(model).items():
        torch.testing.assert_close(value.grad, plain[key], atol=1e-6, rtol=1e-4)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(**KINDS[case.kind].inputs).logits.float().square().mean().backward()
    for key, value in coefficients(model).items():
        assert value.grad.dtype == torch.float32
        assert (value.grad - plain[key]).norm() < 0.1 * plain[key].norm() + 1e-6


def test_modules_to_save_are_trained_and_saved_whole(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("vit-sides")
    model = tuned(case, modules_to_save=["classifier"])
    trained = coefficients(model)
    assert {key for key in trained if "theta" not in key} == {
        f"base_model.model.classifier.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")
    }
    shake(model)
    before = case.outputs(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "saved").eval()
    torch.testing.assert_close(case.outputs(loaded), before, **CLOSE)


def test_some_layers_only(made: Callable[[str], Made]) -> None:
    case = made("llama-sides")
    model = tuned(case, target_modules=["q_proj"])
    assert set(model.peft_config["default"].modules) == {f"model.layers.{n}.self_attn.q_proj" for n in range(2)}
    without = tuned(case, exclude_modules=["q_proj", "embed_tokens"])
    assert all(name.endswith("down_proj") for name in without.peft_config["default"].modules)
    linear = tuned(case, target_modules="all-linear")
    assert len(linear.peft_config["default"].modules) == 4


def test_a_broken_adapter_is_not_merged_safely(made: Callable[[str], Made]) -> None:
    case = made("llama-sides")
    model = tuned(case)
    with torch.no_grad():
        next(iter(coefficients(model).values())).fill_(float("nan"))
    with pytest.raises(ez.DataError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("start", ["mean", "random", "path"])
def test_starts_are_those_of_the_zoo(made: Callable[[str], Made], start: str, tmp_path: Path) -> None:
    case = made("llama-sides")
    model = tuned(case, start=str(case.paths[4]) if start == "path" else start, seed=7)
    again = tuned(case, start="m4" if start == "path" else start, seed=7)
    torch.testing.assert_close(case.outputs(model), case.outputs(again), atol=2e-5, rtol=2e-5)
    if start == "mean":
        ez.load(case.bundle).rebuild("m0", mean_only=True).save(tmp_path / "mean")
        stock = PeftModel.from_pretrained(case.base(), tmp_path / "mean").eval()
        torch.testing.assert_close(case.outputs(model), case.outputs(stock), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama-sides", "llama-models", "llama-factors", "conv-weights"])
def test_a_random_basis_is_another_one_and_comes_back(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    case = made(name)
    model = tuned(case, random_basis=True, seed=3)
    shake(model)
    plain = tuned(case)
    shake(plain)
    assert (case.outputs(model) - case.outputs(plain)).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "saved").eval()
    torch.testing.assert_close(case.outputs(loaded), case.outputs(model), **CLOSE)


def test_a_path_that_training_began_with_is_not_needed_again(made: Callable[[str], Made], tmp_path: Path) -> None:
    import shutil

    case = made("llama-models")
    shutil.copytree(case.paths[1], tmp_path / "began")
    model = tuned(case, start=str(tmp_path / "began"))
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "began")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "saved").eval()
    torch.testing.assert_close(case.outputs(loaded), case.outputs(model), **CLOSE)


def test_a_copy_of_a_model_is_one_of_its_own(made: Callable[[str], Made]) -> None:
    case = made("llama-sides")
    model = tuned(case)
    copied = copy.deepcopy(model)
    shake(copied)
    torch.testing.assert_close(case.outputs(model), case.outputs(case.base()), **CLOSE)
