"""What PEFT puts beside s·B·A and what is exact nevertheless: a bias on B, and one update for tied weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import eigenzoo as ez
from eigenzoo.errors import UnsupportedError
from eigenzoo.formats.lora.peft_folder import LoraAdapter
from eigenzoo.integrations.dry_loading import load_dry
from real_models import TOLERANCE, VOCABULARY, add_adapter, logits, make, save_adapter, tolerating_peft


def make_tied() -> LlamaForCausalLM:
    """A Llama whose head is its embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.15, tie_word_embeddings=True, **sizes)
    ).eval()


def write_zoo(folder: Path, base: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """Adapters of several ranks and scales, and what they answer."""
    answers = {}
    for number in range(3):
        peft = add_adapter(base(), number, **{"r": 2 + number, "lora_alpha": 5, **settings})
        answers[f"a{number}"] = logits(peft, "llama")
        save_adapter(peft, folder / f"a{number}")
    return answers


def loaded(base: Any, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    with tolerating_peft():
        return logits(PeftModel.from_pretrained(base(), folder).eval(), "llama")


@pytest.mark.parametrize("view", ["update", "factors"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")
def test_a_bias_on_b_is_carried_with_its_scale(tmp_path: Path, view: str) -> None:
    """PEFT merges none where the base has no bias, as a Llama; so it is read."""
    rank = {"r": 4} if view == "factors" else {}
    targets = ["q_proj", "up_proj"]
    answers = write_zoo(tmp_path / "zoo", lambda: make("llama"), target_modules=targets, lora_bias=True, **rank)
    space = ez.load(
        ez.fit(ez.open_zoo(tmp_path / "zoo", view=view, exclude=["*.0.mlp*"]), rank=1.0).save(tmp_path / "b")
    )
    plain = logits(make("llama"), "llama")
    for name, expected in answers.items():
        folder = space.rebuild(name).save(tmp_path / name)
        torch.testing.assert_close(loaded(lambda: make("llama"), folder), expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert (expected - plain).abs().max() > 1000 * TOLERANCE
    found, original = (load_file(path / "a0" / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "zoo"))
    bias = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.bias"
    assert original[bias].abs().max() > 0.01
    config = json.loads((tmp_path / "zoo" / "a0" / "adapter_config.json").read_text())
    torch.testing.assert_close(found[bias], original[bias] * config["lora_alpha"] / config["r"])


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")
def test_updates_of_zero_have_a_bias_where_the_others_have_one(tmp_path: Path) -> None:
    """PEFT misses nothing of the rebuilt adapter, as `verify` says, and it answers as the original."""
    make("llama").save_pretrained(tmp_path / "base")
    answers = {}
    for number, targets in enumerate((["q_proj"], ["q_proj", "v_proj"])):
        settings = {"r": 2, "lora_alpha": 5, "target_modules": targets, "lora_bias": number == 0}
        peft = add_adapter(make("llama"), number, **settings)
        answers[f"a{number}"] = logits(peft, "llama")
        save_adapter(peft, tmp_path / "zoo" / f"a{number}")
    space = ez.load(ez.fit(ez.open_zoo(tmp_path / "zoo", missing="zero"), rank=1.0).save(tmp_path / "bundle"))
    for name, expected in answers.items():
        folder = space.rebuild(name).save(tmp_path / name)
        assert list(ez.verify_adapter(folder, tmp_path / "base", loader=load_dry)) == []
        torch.testing.assert_close(loaded(lambda: make("llama"), folder), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")
def test_a_bias_that_the_config_does_not_name_is_refused(tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo", lambda: make("llama"), target_modules=["q_proj"], lora_bias=True)
    path = tmp_path / "zoo" / "a0" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_bias": False}))
    with pytest.raises(UnsupportedError, match=r"lora_B\.bias' is not a factor of an update"):
        LoraAdapter(tmp_path / "zoo" / "a0")


TIED = {
    "nothing tied": (lambda: make("llama"), {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied updates": (make_tied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied weights": (make_tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "no tied layer": (make_tied, {"target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
def test_weights_that_peft_ties_answer_as_before(tmp_path: Path, case: str) -> None:
    """PEFT's merging adds a tied update twice, so that a merged model answers otherwise; here it is two layers."""
    base, settings = TIED[case]
    answers = write_zoo(tmp_path / "zoo", base, ensure_weight_tying=True, **settings)
    space = ez.load(ez.fit(tmp_path / "zoo", rank=1.0).save(tmp_path / "bundle"))
    plain = logits(base(), "llama")
    for name, expected in answers.items():
        found = loaded(base, space.rebuild(name).save(tmp_path / name))
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert (expected - plain).abs().max() > 1000 * TOLERANCE


def test_a_tied_update_is_the_same_in_both_places_when_much_is_lost(tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo", make_tied, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    for axes in (("models",), ("outputs", "inputs")):
        rebuilt = ez.fit(tmp_path / "zoo", rank=1, axes=axes).rebuild("a1")
        # The update of an embedding is kept as PEFT's factors have it, the transposed one.
        embedding, head = rebuilt.layer("model.embed_tokens"), rebuilt.layer("lm_head")
        assert (embedding.T - head).norm() <= 1e-5 * head.norm()
