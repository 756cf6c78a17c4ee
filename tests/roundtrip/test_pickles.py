"""Zoos of pickles, read with permission, come back as safetensors that the libraries load: same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from eigenzoo.errors import FormatError, UnsafePathError, UnsupportedError
from eigenzoo.formats.paths import OUTPUT_RECORD
from real_models import (
    ADAPTERS,
    TOLERANCE,
    add_adapter,
    load_adapter,
    load_checkpoint,
    logits,
    make,
    make_finetune,
)

EXTRA = [
    *((kind, settings) for kind, settings in ADAPTERS.items() if kind != "gpt2"),
    ("llama", [{"r": rank, "lora_alpha": 2 * rank, "target_modules": ["embed_tokens"]} for rank in (2, 3)]),
    ("resnet", [{"r": rank, "lora_alpha": 5, "target_modules": ["convolution"]} for rank in (2, 3)]),
]


@pytest.mark.parametrize(("kind", "settings"), EXTRA, ids=["llama", "vit", "embedding", "convolution"])
def test_pickled_adapters_answer_as_the_originals(tmp_path: Path, kind: str, settings: list[dict]) -> None:
    answers = {}
    for number, chosen in enumerate(settings):
        peft = add_adapter(make(kind), number, **chosen)
        answers[f"a{number}"] = logits(peft, kind)
        folder = tmp_path / "zoo" / f"a{number}"
        peft.save_pretrained(folder, safe_serialization=False, save_embedding_layers=False)
        assert (folder / "adapter_model.bin").is_file()
        assert not (folder / "adapter_model.safetensors").exists()
    with pytest.raises(UnsupportedError, match="Python pickle"):
        ez.open_zoo(tmp_path / "zoo")
    zoo = ez.open_zoo(tmp_path / "zoo", allow_pickle=True)
    assert zoo.view == "update"
    space = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "bundle"))
    for name, expected in answers.items():
        folder = space.rebuild(name).save(tmp_path / name)
        assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert not list(folder.glob("*.bin"))
        torch.testing.assert_close(logits(load_adapter(kind, folder), kind), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_pickled_adapter_is_the_same_as_the_safe_one(tmp_path: Path, adapter_zoo: Callable) -> None:
    source = adapter_zoo("llama")
    for name in source.logits:
        folder = tmp_path / "zoo" / name
        folder.mkdir(parents=True)
        torch.save(load_file(source.path(name) / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_config.json").write_bytes((source.path(name) / "adapter_config.json").read_bytes())
    safe, pickled = ez.open_zoo(source.folder), ez.open_zoo(tmp_path / "zoo", allow_pickle=True)
    assert safe.layers == pickled.layers
    first, other = ez.fit(safe, rank=2, cache=False), ez.fit(pickled, rank=2, cache=False)
    for name in first.names:
        for layer, values in first.coefficients(name).values.items():
            assert torch.equal(values, other.coefficients(name).values[layer])
    assert other.project(pickled.select(names=["a0"])).residual == first.project(source.path("a0")).residual


def save_pickled(folder: Path, kind: str, number: int, shards: int) -> torch.Tensor:
    """A model as transformers of some years ago saved it: `pytorch_model.bin`, or shards and their index."""
    model = make_finetune(kind, number)
    answer = logits(model, kind)
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return answer
    names = [f"pytorch_model-{place + 1:05d}-of-{shards:05d}.bin" for place in range(shards)]
    weight_map = {key: names[place % shards] for place, key in enumerate(state)}
    for name in names:
        torch.save({key: state[key] for key, shard in weight_map.items() if shard == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return answer


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_checkpoints_answer_as_the_originals(tmp_path: Path, shards: int) -> None:
    answers = {
        f"m{number}": save_pickled(tmp_path / "zoo" / f"m{number}", "vit", number, shards) for number in range(3)
    }
    space = ez.load(ez.fit(ez.open_zoo(tmp_path / "zoo", allow_pickle=True), rank=1.0).save(tmp_path / "bundle"))
    for name, expected in answers.items():
        folder = space.rebuild(name).save(tmp_path / name)
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", OUTPUT_RECORD}
        found = logits(load_checkpoint("vit", folder), "vit")
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_index_of_pickled_shards_is_checked(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_pickled(folder, "vit", 0, 2)
    index = folder / "pytorch_model.bin.index.json"
    good = json.loads(index.read_text())
    key, shard = next(iter(good["weight_map"].items()))
    other = next(name for name in good["weight_map"].values() if name != shard)
    for changes, message in (
        ({key: "../outside.bin"}, r"outside\.bin.*holds '\.\.'"),
        ({key: "gone.bin"}, r"shard 'gone\.bin' is missing"),
        ({key: other}, "is not in its shard"),
        ({"more": shard}, "'more' is not in its shard"),
    ):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], **changes}}))
        with pytest.raises((FormatError, UnsafePathError), match=message):
            ez.open_zoo([folder], allow_pickle=True)
    del good["weight_map"][key]
    index.write_text(json.dumps(good))
    with pytest.raises(FormatError, match="1 tensors of the shards are not listed"):
        ez.open_zoo([folder], allow_pickle=True)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_bare_state_dict_keeps_its_kind_and_its_name(tmp_path: Path, ending: str) -> None:
    """Files of torch modules, safe or pickled: what comes back is a safetensors file that the module loads strictly."""
    (tmp_path / "zoo").mkdir()
    for number in range(3):
        state = make_finetune("resnet", number).state_dict()
        file = tmp_path / "zoo" / f"m.{number}{ending}"
        save_file(state, file) if ending == ".safetensors" else torch.save(state, file)
    space = ez.fit(ez.open_zoo(tmp_path / "zoo", allow_pickle=True), rank=1.0)
    assert space.names == ("m.0", "m.1", "m.2")
    folder = space.rebuild("m.1").save(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [OUTPUT_RECORD, "m.1.safetensors"]
    model = make("resnet")
    model.load_state_dict(load_file(folder / "m.1.safetensors"), strict=True)
    expected = logits(make_finetune("resnet", 1), "resnet")
    torch.testing.assert_close(logits(model, "resnet"), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_safetensors_beside_a_pickle_are_what_is_read(tmp_path: Path, adapter_zoo: Callable) -> None:
    """No permission is needed, and the pickle, which is none, is never looked at."""
    source = adapter_zoo("llama").path("a0")
    folder = tmp_path / "both"
    folder.mkdir()
    save_file(load_file(source / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    (folder / "adapter_model.bin").write_bytes(b"no pickle")
    assert ez.open_zoo([folder], allow_pickle=True).models[0].weight_files()[0].suffix == ".safetensors"
