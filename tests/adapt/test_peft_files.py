"""Adapters and their bundles: which belong together, where they lie, and how PEFT comes to know of them."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft_models import KINDS, Made, coefficients, conv, gpt2, llama, outputs, shake, tuned

import eigenzoo as ez
from eigenzoo.integrations.peft_tuner import EigenzooModel, registration
from eigenzoo.integrations.peft_tuner.config import BUNDLES, EigenzooConfig
from eigenzoo.integrations.peft_tuner.layer import EigenzooLayer
from sampling import slow_but

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


def test_a_bundle_of_another_basis_is_refused_with_both_named(made: Callable[[str], Made], tmp_path: Path) -> None:
    case, other = made("llama-sides"), made("llama-models")
    tuned(case).save_pretrained(tmp_path / "saved")
    ids = [ez.load(found.bundle).manifest.basis_id for found in (case, other)]
    with pytest.raises(ez.BundleError, match=rf"the bundle has basis {ids[1]}.*was trained in basis {ids[0]}"):
        PeftModel.from_pretrained(case.base(), tmp_path / "saved", bundle=other.bundle)


def test_a_bundle_that_has_moved_is_named_anew(
    made: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made("llama-sides")
    shutil.copytree(case.bundle, tmp_path / "here")
    model = get_peft_model(case.base(), EigenzooConfig(bundle=str(tmp_path / "here"))).eval()
    shake(model)
    expected = case.outputs(model)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(ez.BundleError, match=f"there is no bundle.*{BUNDLES} is not set"):
        PeftModel.from_pretrained(case.base(), tmp_path / "saved")
    config = EigenzooConfig.from_pretrained(str(tmp_path / "saved"))
    config.bundle = str(tmp_path / "there")
    for options in ({"bundle": tmp_path / "there"}, {"config": config}):
        loaded = PeftModel.from_pretrained(case.base(), tmp_path / "saved", **options).eval()
        assert torch.equal(case.outputs(loaded), expected)
    monkeypatch.setenv(BUNDLES, f"{made('llama-models').bundle}:{tmp_path / 'there'}")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "saved").eval()
    assert torch.equal(case.outputs(loaded), expected)
    loaded.load_adapter(tmp_path / "saved", "second")
    monkeypatch.setenv(BUNDLES, str(made("llama-models").bundle))
    with pytest.raises(ez.BundleError, match=f"nor any of {BUNDLES}"):
        PeftModel.from_pretrained(case.base(), tmp_path / "saved")


def test_what_a_config_leaves_out_is_said(made: Callable[[str], Made]) -> None:
    with pytest.raises(ez.UsageError, match="no bundle is named"):
        get_peft_model(llama(), EigenzooConfig())
    with pytest.raises(ez.UsageError, match="neither a model of the bundle nor a path"):
        tuned(made("llama-sides"), start="nothing")


def test_a_config_comes_back_as_it_was(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("vit-sides")
    model = tuned(case, start="mean", seed=5, modules_to_save=["classifier"])
    model.save_pretrained(tmp_path / "saved")
    config = PeftConfig.from_pretrained(str(tmp_path / "saved"))
    assert isinstance(config, EigenzooConfig)
    assert (config.start, config.seed, config.bundle) == ("mean", 5, str(case.bundle))
    assert config.basis == ez.load(case.bundle).manifest.basis_id
    assert config.modules == model.peft_config["default"].modules
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.peft_type is PeftType("EIGENZOO")


def test_another_kind_of_model_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    config = EigenzooConfig(bundle=str(made("llama-sides").bundle))
    with pytest.raises(ez.MismatchError, match="of the bundle's layers are not in the model"):
        get_peft_model(gpt2(), copy.deepcopy(config))
    with pytest.raises(ez.MismatchError, match=r"the module has 32 outputs and 64 inputs"):
        get_peft_model(llama(intermediate_size=64), copy.deepcopy(config))
    tuned(made("llama-sides")).save_pretrained(tmp_path / "saved")
    document = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    document["modules"].popitem()
    (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(ez.MismatchError, match=r"the adapter has 4 modules, but the model has 5"):
        PeftModel.from_pretrained(llama(), tmp_path / "saved")


def test_a_tied_weight_is_not_adapted_in_one_place(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("gpt2-weights")
    space = ez.fit(case.paths, 2, axes=["models"], exclude=["*ln*", "*bias"])
    bundle = space.save(tmp_path / "tied")
    with pytest.raises(ez.UnsupportedError, match="its weight is tied to lm_head"):
        get_peft_model(gpt2(), EigenzooConfig(bundle=str(bundle)))
    model = get_peft_model(gpt2(), EigenzooConfig(bundle=str(bundle), exclude_modules=["transformer.wte"]))
    assert "transformer.wte" not in model.peft_config["default"].modules


def test_layers_that_the_model_lacks_can_be_excluded(made: Callable[[str], Made]) -> None:
    case = made("conv-sides")
    model = conv()
    del model.body
    with pytest.raises(ez.MismatchError, match="1 of the bundle's layers are not in the model: body"):
        get_peft_model(model, EigenzooConfig(bundle=str(case.bundle)))
    with pytest.warns(UserWarning, match="no modules were excluded"):
        tuned_model = get_peft_model(model, EigenzooConfig(bundle=str(case.bundle), exclude_modules=["body"]))
    assert set(tuned_model.peft_config["default"].modules) == {"wide", "long"}


def test_a_file_with_other_sizes_is_an_error(made: Callable[[str], Made], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    case = made("llama-models")
    tuned(case).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:1].clone()}, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"size mismatch for .*coefficients"):
        PeftModel.from_pretrained(case.base(), tmp_path / "saved")
    tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        PeftModel.from_pretrained(case.base(), tmp_path / "saved")


class Quantised(nn.Module):
    """Eight bits a weight and one scale, as quantised layers look to PEFT."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ (self.weight.to(inputs.dtype) * self.scale).T


