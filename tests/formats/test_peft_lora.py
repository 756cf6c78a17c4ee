"""Adapters as peft saves them: every update is what peft's own get_delta_weight gives."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_builders import add_adapter, edit_config, make_attention, make_conv, make_gpt2, make_llama, save_adapter
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from eigenzoo.errors import FormatError, UnsafePathError, UnsupportedError
from eigenzoo.formats.lora import config as lora_config
from eigenzoo.formats.lora.config import check_config
from eigenzoo.formats.lora.peft_folder import LoraAdapter, find_updates
from eigenzoo.formats.model import TensorInfo
from eigenzoo.formats.opening import open_model

ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (make_llama, {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": (make_llama, {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        make_llama,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {r".*\.0\.self_attn\.(q|v)_proj": 2, "up_proj": 7},
            "alpha_pattern": {r"^model.layers.1.self_attn.q_proj": 3, "layers.0.mlp.up_proj": 5},
            "use_rslora": True,
        },
    ),
    "conv1d": (make_gpt2, {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "convolutions": (make_conv, {"r": 2, "lora_alpha": 6, "target_modules": ["first", "second", "third"]}),
    "attention": (make_attention, {"r": 1, "target_modules": ["attn"], "rank_pattern": {"attn": 3}}),
    "embedding": (make_llama, {"r": 3, "lora_alpha": 7, "target_modules": ["embed_tokens", "k_proj"]}),
    "gaussian": (make_llama, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


def peft_delta(peft: PeftModel, module: str, shape: tuple[int, int]) -> torch.Tensor:
    """PEFT's own update of a module, as a matrix (outputs, inputs)."""
    layer = peft.base_model.model.get_submodule(module)
    delta = layer.get_delta_weight("default")
    transposed = hasattr(layer, "fan_in_fan_out") and layer.fan_in_fan_out
    return (delta.T if transposed or "embed" in module else delta).reshape(shape)


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_equal_peft_s_delta_weight(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    make, settings = ADAPTERS[case]
    peft = add_adapter(make().to(dtype), **settings).to(dtype)
    opened = LoraAdapter(save_adapter(peft, tmp_path / "adapter"))
    layers = {name for name, layer in peft.base_model.model.named_modules() if hasattr(layer, "get_delta_weight")}
    assert set(opened.updates) == layers
    assert opened.other_tensors == ()
    for module, update in opened.updates.items():
        factor_b, factor_a = opened.read_factors(module)
        assert factor_b.dtype == factor_a.dtype == dtype
        assert (factor_b.shape[1], factor_a.shape[0]) == (update.rank, update.rank)
        layer = peft.base_model.model.get_submodule(module)
        assert math.isclose(update.scale, layer.scaling["default"], rel_tol=1e-15)
        expected = peft_delta(peft, module, update.shape)
        # Sums of at most 8 products: a few roundings of the largest entry.
        torch.testing.assert_close(
            update.scale * factor_b @ factor_a,
            expected.detach(),
            rtol=0,
            atol=16 * torch.finfo(dtype).eps * expected.abs().max().item(),
        )


def test_names_keys_and_shapes_are_given(tmp_path: Path) -> None:
    make, settings = ADAPTERS["convolutions"]
    opened = LoraAdapter(save_adapter(add_adapter(make(), **settings), tmp_path / "conv"))
    first = opened.updates["first"]
    assert (first.key_a, first.key_b) == (
        "base_model.model.first.lora_A.weight",
        "base_model.model.first.lora_B.weight",
    )
    assert first.shape == (6, 18)
    assert first.factor_shapes == ((2, 3, 3, 2), (6, 2, 1, 1))
    assert (first.rank, first.scale) == (2, 3.0)
    assert opened.config["target_modules"]
    assert opened.ignored_files == ("README.md",)
    with pytest.raises(FormatError, match="no update of module 'nothing'"):
        opened.read_factors("nothing")


def test_everything_else_in_the_file_is_carried_through(tmp_path: Path) -> None:
    peft = add_adapter(make_llama(), r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    opened = LoraAdapter(save_adapter(peft, tmp_path / "saved"))
    assert opened.other_tensors == ("base_model.model.lm_head.weight",)
    peft = add_adapter(make_gpt2(), r=2, target_modules=["c_fc"], bias="lora_only", fan_in_fan_out=True)
    opened = LoraAdapter(save_adapter(peft, tmp_path / "bias"))
    assert len(opened.other_tensors) == 2
    assert all(name.endswith(".bias") for name in opened.other_tensors)
    peft = add_adapter(make_gpt2(), r=2, target_modules=["c_fc"], bias="all", fan_in_fan_out=True)
    assert len(LoraAdapter(save_adapter(peft, tmp_path / "all")).other_tensors) > 10
    peft = add_adapter(make_llama(), r=2, target_modules=["embed_tokens"])
    opened = LoraAdapter(save_adapter(peft, tmp_path / "embed", save_embedding_layers=True))
    assert "base_model.model.model.embed_tokens.base_layer.weight" in opened.other_tensors


def test_keys_with_the_adapter_s_name_are_the_same(adapter: Path) -> None:
    plain = LoraAdapter(adapter)
    factors = {module: plain.read_factors(module) for module in plain.updates}
    rename(adapter, lambda key: key.replace(".weight", ".default.weight").removeprefix("base_model.model."))
    named = LoraAdapter(adapter)
    assert set(named.updates) == set(plain.updates)
    for module, (factor_b, factor_a) in factors.items():
        assert torch.equal(named.read_factors(module)[0], factor_b)
        assert torch.equal(named.read_factors(module)[1], factor_a)


def rename(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {change(key): value for key, value in load_file(path).items()}
    save_file({key: value for key, value in tensors.items() if key is not None}, path)


def test_pissa_is_refused_and_readable_once_converted(tmp_path: Path) -> None:
    make = make_llama
    peft = add_adapter(make(), r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.peft_config["default"].init_lora_weights = True
    save_adapter(peft, tmp_path / "initial")
    peft.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    save_adapter(peft, tmp_path / "pissa")
    with pytest.raises(UnsupportedError, match=r"'pissa', which changed the base.*path_initial_model_for_weight"):
        LoraAdapter(tmp_path / "pissa")
    save_adapter(peft, tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    opened = LoraAdapter(tmp_path / "done")
    module = "model.layers.0.self_attn.q_proj"
    update, (factor_b, factor_a) = opened.updates[module], opened.read_factors(module)
    changed = peft.base_model.model.get_submodule(module)
    delta = changed.base_layer.weight + changed.get_delta_weight("default") - make().get_submodule(module).weight
    torch.testing.assert_close(update.scale * factor_b @ factor_a, delta.detach(), rtol=0, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora is True: DoRA"),
    "parameters": ({"target_parameters": ["experts.w"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "alora": ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "Arrow"),
    "monte carlo": ({"monteclora_config": {"num_samples": 8}}, "Monte Carlo"),
    "kasa": ({"kasa_config": {"x": 1}}, "KaSA"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    "velora": ({"velora_config": {"num_groups": 2}}, "VeLoRA"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16', which changed the base"),
    "olora": ({"init_lora_weights": "olora"}, "'olora', which changed the base"),
    "corda": ({"init_lora_weights": "corda"}, "'corda', which changed the base"),
    "loftq": ({"init_lora_weights": "loftq"}, "'loftq', which quantised the base"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "'lora_ga', which changed the base"),
    "unknown init": ({"init_lora_weights": "new"}, "'new'.*that leave the base weights unchanged"),
    "init of another type": ({"init_lora_weights": [1]}, r"init_lora_weights is \[1\]"),
    "ia3": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "no type": ({"peft_type": None}, "peft_type is None"),
    "type of another type": ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\]"),
    "unknown switch": (
        {"use_something": True},
        "'use_something' is True, but no known version of PEFT has such an entry",
    ),
    "unknown settings": ({"some_config": {"a": 1}}, "'some_config' is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(adapter: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UnsupportedError, match=message) as refused:
        LoraAdapter(edit_config(adapter, **changes))
    assert str(adapter) in str(refused.value)
    assert refused.value.next_step or refused.value.rule


def test_every_field_of_the_installed_peft_is_decided() -> None:
    """A field that a new release adds shows up here, not in somebody's numbers."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= lora_config._PLAIN | set(lora_config._REFUSED)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 5}, r"module 'model\.layers\.0\..*': the rank is 4 in the file but 5 in adapter_config\.json"),
    "rank zero": ({"r": 0}, "r is 0"),
    "rank as text": ({"r": "4"}, "r is '4'"),
    "rank pattern": ({"rank_pattern": {"q_proj": 3}}, r"the rank is 4 in the file but 3 in adapter_config"),
    "alpha not a number": ({"lora_alpha": math.nan}, "lora_alpha is nan"),
    "alpha infinite": ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    "negative alpha": ({"lora_alpha": -1}, "lora_alpha is -1"),
    "patterns as list": ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
    "rslora as text": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    "bias": ({"bias": "some"}, "bias is 'some'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_named(adapter: Path, case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(FormatError, match=message):
        LoraAdapter(edit_config(adapter, **changes))


def test_unknown_numbers_and_texts_are_warned_of(adapter: Path) -> None:
    opened = LoraAdapter(edit_config(adapter, new_number=3, new_nothing=None))
    assert opened.warnings == ("adapter_config.json: unknown entry 'new_number' is ignored, as PEFT ignores it",)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a.*+?()[]{}|\\^$1", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("q_proj.*+?()[\\", max_size=6), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted({*lora_config._PLAIN, *lora_config._REFUSED, "new"})), json_values))
def test_random_configs_are_read_or_refused(changes: dict[str, Any]) -> None:
    shapes = {"x.q_proj.lora_A.weight": (4, 6), "x.q_proj.lora_B.weight": (5, 4)}
    tensors = {name: TensorInfo(name, torch.float32, shape, "f") for name, shape in shapes.items()}
    for config in (changes, {"peft_type": "LORA", "r": 4, **changes}):
        try:
            check_config(config)
            (update,) = find_updates(tensors, config).values()
        except FormatError:
            continue
        assert (update.rank, update.shape) == (4, (5, 6))
        assert math.isfinite(update.scale)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def drop_b(key: str) -> str | None:
    return None if key == f"{Q}.lora_B.weight" else key


BROKEN_KEYS: dict[str, tuple[Any, type[FormatError], str]] = {
    "one factor": (drop_b, FormatError, "the factor B is missing"),
    "no factor": (lambda key: key.replace("lora_", "none_"), FormatError, "no LoRA factors"),
    "magnitudes": (
        lambda key: f"{Q}.lora_magnitude_vector" if key == f"{Q}.lora_B.weight" else key,
        UnsupportedError,
        "is a DoRA magnitude",
    ),
    "a bias of B": (
        lambda key: f"{Q}.lora_B.bias" if key == f"{Q}.lora_B.weight" else key,
        UnsupportedError,
        r"lora_B\.bias' is not a factor",
    ),
    "tokens": (
        lambda key: "x.token_adapter.trainable_tokens_delta" if key == f"{Q}.lora_B.weight" else key,
        UnsupportedError,
        "trainable_tokens_delta' is not a factor",
    ),
    "two adapters": (
        lambda key: key.replace(".weight", ".other.weight") if "layers.0" in key else key,
        UnsupportedError,
        "the file has factors of several adapters: None, other",
    ),
    "embedding and linear": (
        lambda key: key.replace("lora_A.weight", "lora_embedding_A"),
        FormatError,
        "Both factors must belong to the same kind",
    ),
    "an adapter within an adapter": (
        lambda key: key.replace("q_proj", "base_layer.q_proj"),
        UnsupportedError,
        "the file has an adapter within an adapter",
    ),
}


@pytest.mark.parametrize("case", BROKEN_KEYS)
def test_keys_that_are_not_pairs_are_refused(adapter: Path, case: str) -> None:
    change, kind, message = BROKEN_KEYS[case]
    rename(adapter, change)
    with pytest.raises(kind, match=message):
        LoraAdapter(adapter)


def test_the_same_module_twice_is_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q}.lora_A.weight".removeprefix("base_model.model.")] = tensors[f"{Q}.lora_A.weight"].clone()
    save_file(tensors, path)
    with pytest.raises(FormatError, match="has two factors A"):
        LoraAdapter(adapter)


@pytest.mark.parametrize(
    ("shape_a", "shape_b", "message"),
    [
        ((4, 16), (16, 3), "The second size of B must equal"),
        ((4, 16, 1), (16, 4), r"A must have shape \(rank, inputs"),
        ((0, 16), (16, 0), r"A must have shape \(rank, inputs"),
        ((4,), (4,), r"A must have shape \(rank, inputs"),
        ((4, 4, 3, 3), (16, 4, 3, 3), r"A must have shape \(rank, inputs"),
        ((4, 8, 3, 3), (16, 2, 1, 1), "a grouped convolution"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    adapter: Path, shape_a: tuple[int, ...], shape_b: tuple[int, ...], message: str
) -> None:
    path = adapter / "adapter_model.safetensors"
    factors = {f"{Q}.lora_A.weight": torch.zeros(shape_a), f"{Q}.lora_B.weight": torch.zeros(shape_b)}
    save_file({**load_file(path), **factors}, path)
    with pytest.raises(FormatError, match=message):
        LoraAdapter(adapter)


def test_grouped_convolutions_of_peft_itself_are_refused(tmp_path: Path) -> None:
    net = make_conv()
    net.second = torch.nn.Conv2d(6, 6, 3, groups=2)
    peft = add_adapter(net, r=4, target_modules=["second"])
    with pytest.raises(UnsupportedError, match="a grouped convolution"):
        LoraAdapter(save_adapter(peft, tmp_path / "groups"))


def test_integer_factors_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({key: value.to(torch.int8) for key, value in load_file(path).items()}, path)
    with pytest.raises(UnsupportedError, match=r"factors have dtypes torch\.int8"):
        LoraAdapter(adapter)


def test_missing_and_pickled_weights_are_told_apart(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"adapter_config\.json, but no adapter_model\.safetensors"):
        LoraAdapter(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match=r"the weights are a Python pickle.*--allow-pickle"):
        open_model(adapter)
    with pytest.raises(FormatError, match=r"is not a pickle"):
        open_model(adapter, allow_pickle=True)


def test_a_hostile_config_file_is_refused(adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_config.json"
    good = path.read_text()
    for text, message in (
        ("[]", "JSON list"),
        ('{"r": ' + "[" * 200_000, "nested too deeply"),
        ("{", "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(FormatError, match=message):
            LoraAdapter(adapter)
    path.write_text(json.dumps({**json.loads(good), "x": "y" * 2**24}))
    with pytest.raises(FormatError, match="at most 16777216 bytes"):
        LoraAdapter(adapter)
    path.unlink()
    (tmp_path / "outside.json").write_text(good)
    path.symlink_to(tmp_path / "outside.json")
    with pytest.raises(UnsafePathError, match="leads out of the folder"):
        LoraAdapter(adapter)


def test_equal_headers_share_their_updates_only_where_the_scales_agree(adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())

    def opened(name: str, **changes: Any) -> LoraAdapter:
        shutil.copytree(adapter, tmp_path / name)
        (tmp_path / name / path.name).write_text(json.dumps({**config, **changes}))
        return LoraAdapter(tmp_path / name)

    first, like = opened("first"), opened("like", target_modules="all-linear")
    assert first.likeness is like.likeness
    assert first.updates is like.updates
    scale = next(iter(first.updates.values())).scale
    for name, changes, factor in (
        ("alpha", {"lora_alpha": 3 * config["lora_alpha"]}, 3),
        ("pattern", {"alpha_pattern": dict.fromkeys(first.updates, 5 * config["lora_alpha"])}, 5),
        ("root", {"use_rslora": True}, config["r"] ** 0.5),
    ):
        other = opened(name, **changes)
        assert other.likeness is not first.likeness
        assert all(update.scale == pytest.approx(factor * scale) for update in other.updates.values())
    with pytest.raises(FormatError, match=rf"the rank is {config['r']} in the file but {config['r'] + 1}"):
        opened("rank", r=config["r"] + 1)
