"""`verify_adapter` says of adapters what the real PEFT then does with them: sound ones take effect, broken ones do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from verify_cases import CONFIG, PREFIX, WEIGHTS, broken, change_of, changed, make, quietly, write_adapter, write_base

import eigenzoo as ez
from eigenzoo.integrations.dry_loading import load_dry
from eigenzoo.zoo.verification import Verification

Made = Callable[[str], Path]

KINDS = ("llama", "gpt2", "t5", "vit", "conv", "embedding")


def both_ways(adapter: Path, base: Path) -> tuple[Verification, Verification]:
    """By headers alone, and with PEFT's own loading."""
    return ez.verify_adapter(adapter, base), ez.verify_adapter(adapter, base, loader=load_dry)


def said(found: Verification) -> str:
    """What is wrong: of an answer that is undecided, what speaks against the adapter."""
    return "\n".join(found.notes if found.undecided else found.faults)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_adapter_takes_effect(kind: str, base: Made, sound: Made) -> None:
    alone, loaded = both_ways(sound(kind), base(kind))
    # What is no checkpoint of transformers is loaded by nobody but its owner.
    assert loaded.ok is (None if kind in ("conv", "embedding") else True)
    assert list(loaded) == list(alone) == []
    assert alone.ok is None
    assert change_of(kind, sound(kind)) > 1e-5
    assert 0.001 < loaded.typical_change < 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_that_of_the_dense_update(kind: str, base: Made, sound: Made) -> None:
    """‖s·B·A·x‖ / ‖W·x‖ over random x is near ‖s·B·A‖ / ‖W‖, with W as the module of the real model has it."""
    (changes,) = ez.verify_adapter(sound(kind), base(kind), loader=load_dry).changes.values()
    tensors, modules = load_file(sound(kind) / WEIGHTS), dict(make(kind).named_modules())
    assert changes
    for name, layer in changes.items():
        module = modules[name.replace(".base_layer.", ".")]
        weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
        update = [
            next(t for key, t in tensors.items() if f"{name}.lora_" in key and f"_{side}" in key) for side in "BA"
        ]
        dense = 2.0 * update[0].flatten(1) @ update[1].flatten(1)
        assert dense.numel() == weight.numel()
        expected = float(dense.norm() / weight.detach().norm())
        assert layer.change == pytest.approx(expected, rel=0.3), name
        assert layer.base is not None


def cut_prefix(key: str) -> str:
    return key.removeprefix(PREFIX)


def insert(part: str) -> Callable[[str], str]:
    return lambda key: PREFIX + part + key.removeprefix(PREFIX)


RENAMED: list[tuple[str, Callable[[str], str], str]] = [
    ("without PEFT's prefix", cut_prefix, f"have no '{PREFIX}' before their names"),
    ("with it twice", lambda key: PREFIX + key, f"with '{PREFIX}' (PEFT) cut off each name all of them are"),
    ("of DataParallel", insert("module."), "with 'module.' (DataParallel) taken out of the names all of them are"),
    ("compiled", insert("_orig_mod."), "with '_orig_mod.' (torch.compile) taken out of the names all of them are"),
    (
        "checkpointed",
        lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        "with '_checkpoint_wrapped_module.' (activation checkpointing) taken out",
    ),
    ("model. missing", lambda key: key.replace("model.model.model.", "model.model."), "with 'model.' before each name"),
    ("model. twice", insert("model."), "with 'model.' cut off each name all of them are"),
    (
        "in a wrapper",
        lambda key: key.replace("model.model.layers", "model.language_model.model.layers"),
        "with 'language_model.' cut off each name all of them are",
    ),
    (
        "of a renamed wrapper",
        lambda key: key.replace("model.model.layers", "model.text_model.decoder.layers"),
        "with 'text_model.decoder.' replaced by 'model.' all of them are",
    ),
    (
        "of renamed modules",
        lambda key: key.replace("q_proj", "query"),
        "the nearest name there is 'model.layers.0.self_attn",
    ),
]


@pytest.mark.parametrize(("rename", "message"), [case[1:] for case in RENAMED], ids=[case[0] for case in RENAMED])
def test_keys_that_peft_drops(
    rename: Callable[[str], str], message: str, base: Made, sound: Made, tmp_path: Path
) -> None:
    adapter = broken(sound("llama"), tmp_path / "broken", rename)
    alone, loaded = both_ways(adapter, base("llama"))
    assert message in said(alone)
    assert message in said(loaded)
    assert "PEFT" in said(loaded)
    assert "drops" in said(loaded)
    whole, left = change_of("llama", sound("llama")), change_of("llama", adapter)
    assert left == 0.0 or (message.startswith("the nearest") and left != pytest.approx(whole, rel=1e-3))


