"""What is written is read by the libraries that own the formats, and equals what was there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_builders import add_adapter, make_conv, make_gpt2, make_llama, quietly, save_adapter, save_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from eigenzoo.errors import DataError, EigenzooError, FormatError, OutputError, UnsafePathError, UsageError
from eigenzoo.formats.checkpoint import Checkpoint, StateDict
from eigenzoo.formats.lora.peft_folder import LoraAdapter
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.writers import ModelLayout, TensorLayout, cast_to, layout_of, write_checkpoint, write_lora


def stored(layout: ModelLayout) -> ModelLayout:
    """The layout as a bundle gives it back."""
    read = ModelLayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert read == layout
    return read


def side_files(model: Model) -> dict[str, bytes]:
    return {file: model.read_side_file(file) for file in model.side_files}


@pytest.mark.parametrize("shards", ["10KB", "10GB"])
@pytest.mark.parametrize(("make", "kind"), [(make_llama, LlamaForCausalLM), (make_gpt2, GPT2LMHeadModel)])
def test_a_checkpoint_is_written_back_byte_for_byte(tmp_path: Path, shards: str, make: Any, kind: Any) -> None:
    folder = save_model(make(), tmp_path / "in", max_shard_size=shards)
    opened = Checkpoint(folder)
    out = tmp_path / "out"
    out.mkdir()
    layout = stored(layout_of(opened))
    write_checkpoint(out, layout, opened.read, metadata=opened.metadata, side_files=side_files(opened))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    loaded = quietly(kind.from_pretrained, out)
    for name, value in make().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_an_index_is_made_where_none_is_given(sharded: Path, tmp_path: Path) -> None:
    opened = Checkpoint(sharded)
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", layout_of(opened), opened.read)
    again = Checkpoint(tmp_path / "out")
    assert list(again.tensors) == list(opened.tensors)
    assert set(dict(again.metadata)) == set(dict(opened.metadata))
    assert all(metadata == {"format": "pt"} for metadata in again.metadata.values())


def test_pickles_become_safetensors(tmp_path: Path) -> None:
    state = {
        "b": torch.ones(3, dtype=torch.uint8),
        "a": torch.randn(2, 3, dtype=torch.float64),
        "t": torch.ones(2, 2).T,
    }
    torch.save(state, tmp_path / "m.pt")
    (tmp_path / "out").mkdir()
    opened = open_model(tmp_path / "m.pt", allow_pickle=True)
    write_checkpoint(tmp_path / "out", stored(layout_of(opened)), opened.read)
    loaded = load_file(tmp_path / "out" / "m.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    layout = layout_of(open_model(tmp_path / "old", allow_pickle=True))
    assert (layout.format, list(layout.files)) == ("checkpoint", ["model.safetensors"])


def test_values_are_cast_to_the_layout_and_counts_are_not(tmp_path: Path) -> None:
    half, count = TensorLayout("w", "F16", (2,)), TensorLayout("n", "I64", (1,))
    exact = torch.tensor([1.0, 1.0 + 2**-12], dtype=torch.float64)
    assert torch.equal(cast_to(half, exact), exact.half())
    assert torch.equal(cast_to(half, torch.tensor([float("inf"), 0.0])), torch.tensor([float("inf"), 0.0]).half())
    with pytest.raises(DataError, match=r"tensor 'w': values up to 7e\+04 overflow torch\.float16"):
        cast_to(half, torch.tensor([7e4, 0.0]))
    with pytest.raises(DataError, match=r"overflow torch\.float8_e5m2"):
        cast_to(TensorLayout("w", "F8_E5M2", (1,)), torch.tensor([1e6]))
    with pytest.raises(FormatError, match=r"tensor 'n': torch\.float32 values.*Counts are never cast"):
        cast_to(count, torch.ones(1))
    with pytest.raises(FormatError, match=r"tensor 'w': the values have shape \(3,\), but the tensor has shape \(2,\)"):
        cast_to(half, torch.ones(3))


def test_only_known_side_files_are_written(sharded: Path, tmp_path: Path) -> None:
    opened = Checkpoint(sharded)
    layout = layout_of(opened)
    for name in ("../config.json", "modeling_evil.py", "model-00001-of-00003.safetensors", "/etc/x"):
        with pytest.raises(FormatError, match="is not a known side file"):
            write_checkpoint(tmp_path, layout, opened.read, side_files={name: b"x"})
    with pytest.raises(FormatError, match="its weight_map does not match the files"):
        write_checkpoint(tmp_path, layout, opened.read, side_files={str(layout.index): b'{"weight_map": {}}'})
    with pytest.raises(UsageError, match="the layout has format 'state-dict'"):
        write_lora(tmp_path, ModelLayout("state-dict", {}), {}, {})
    with pytest.raises(UsageError, match="the layout has format 'lora'"):
        write_checkpoint(tmp_path, ModelLayout("lora", {}), opened.read)
    write_checkpoint(sharded.parent, ModelLayout("state-dict", {"x.safetensors": ()}), opened.read)
    with pytest.raises(OutputError, match="File exists"):
        write_checkpoint(sharded.parent, ModelLayout("state-dict", {"x.safetensors": ()}), opened.read)


PEFT_CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear": (make_llama, {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        make_llama,
        {
            "r": 4,
            "target_modules": ["q_proj", "up_proj", "embed_tokens"],
            "rank_pattern": {r"layers.0.*q_proj": 2, "up_proj": 6},
            "alpha_pattern": {r"layers\.1\..*": 3},
            "use_rslora": True,
            "modules_to_save": ["lm_head"],
        },
    ),
    "conv1d and biases": (
        make_gpt2,
        {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "lora_only"},
    ),
    "convolutions": (make_conv, {"r": 2, "lora_alpha": 6, "target_modules": ["first", "second", "third"]}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_an_adapter_written_from_its_updates_gives_the_same_outputs(tmp_path: Path, case: str) -> None:
    make, adapter = PEFT_CASES[case]
    peft = add_adapter(make(), **adapter)
    opened = LoraAdapter(save_adapter(peft, tmp_path / "in"))
    factors = {}
    for module, update in opened.updates.items():
        factor_b, factor_a = opened.read_factors(module)
        # Another gauge and a larger rank: what counts is B·A alone.
        gauge = torch.linalg.qr(torch.randn(update.rank + 2, update.rank))[0]
        factors[module] = (factor_b * update.scale @ gauge.T, gauge @ factor_a)
    others = {name: opened.read(name) for name in opened.other_tensors}
    out = tmp_path / "out"
    out.mkdir()
    write_lora(out, stored(layout_of(opened)), opened.config, factors, others=others, side_files=side_files(opened))
    config = json.loads((out / "adapter_config.json").read_text())
    rank = max(update.rank for update in opened.updates.values()) + 2
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (rank, rank, {}, False)
    changed = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
    assert {key: value for key, value in config.items() if key not in changed} == {
        key: value for key, value in opened.config.items() if key not in changed
    }
    inputs = torch.randn(2, 3, 8, 8) if case == "convolutions" else torch.arange(12).reshape(2, 6)
    found = quietly(PeftModel.from_pretrained, make(), out).eval()
    with torch.no_grad():
        expected, base, logits = (quietly(model, inputs) for model in (peft, make(), found))
    expected, base, logits = (getattr(output, "logits", output) for output in (expected, base, logits))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 100 * (logits - expected).abs().max()
    assert LoraAdapter(out).updates.keys() == opened.updates.keys()


def test_factors_of_no_rank_and_narrow_dtypes_are_written(adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    opened = LoraAdapter(adapter)
    factors = {
        module: (torch.zeros(update.shape[0], 0, dtype=torch.float64), torch.zeros(0, update.shape[1]).double())
        for module, update in opened.updates.items()
    }
    (tmp_path / "out").mkdir()
    write_lora(tmp_path / "out", layout_of(opened), opened.config, factors)
    again = LoraAdapter(tmp_path / "out")
    for module, update in again.updates.items():
        assert (update.rank, update.scale) == (1, 1.0)
        assert all(
            torch.equal(f, torch.zeros_like(f)) and f.dtype == torch.bfloat16 for f in again.read_factors(module)
        )


def test_factors_that_do_not_fit_are_refused(adapter: Path, tmp_path: Path) -> None:
    opened = LoraAdapter(adapter)
    layout, factors = layout_of(opened), {module: opened.read_factors(module) for module in opened.updates}
    module = next(iter(factors))
    with pytest.raises(UsageError, match=f"missing or extra factors: {module}"):
        write_lora(tmp_path, layout, opened.config, {name: pair for name, pair in factors.items() if name != module})
    with pytest.raises(FormatError, match=f"module '{module}': B has shape"):
        write_lora(tmp_path, layout, opened.config, {**factors, module: (torch.zeros(3, 4), factors[module][1])})
    with pytest.raises(UsageError, match="missing or extra tensors"):
        write_lora(tmp_path, layout, opened.config, factors, others={"more": torch.zeros(1)})
    with pytest.raises(FormatError, match="use_dora is True"):
        write_lora(tmp_path, layout, {**opened.config, "use_dora": True}, factors)


def test_layouts_of_other_people_are_checked(adapter: Path, sharded: Path, tmp_path: Path) -> None:
    lora, full = layout_of(LoraAdapter(adapter)).to_json(), layout_of(Checkpoint(sharded)).to_json()
    module = next(iter(lora["updates"]))
    other = list(lora["updates"].values())[1]
    tensor = ["w", "F32", [2]]
    cases: list[tuple[Any, type[EigenzooError], str]] = [
        ([], FormatError, "not an object with exactly"),
        ({**full, "more": 1}, FormatError, "not an object with exactly"),
        ({**full, "format": "pickle"}, FormatError, "the format is 'pickle'"),
        ({**full, "format": ["lora"]}, FormatError, "format"),
        ({**full, "index": None}, FormatError, "there are several files, but no index"),
        ({**full, "index": "../model.safetensors.index.json"}, FormatError, "the index has an unknown name"),
        ({**full, "index": 3}, FormatError, "the index has an unknown name"),
        ({**full, "files": {}}, FormatError, "files is not a mapping"),
        ({**full, "files": {"../x.safetensors": [tensor]}}, UnsafePathError, r"holds '\.\.'"),
        ({**full, "files": {"/x.safetensors": [tensor]}}, UnsafePathError, "is absolute"),
        ({**full, "files": {"x.py": [tensor]}}, FormatError, r"'x\.py' is not a .safetensors file"),
        ({**full, "files": {"x.safetensors": [tensor, tensor]}}, FormatError, "tensor 'w' occurs twice"),
        ({**full, "files": {"x.safetensors": [["w", "F32"]]}}, FormatError, r"not \[name, dtype, shape\]"),
        ({**full, "files": {"x.safetensors": [["w", "F4", [2]]]}}, FormatError, "dtype 'F4'"),
        ({**full, "files": {"x.safetensors": [["w", "F32", [-2]]]}}, FormatError, "shape of 'w'"),
        ({**full, "files": {"x.safetensors": [["w", "F32", [2**70]]]}}, FormatError, "shape of 'w'"),
        ({**full, "files": {"x.safetensors": [[3, "F32", [2]]]}}, FormatError, "not a string"),
        ({**full, "updates": lora["updates"]}, FormatError, "is not a tensor of the files"),
        ({**lora, "updates": {}}, FormatError, "a lora has one file"),
        ({**lora, "updates": []}, FormatError, "updates is not a mapping"),
        ({**lora, "updates": {module: {}}}, FormatError, "exactly key_a"),
        ({**lora, "updates": {module: other, "x": other}}, FormatError, "is used twice"),
        ({**lora, "updates": {module: {**other, "key_a": "none"}}}, FormatError, "not a tensor of the files"),
        ({**lora, "updates": {module: {**other, "rank": 3}}}, FormatError, "but the rank is 3"),
        ({**lora, "updates": {module: {**other, "rank": True}}}, FormatError, "not a finite number"),
        ({**lora, "updates": {module: {**other, "scale": float("nan")}}}, FormatError, "not a finite number"),
    ]
    for value, kind, message in cases:
        with pytest.raises(kind, match=message):
            ModelLayout.from_json(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.fixed_dictionaries(
        {
            "format": st.sampled_from(["checkpoint", "lora"]) | json_values,
            "index": st.none() | json_values,
            "files": st.dictionaries(st.just("x.safetensors") | st.text(max_size=4), st.lists(json_values), max_size=2),
            "updates": json_values,
        }
    )
    | json_values
)
@settings(max_examples=200)
def test_random_layouts_are_read_or_refused(value: object) -> None:
    try:
        ModelLayout.from_json(value)
    except FormatError:
        return


def test_a_file_whose_order_misaligns_is_written_aligned(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\7" + torch.ones(1).numpy().tobytes())
    opened = StateDict(path)
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", layout_of(opened), opened.read)
    again = StateDict(tmp_path / "out" / "odd.safetensors")
    assert list(again.tensors) == ["b", "a"]
    assert torch.equal(again.read("b"), torch.ones(1))
    assert again.read("a").item() == 7
