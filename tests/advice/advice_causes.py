"""Messages that name a cause: files that stand for others, weights that are not there, names with a prefix, models passed over."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from advice_adapters import assert_rebuilt
from advice_case import Case
from safetensors.torch import load_file, save_file
from tiny_llama import adapter_answers, add_adapter, answers, assert_same, checkpoint_answers, make_llama, write_zoo

import eigenzoo as ez

WEIGHTS = "model.safetensors"


def write_checkpoints(root: Path) -> list[Path]:
    """Write m0 and m1: the base with an adapter merged into it."""
    for seed in range(2):
        add_adapter(make_llama(), seed).merge_and_unload().save_pretrained(root / f"m{seed}")
    return [root / "m0", root / "m1"]


def merged_answers(seed: int) -> torch.Tensor:
    return answers(add_adapter(make_llama(), seed))


def assert_checkpoints_rebuilt(root: Path, zoo: Path) -> None:
    """Every checkpoint of a zoo, rebuilt at full rank, answers in transformers as the model that was saved."""
    space = ez.fit(zoo, rank=1.0)
    assert len(space.names) == 2
    for seed, name in enumerate(space.names):
        assert_same(checkpoint_answers(space.rebuild(name).save(root / "rebuilt" / name)), merged_answers(seed))


def open_in_the_place_of(file: str, data: bytes) -> Callable[[Path], object]:
    """Put something else under a file's name, and the file itself aside."""

    def provoke(root: Path) -> None:
        folder = write_checkpoints(root / "zoo")[1]
        shutil.move(folder / file, root / "itself")
        (folder / file).write_bytes(data)
        ez.open_zoo(root / "zoo")

    return provoke


def download_the_weights(root: Path) -> None:
    """The test put the file itself there, as `git lfs pull` does; rebuilt checkpoints answer in transformers as the originals."""
    shutil.move(root / "itself", root / "zoo" / "m1" / WEIGHTS)
    assert_checkpoints_rebuilt(root, root / "zoo")


def download_the_config(root: Path) -> None:
    """The test put the file itself there, as a download does; rebuilt checkpoints answer in transformers as the originals."""
    shutil.move(root / "itself", root / "zoo" / "m1" / "config.json")
    assert_checkpoints_rebuilt(root, root / "zoo")


def empty(path: Path) -> None:
    """What saving leaves of weights that ZeRO-3 has spread."""
    save_file({name: torch.empty(0) for name in load_file(path)}, path, {"format": "pt"})


def open_empty_checkpoint(root: Path) -> None:
    for folder in write_checkpoints(root / "zoo"):
        empty(folder / WEIGHTS)
    ez.open_zoo(root / "zoo")


def save_checkpoints_gathered(root: Path) -> None:
    """The test saved the checkpoints with their weights; rebuilt, they answer in transformers as the originals.

    That zero_to_fp32.py of DeepSpeed 0.19.8 writes a folder that is read so was tried by hand, on a checkpoint of two processes.
    """
    shutil.rmtree(root / "zoo")
    write_checkpoints(root / "zoo")
    assert_checkpoints_rebuilt(root, root / "zoo")


def open_empty_adapter(root: Path) -> None:
    for folder in write_zoo(root / "zoo"):
        empty(folder / "adapter_model.safetensors")
    ez.open_zoo(root / "zoo")


def save_adapters_gathered(root: Path) -> None:
    """The test saved the adapters with their weights; rebuilt, they answer in PEFT as the originals."""
    shutil.rmtree(root / "zoo")
    write_zoo(root / "zoo")
    assert_rebuilt(root, root / "zoo")


def rename(path: Path, change: Callable[[str], str]) -> None:
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def open_compiled(root: Path) -> str:
    """torch.compile before saving: every name has its wrapper's."""
    folder = write_checkpoints(root / "zoo")[1]
    rename(folder / WEIGHTS, lambda name: f"_orig_mod.{name}")
    try:
        ez.open_zoo(root / "zoo")
    except ez.MismatchError as error:
        (root / "line").write_text(str(error))
        return str(error)
    raise AssertionError("no error was raised")


def run_the_line(root: Path) -> None:
    """The test ran the line of code of the message on the file; rebuilt checkpoints answer in transformers as the originals."""
    line = re.search(r"save_file\(.*\)(?= of safetensors\.torch)", (root / "line").read_text())
    assert line is not None
    path = root / "zoo" / "m1" / WEIGHTS
    exec(line[0], {"save_file": save_file, "load_file": load_file, "path": path})
    assert_checkpoints_rebuilt(root, root / "zoo")


def open_hidden(root: Path) -> None:
    write_zoo(root / "zoo", 1)[0].rename(root / "zoo" / "_a0")
    ez.open_zoo(root / "zoo")


def name_it(root: Path) -> None:
    """The test named the model itself; the rebuilt adapter answers in PEFT as the original."""
    other = write_zoo(root / "other")[1]
    zoo = ez.open_zoo([root / "zoo" / "_a0", other])
    assert zoo.names == ("_a0", "a1")
    rebuilt = ez.fit(zoo, rank=1.0).rebuild("_a0").save(root / "rebuilt")
    assert_same(adapter_answers(rebuilt), adapter_answers(root / "zoo" / "_a0"))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n".encode()
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


def open_with_the_base(root: Path) -> None:
    """The base model beside its adapters."""
    write_zoo(root / "zoo")
    make_llama().save_pretrained(root / "zoo" / "base")
    ez.open_zoo(root / "zoo")


def pass_over_the_base(root: Path) -> None:
    """The test called the base's folder `_base`; the rebuilt adapters answer in PEFT as the originals."""
    (root / "zoo" / "base").rename(root / "zoo" / "_base")
    opened = ez.open_zoo(root / "zoo")
    assert list(opened.names) == ["a0", "a1"]
    space = ez.fit(opened, rank=1.0)
    for name in space.names:
        rebuilt = space.rebuild(name).save(root / "rebuilt" / name)
        assert_same(adapter_answers(rebuilt), adapter_answers(root / "zoo" / name))


CASES = [
    Case(
        "A base model among its adapters",
        open_with_the_base,
        ("base is not a LoRA adapter", "2 of 3", "begin its folder's name with '_'"),
        pass_over_the_base,
    ),
    Case(
        "A Git LFS pointer under a file's name",
        open_in_the_place_of(WEIGHTS, POINTER),
        ("Git LFS pointer", "git lfs pull"),
        download_the_weights,
    ),
    Case(
        "A web page under a file's name",
        open_in_the_place_of("config.json", PAGE),
        ("an HTML page", "hf download"),
        download_the_config,
    ),
    Case(
        "A checkpoint that ZeRO-3 left empty",
        open_empty_checkpoint,
        ("tensors are empty (shape [0])", "zero_to_fp32.py", "stage3_gather_16bit_weights_on_model_save"),
        save_checkpoints_gathered,
    ),
    Case(
        "An adapter that ZeRO-3 left empty",
        open_empty_adapter,
        ("tensors are empty (shape [0])", "et stage3_gather_16bit_weights_on_model_save"),
        save_adapters_gathered,
    ),
    Case(
        "One model whose names have a prefix",
        open_compiled,
        ("m1: the names of its tensors begin with '_orig_mod.'", "save_file("),
        run_the_line,
    ),
    Case(
        "A model whose name begins with an underscore",
        open_hidden,
        ("whose name begins with '_'", "ame it directly"),
        name_it,
    ),
]
