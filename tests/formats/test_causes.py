"""Files that stand for others, and weights that are not there: the error names the cause, and its next step is followed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.errors import FormatError
from eigenzoo.formats.opening import open_model

MODULES = {"q_proj": (6, 5), "v_proj": (4, 5)}


def pointer(data: bytes) -> bytes:
    """What git leaves of a file where git-lfs is missing; the form is that of git-lfs's docs/spec.md."""
    digest = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()


def page(data: bytes) -> bytes:
    return (
        b"\n<!DOCTYPE html>\n<html lang='en'><head><title>Sign in</title></head><body>"
        + b"x" * 5000
        + b"</body></html>"
    )


def answer(data: bytes) -> bytes:
    return b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>AccessDenied</Code></Error>"


STAND_INS = {
    "pointer": (pointer, r"a Git LFS pointer, not the file itself of [\d,]+ bytes.*git lfs pull"),
    "page": (page, r"an HTML page with the name of a model file.*hf download.*hf auth login"),
    "xml": (answer, r"an HTML page with the name of a model file.*hf download"),
    "entry": (lambda data: b"Entry not found", r"an answer of the hub.*'Entry not found'.*hf download"),
}


def one_of(kind: str, folder: Path) -> Path:
    if kind == "adapter":
        return write_adapter(folder / "m", random_factors(MODULES, 2, seed=0))
    (made,) = write_stacks(folder, {"a.weight": random_stack(1, (4, 3)), "b.weight": random_stack(1, (4, 3), 1)})
    if kind == "shards":
        tensors = load_file(made / "model.safetensors")
        (made / "model.safetensors").unlink()
        for number, name in enumerate(tensors, 1):
            save_file({name: tensors[name]}, made / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
        entries = ", ".join(f'"{name}": "model-0000{n}-of-00002.safetensors"' for n, name in enumerate(tensors, 1))
        (made / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{entries}}}}}')
    if kind == "pickle":
        torch.save(load_file(made / "model.safetensors"), made / "pytorch_model.bin")
        (made / "model.safetensors").unlink()
    if kind == "config":
        (made / "config.json").write_text("{}")
    return made


PLACES = [
    ("checkpoint", "model.safetensors"),
    ("shards", "model-00002-of-00002.safetensors"),
    ("shards", "model.safetensors.index.json"),
    ("config", "config.json"),
    ("pickle", "pytorch_model.bin"),
    ("adapter", "adapter_model.safetensors"),
    ("adapter", "adapter_config.json"),
]


@pytest.mark.parametrize("how", STAND_INS)
@pytest.mark.parametrize(("kind", "file"), PLACES)
def test_what_stands_for_a_file_is_named_and_the_file_itself_is_read(
    tmp_path: Path, kind: str, file: str, how: str
) -> None:
    folder = one_of(kind, tmp_path)
    stand_in, text = STAND_INS[how]
    original = (folder / file).read_bytes()
    (folder / file).write_bytes(stand_in(original))
    with pytest.raises(FormatError, match=rf"(?s){file.split('/')[-1]}: this is {text}"):
        open_model(folder, allow_pickle=True)
    (folder / file).write_bytes(original)
    assert open_model(folder, allow_pickle=True).tensors


def test_a_bare_file_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(pointer(b"x" * 10**6))
    with pytest.raises(FormatError, match=r"Git LFS pointer, not the file itself of 1,000,000 bytes"):
        open_model(tmp_path / "m.safetensors")


def test_a_tokenizer_that_is_a_pointer_is_not_carried_and_said(tmp_path: Path) -> None:
    folders = write_stacks(tmp_path / "zoo", {"w": random_stack(2, (4, 3))})
    for folder in folders:
        (folder / "tokenizer.json").write_bytes(pointer(b"x" * 10**6))
    zoo = ez.open_zoo(tmp_path / "zoo")
    assert zoo.models[0].side_files == ()
    assert [text for text in zoo.warnings if "tokenizer.json is a Git LFS pointer" in text and "git lfs pull" in text]
    for folder in folders:
        (folder / "tokenizer.json").write_bytes(b"{}" + b" " * 1000)
    zoo = ez.open_zoo(tmp_path / "zoo")
    assert (zoo.models[0].side_files, zoo.warnings) == (("tokenizer.json",), ())


@pytest.mark.parametrize("kind", ["checkpoint", "shards", "pickle", "adapter", "bare"])
def test_weights_that_zero_3_left_empty_are_named_and_gathered_ones_are_read(tmp_path: Path, kind: str) -> None:
    folder = one_of("checkpoint" if kind == "bare" else kind, tmp_path / "good")
    empty = shutil.copytree(folder, tmp_path / "empty")
    for path in [*empty.glob("*.safetensors"), *empty.glob("*.bin")]:
        if path.suffix == ".bin":
            torch.save({name: torch.empty(0) for name in torch.load(path)}, path)
        else:
            save_file({name: torch.empty(0) for name in load_file(path)}, path, {"format": "pt"})
    place = "model.safetensors" if kind == "bare" else ""
    step = "Set stage3_gather_16bit_weights_on_model_save" if kind == "adapter" else r"zero_to_fp32\.py"
    with pytest.raises(FormatError, match=rf"\d of \d tensors are empty \(shape \[0\]\).*ZeRO stage 3.*{step}"):
        open_model(empty / place, allow_pickle=True)
    assert open_model(folder / place, allow_pickle=True).tensors


def test_an_empty_buffer_is_no_fault(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2), "a.ids": torch.empty(0)}, tmp_path / "m.safetensors", {"format": "pt"})
    assert set(open_model(tmp_path / "m.safetensors").tensors) == {"a.weight", "a.ids"}


def test_an_error_that_a_server_sent_as_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b'{"error":"Repository not found"}')
    with pytest.raises(FormatError, match=r"an answer of the hub.*Repository not found.*hf download"):
        open_model(tmp_path / "m.safetensors")
