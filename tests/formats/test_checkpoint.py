"""Checkpoints as transformers writes them, and the ways in which an index can lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_builders import make_gpt2, make_llama, save_model
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from eigenzoo.errors import FormatError, UnsafePathError, UnsupportedError
from eigenzoo.formats.checkpoint import Checkpoint, StateDict

INDEX = "model.safetensors.index.json"


def edit_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_single_file_is_read_whole(tmp_path: Path) -> None:
    model = make_llama()
    opened = Checkpoint(save_model(model, tmp_path / "llama"))
    assert opened.name == "llama"
    assert opened.index is None
    assert opened.metadata == {"model.safetensors": {"format": "pt"}}
    assert opened.side_files == ("config.json", "generation_config.json")
    assert opened.weight_files() == (tmp_path / "llama" / "model.safetensors",)
    assert opened.nbytes == (tmp_path / "llama" / "model.safetensors").stat().st_size
    assert set(opened.tensors) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(opened.read(name), value)
    assert opened.read_side_file("config.json") == (tmp_path / "llama" / "config.json").read_bytes()
    with pytest.raises(FormatError, match=r"no side file 'model\.safetensors'"):
        opened.read_side_file("model.safetensors")


def test_shards_are_one_model(sharded: Path) -> None:
    opened = Checkpoint(sharded)
    assert len(opened.weight_files()) > 2
    assert opened.index in opened.side_files
    assert dict(opened.updates) == {}
    for name, value in make_llama().state_dict().items():
        assert torch.equal(opened.read(name), value)
        assert torch.equal(opened.read_flat(name, 1, 5, torch.empty(4)), value.reshape(-1)[1:5])
        assert opened.tensors[name].file.startswith("model-0000")


def test_tied_weights_are_not_in_the_file(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    t5 = T5ForConditionalGeneration(T5Config(**sizes))
    for model, head in ((make_gpt2(), "lm_head.weight"), (t5, "encoder.embed_tokens.weight")):
        folder = save_model(model, tmp_path / head)
        opened = Checkpoint(folder)
        assert head not in opened.tensors
        assert set(opened.tensors) == set(load_file(folder / "model.safetensors"))


def test_unknown_files_are_ignored_and_named(sharded: Path) -> None:
    (sharded / "notes.txt").write_text("x")
    (sharded / "modeling_custom.py").write_text("x")
    save_file({"x": torch.zeros(1)}, sharded / "consolidated.safetensors")
    (sharded / "tokenizer.json").write_text("{}")
    opened = Checkpoint(sharded)
    assert opened.ignored_files == ("consolidated.safetensors", "modeling_custom.py", "notes.txt")
    assert "tokenizer.json" in opened.side_files


def test_diffusers_names_are_known(sharded: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded / "other.safetensors")
    shutil.rmtree(sharded)
    sharded.mkdir()
    save_file({"conv.weight": torch.ones(2)}, sharded / "diffusion_pytorch_model.safetensors")
    assert torch.equal(Checkpoint(sharded).read("conv.weight"), torch.ones(2))


LIES = {
    "an absolute shard": (lambda m: m.update({next(iter(m)): "/etc/passwd"}), UnsafePathError, "is absolute"),
    "a shard above": (lambda m: m.update({next(iter(m)): "../x.safetensors"}), UnsafePathError, r"holds '\.\.'"),
    "a missing shard": (
        lambda m: m.update({next(iter(m)): "x.safetensors"}),
        FormatError,
        "'x.safetensors' is missing",
    ),
    "a missing tensor": (
        lambda m: m.update({"nothing": next(iter(m.values()))}),
        FormatError,
        r"tensor 'nothing' is not in its shard 'model-0000",
    ),
    "another shard": (
        lambda m: m.update({name: max(m.values()) for name in m if m[name] == min(m.values())}),
        FormatError,
        "is not in its shard",
    ),
    "an unlisted tensor": (
        lambda m: m.pop("model.norm.weight"),
        FormatError,
        r"1 tensors of the shards are not listed: 'model\.norm\.weight'",
    ),
    "a number as shard": (lambda m: m.update({next(iter(m)): 3}), FormatError, "not a mapping from tensors"),
    "no tensors": (lambda m: m.clear(), FormatError, "weight_map is empty"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(sharded: Path, lie: str) -> None:
    change, kind, message = LIES[lie]
    edit_index(sharded, change)
    with pytest.raises(kind, match=message) as refused:
        Checkpoint(sharded)
    assert str(sharded) in str(refused.value)
    assert INDEX in str(refused.value)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name]}, second, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"tensor '{name}' is in two shards"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": []}', "{}"])
def test_an_index_of_another_shape_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(FormatError, match=r"JSON list|weight_map is not a mapping"):
        Checkpoint(sharded)


def test_links_out_of_the_folder_are_refused(sharded: Path, tmp_path: Path) -> None:
    shard = min(sharded.glob("model-*"))
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    with pytest.raises(UnsafePathError, match="leads out of the folder"):
        Checkpoint(sharded)
    shard.unlink()
    (tmp_path / "moved").rename(shard)
    (tmp_path / "secret").write_text("{}")
    (sharded / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafePathError, match=r"'tokenizer\.json' is a link that leads out"):
        Checkpoint(sharded)


def test_a_hub_cache_is_opened(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"hash{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash{number}")
    opened = Checkpoint(snapshot)
    assert torch.equal(opened.read("model.norm.weight"), torch.ones(16))
    assert json.loads(opened.read_side_file("config.json"))["model_type"] == "llama"


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_quantised_weights_are_refused_by_name(sharded: Path, method: str) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(UnsupportedError, match=rf"quantised \({method}\).*[Dd]equantise"):
        Checkpoint(sharded)


def test_single_file_beside_an_index_is_ambiguous(sharded: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded / "model.safetensors")
    with pytest.raises(FormatError, match=r"found model\.safetensors, model\.safetensors\.index\.json.*exactly one"):
        Checkpoint(sharded)


def test_a_bare_file_is_taken_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.full((2,), float(ord(name)))}, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    opened = StateDict(tmp_path / "b.safetensors")
    assert (opened.name, opened.side_files, opened.ignored_files) == ("b", (), ())
    assert opened.folder == tmp_path
    assert torch.equal(opened.read("w"), torch.full((2,), 98.0))
    with pytest.raises(FormatError, match="no tensor 'v'"):
        opened.read("v")
    with pytest.raises(FormatError, match=r"2 \.safetensors files\. Exactly one"):
        StateDict(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    assert StateDict(tmp_path).side_files == ("config.json",)
    assert StateDict(tmp_path).name == tmp_path.name