CONFIGS: list[tuple[dict[str, Any], str, bool]] = [
    ({"target_modules": ["k_proj"]}, "target_modules, exclude_modules and layers leave it out", True),
    ({"target_modules": ["q_proj"]}, "v_proj (2 of this name): the config's target_modules", False),
    ({"target_modules": r".*\.layers\.0\..*q_proj"}, "the config's target_modules", False),
    ({"exclude_modules": ["q_proj", "v_proj"], "target_modules": ["q_proj", "v_proj", "k_proj"]}, "leave it out", True),
    ({"layers_to_transform": [7]}, "leave it out", True),
    ({"lora_alpha": 0}, "the adapter changes nothing: the scale is 0", True),
    (
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},
        "k_proj (2 of this name): the config names it, and the ad",
        False,
    ),
]


@pytest.mark.parametrize(("config", "message", "nothing"), CONFIGS)
def test_configs_under_which_peft_drops_or_misses(
    config: dict[str, Any], message: str, nothing: bool, base: Made, sound: Made, tmp_path: Path
) -> None:
    adapter = broken(sound("llama"), tmp_path / "broken", **config)
    for found in both_ways(adapter, base("llama")):
        assert message in said(found)
    refused = "layers_to_transform" in config
    if refused:
        with pytest.raises(ValueError, match=r"(?i)target modules .* not found|no modules"):
            change_of("llama", adapter)
    else:
        assert (change_of("llama", adapter) == 0.0) == nothing


def test_without_a_base_the_adapter_alone_is_checked(sound: Made, tmp_path: Path) -> None:
    assert ez.verify_adapter(sound("llama")).ok
    adapter = broken(sound("llama"), tmp_path / "broken", cut_prefix, target_modules=["k_proj"])
    found = ez.verify_adapter(adapter)
    assert len(found.faults) == 3
    assert found.against is None
    assert found.typical_change is None