def test_a_quantised_base_is_adapted_but_not_merged(made: Callable[[str], Made]) -> None:
    case = made("llama-sides")
    model = case.base()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Quantised(layer.self_attn.q_proj)
    base = case.outputs(model)
    adapted = get_peft_model(model, EigenzooConfig(bundle=str(case.bundle), target_modules=["q_proj"])).eval()
    torch.testing.assert_close(case.outputs(adapted), base)
    shake(adapted)
    assert (case.outputs(adapted) - base).abs().max() > 1e-3
    adapted(**KINDS[case.kind].inputs).logits.sum().backward()
    assert all(values.grad is not None for values in coefficients(adapted).values())
    with pytest.raises(ez.UnsupportedError, match="a quantised layer cannot be merged into"):
        adapted.merge_adapter()


def test_layers_go_into_a_model_without_a_wrapper(made: Callable[[str], Made]) -> None:
    case = made("llama-sides")
    config = EigenzooConfig(bundle=str(case.bundle), start="m1")
    model = inject_adapter_in_model(config, case.base())
    expected = case.outputs(tuned(case, start="m1"))
    torch.testing.assert_close(case.outputs(model), expected)
    native = case.base()
    native.add_adapter(EigenzooConfig(bundle=str(case.bundle), start="m1"))
    torch.testing.assert_close(case.outputs(native.eval()), expected)


def test_generation_and_selected_adapters(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("llama-factors")
    model = tuned(case)
    model.add_adapter("second", EigenzooConfig(bundle=str(case.bundle), start="m1"))
    model.set_adapter("second")
    tokens = model.generate(**KINDS[case.kind].inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (3, 13)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["second"])
    assert not (tmp_path / "saved" / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "saved" / "second").eval()
    torch.testing.assert_close(case.outputs(loaded), case.outputs(model))
    expected = get_peft_model_state_dict(model, adapter_name="second")
    assert all(torch.equal(value, expected[key]) for key, value in get_peft_model_state_dict(loaded).items())
    with pytest.raises(ValueError, match="Adapter third does not exist"):
        model.delete_adapter("third")


def test_the_basis_is_held_once_and_in_the_base_models_dtype(made: Callable[[str], Made]) -> None:
    case = made("llama-sides")
    model = get_peft_model(case.base().to(torch.bfloat16), EigenzooConfig(bundle=str(case.bundle)))
    before = sum(buffer.nbytes for _, buffer in model.named_buffers())
    model.add_adapter("other", EigenzooConfig(bundle=str(case.bundle)))
    own = sum(2 * values.nbytes for values in coefficients(model).values())  # starts and scales
    assert sum(buffer.nbytes for _, buffer in model.named_buffers()) == before + own
    layers = [layer for layer in model.modules() if isinstance(layer, EigenzooLayer)]
    for layer in layers:
        for basis in layer.eigenzoo_bases.values():
            assert basis.before.dtype == basis.after.dtype == torch.bfloat16
    assert not any("eigenzoo_bases" in key for key in model.state_dict())


def test_sizes_are_those_of_the_layer(made: Callable[[str], Made]) -> None:
    model = tuned(made("llama-sides")).base_model.model.model
    sizes = [(layer.in_features, layer.out_features) for layer in (model.embed_tokens, model.layers[0].mlp.down_proj)]
    assert sizes == [(50, 32), (48, 32)]
    convolution = tuned(made("conv-sides")).base_model.model.wide
    assert (convolution.in_features, convolution.out_features) == (3, 8)


def test_torch_attention_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    from builders import random_factors, write_adapter

    paths = [write_adapter(tmp_path / f"m{n}", random_factors({"attention.out_proj": (8, 8)}, 2, n)) for n in range(3)]
    bundle = ez.fit(paths, 2).save(tmp_path / "bundle")
    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ez.UnsupportedError, match="modules of type NonDynamicallyQuantizableLinear"):
        get_peft_model(model, EigenzooConfig(bundle=str(bundle)))


def test_registration_happens_once() -> None:
    registration.register(EigenzooConfig, EigenzooModel)
    assert [member.value for member in PeftType].count("EIGENZOO") == 1
    with pytest.raises(ez.UnsupportedError, match="another method called EIGENZOO"):
        registration.register(PeftConfig, EigenzooModel)


def test_a_version_of_peft_that_is_built_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "NEEDED", (*registration.NEEDED, "_not_there"))
    with pytest.raises(ez.UnsupportedError, match=r"PEFT \d.* has no BaseTuner._not_there"):
        registration.peft_type()


@pytest.mark.parametrize("version", ["0.4.0.dev0", "0.17.1"])
def test_versions_before_the_first_are_refused(version: str) -> None:
    with pytest.raises(ez.UnsupportedError, match=f"PEFT is version {version}.*for PEFT 0.18 to 0.21"):
        registration.check_version(version)
    registration.check_version("0.18.0")
    registration.check_version("1.0.0rc1")


def test_without_peft_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("eigenzoo.integrations.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ez.UsageError, match=r"PEFT cannot be imported.*ip install -c constraints.txt -e '\.\[peft\]'"):
        importlib.import_module("eigenzoo.integrations.peft_tuner")


def test_outputs_of_a_model_do_not_depend_on_the_order_of_adapters(made: Callable[[str], Made]) -> None:
    case = made("conv-weights-sides")
    found = []
    for names in (("one", "two"), ("two", "one")):
        model = get_peft_model(
            case.base(), EigenzooConfig(bundle=str(case.bundle), random_basis=True, seed=1), names[0]
        )
        model.add_adapter(names[1], EigenzooConfig(bundle=str(case.bundle), random_basis=True, seed=1))
        model.base_model.set_adapter(list(names))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "theta" in name:
                    parameter.fill_(0.5 if ".one." in name else -0.25)
        found.append(outputs(model.eval(), case.kind))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("module", slow_but(["config", "lora_export", "registration"], quick=["config"]))
def test_any_file_of_the_tuner_registers_the_method(module: str) -> None:
    script = (
        f"{'import peft' if module == 'config' else ''}\n"
        f"import eigenzoo.integrations.peft_tuner.{module}\n"
        "import peft\n"
        "from eigenzoo.integrations.peft_tuner.config import EigenzooConfig\n"
        "kind = EigenzooConfig(bundle='b').peft_type\n"
        "print(peft.PEFT_TYPE_TO_TUNER_MAPPING[kind].__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "EigenzooModel"


@pytest.mark.parametrize("name", ["conv-sides", "conv-weights"])
def test_a_layer_that_is_parametrized_is_refused_before_anything_changes(
    made: Callable[[str], Made], name: str
) -> None:
    """A merge would be written into a weight that is computed anew at the next call."""
    case = made(name)
    model = case.base()
    nn.utils.parametrizations.weight_norm(model.body)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ez.UsageError, match=r"module 'body'.*parametrization.*remove_parametrizations"):
        get_peft_model(model, EigenzooConfig(bundle=str(case.bundle)))
    assert [type(module) for module in model.modules()] == before