def test_an_untrained_adapter_changes_nothing(base: Made, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = quietly(get_peft_model, make("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    quietly(model.save_pretrained, tmp_path / "new")
    (fault,) = ez.verify_adapter(tmp_path / "new", base("llama"))
    assert "the adapter changes nothing: B or A is zero in every module, as before training" in fault
    assert change_of("llama", tmp_path / "new") == 0.0


def test_single_modules_without_effect_are_named_and_no_fault(base: Made, sound: Made, tmp_path: Path) -> None:
    def silence(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"].zero_()

    found = ez.verify_adapter(changed(sound("llama"), tmp_path / "part", silence), base("llama"), loader=load_dry)
    assert found.ok
    assert found.notes == ("model.layers.1.self_attn.v_proj: its update is zero",)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (float("nan"), "NaN or Inf"),
        (float("inf"), "NaN or Inf"),
        (1e5, "above 100 none of the base's output remains"),
        (1e-8, "none"),
    ],
)
def test_values_that_cannot_be_meant(factor: float, message: str, base: Made, sound: Made, tmp_path: Path) -> None:
    def scale(tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            if "lora_B" in name:
                value.mul_(factor)

    assert message in said(ez.verify_adapter(changed(sound("llama"), tmp_path / "odd", scale), base("llama")))


def test_another_architecture_and_another_size(base: Made, sound: Made) -> None:
    for found in both_ways(sound("gpt2"), base("llama")):
        assert "transformer.h.*.attn.c_attn (2 of this name): not in the base" in said(found)
        assert "not in the base; the nearest name there is 'model.layers.0.mlp.up_proj'" in said(found)
    with pytest.raises(ValueError, match="not found in the base model"):
        change_of_on("gpt2", "llama", sound)
    for found in both_ways(sound("llama"), base("wide")):
        assert "the update is for a weight of [16, 16], and the base's is [20, 20]" in said(found)
    with pytest.raises(RuntimeError, match="size mismatch"):
        change_of_on("llama", "wide", sound)


def change_of_on(adapter: str, kind: str, sound: Made) -> None:
    change_of(kind, sound(adapter))


def test_ranks_that_disagree_are_a_fault_of_the_adapter(base: Made, sound: Made, tmp_path: Path) -> None:
    adapter = broken(sound("llama"), tmp_path / "broken", r=8)
    (fault,) = ez.verify_adapter(adapter, base("llama"))
    assert "the rank is 4 in the file but 8 in adapter_config.json" in fault
    with pytest.raises(RuntimeError, match="size mismatch"):
        change_of("llama", adapter)


@pytest.mark.parametrize(("kind", "stated"), [("gpt2", False), ("llama", True)])
def test_a_wrong_fan_in_fan_out_is_named_and_corrected_by_peft(
    kind: str, stated: bool, base: Made, sound: Made, tmp_path: Path
) -> None:
    targets = {"target_modules": ["gate_proj", "q_proj"]} if kind == "llama" else {}
    right = write_adapter(tmp_path / "right", kind, **targets)
    adapter = broken(right, tmp_path / "wrong", fan_in_fan_out=stated)
    found = ez.verify_adapter(adapter, base(kind), loader=load_dry)
    assert found.ok
    assert any(f"the config says fan_in_fan_out={str(stated).lower()}" in note for note in found.notes)
    assert change_of(kind, adapter) == change_of(kind, right) > 0


def test_a_head_that_shares_its_weight_is_found(base: Made, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "head", "gpt2", target_modules=["lm_head"])
    assert "lm_head.weight" not in load_file(base("gpt2") / "model.safetensors")
    for found in both_ways(adapter, base("gpt2")):
        assert list(found) == []
        assert any("shares the weight 'transformer.wte.weight'" in note for note in found.notes)
        assert found.changes["head"]["lm_head"].change > 0
    assert change_of("gpt2", adapter) > 0
    llama = write_adapter(tmp_path / "other", "llama", target_modules=["lm_head"])
    assert ez.verify_adapter(llama, base("llama"), loader=load_dry).notes == ()


def test_tensors_that_are_trained_whole_are_looked_at(base: Made, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "saved", "vit", modules_to_save=["classifier"])
    found = ez.verify_adapter(adapter, base("vit"), loader=load_dry)
    assert list(found) == []
    assert [check.detail for check in found.checks if check.name == "other tensors"] == ["2 are trained whole"]


def test_an_adapter_of_the_part_without_its_head(tmp_path: Path, sound: Made) -> None:
    """A checkpoint with a head holds its body under a prefix, which the body's own class does not have."""
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    whole = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **sizes))
    quietly(whole.save_pretrained, tmp_path / "base")
    model = quietly(get_peft_model, whole.bert, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    quietly(model.save_pretrained, tmp_path / "body")
    alone, loaded = both_ways(tmp_path / "body", tmp_path / "base")
    assert "with 'bert.' before each name all of them are" in said(alone)
    assert list(loaded) == []
    assert any("loading into BertModel" in check.detail for check in loaded.checks)


def test_a_base_may_be_a_file_in_half_precision_or_in_shards(base: Made, sound: Made, tmp_path: Path) -> None:
    whole = ez.verify_adapter(sound("llama"), base("llama"))
    alone = ez.verify_adapter(sound("llama"), base("llama") / "model.safetensors")
    assert alone.changes == whole.changes
    quietly(make("llama").bfloat16().save_pretrained, tmp_path / "shards", max_shard_size="4kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shards = ez.verify_adapter(sound("llama"), tmp_path / "shards", loader=load_dry)
    assert list(shards) == []
    assert shards.typical_change == pytest.approx(whole.typical_change, rel=0.01)


def test_what_is_no_adapter_or_no_base_is_refused(base: Made, sound: Made, tmp_path: Path) -> None:
    with pytest.raises(ez.UsageError, match="is not an adapter"):
        ez.verify_adapter(base("llama"), base("llama"))
    with pytest.raises(ez.UsageError, match="A base is a model of full weights"):
        ez.verify_adapter(sound("llama"), sound("llama"))
    with pytest.raises(ez.FormatError, match="nothing of this name exists"):
        ez.verify_adapter(tmp_path / "nowhere", base("llama"))
    with pytest.raises(ez.UnsupportedError, match="DoRA"):
        ez.verify_adapter(broken(sound("llama"), tmp_path / "dora", use_dora=True), base("llama"))


def test_files_of_strangers_are_not_believed(base: Made, sound: Made, tmp_path: Path) -> None:
    slow = broken(sound("llama"), tmp_path / "slow", target_modules="(a+)+$")
    found = ez.verify_adapter(slow, base("llama"), loader=load_dry)
    assert any("repeats a group" in note for note in found.notes)
    assert [check.done for check in found.checks if check.name in ("target modules", "loading")] == [False, False]
    huge = Path(shutil.copytree(base("llama"), tmp_path / "huge"))
    config = json.loads((huge / "config.json").read_text())
    (huge / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    found = ez.verify_adapter(sound("llama"), huge, loader=load_dry)
    assert any("num_hidden_layers is 1000000000" in note and "most" in note for note in found.notes)
    code = broken(
        sound("llama"), tmp_path / "code", auto_mapping={"base_model_class": "Evil", "parent_library": "transformers.x"}
    )
    assert ez.verify_adapter(code, base("llama"), loader=load_dry).ok
    (tmp_path / "spoilt").mkdir()
    shutil.copy(sound("llama") / CONFIG, tmp_path / "spoilt")
    (tmp_path / "spoilt" / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert not ez.verify_adapter(tmp_path / "spoilt", base("llama")).ok
    assert write_base(tmp_path / "again", "conv").exists()
