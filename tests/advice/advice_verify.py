"""Faults of `verify --against`, whose next steps were tried before they are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from advice_case import Case
from safetensors.torch import load_file, save_file
from tiny_llama import adapter_answers, assert_same, make_llama, quiet, write_zoo

import eigenzoo as ez
from eigenzoo.integrations.dry_loading import load_dry

WEIGHTS = "adapter_model.safetensors"


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Write an adapter's weights by other keys."""
    tensors = {change(key): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def verify(root: Path) -> list[str]:
    """Return the faults of the adapter a0, with PEFT's version left out."""
    found = ez.verify_adapter(root / "zoo" / "a0", root / "base", loader=load_dry)
    return [re.sub(r"PEFT \d[\w.]*", "PEFT", fault) for fault in found]


def with_something_before(part: str) -> Callable[[Path], str]:
    """Keys of a model that was wrapped, or a part of another one, when its adapter was saved."""

    def provoke(root: Path) -> str:
        with quiet():
            make_llama().save_pretrained(root / "base")
        write_zoo(root / "zoo", 2)
        rename(root / "zoo" / "a0", lambda key: part + key)
        return verify(root)[-1]

    return provoke


def cut_it_off(root: Path) -> None:
    """The test cut it off each key; the adapter answers in PEFT as when it was saved."""
    rename(root / "zoo" / "a0", lambda key: key[key.index("base_model.model.") :])
    assert verify(root) == []
    assert_same(adapter_answers(root / "zoo" / "a0"), adapter_answers(write_zoo(root / "again", 1)[0]))


CASES = [
    Case(
        f"Keys with `{part}` before PEFT's own",
        with_something_before(part),
        ("drops 8 of 8 tensors", f"Cut '{part}' off the keys that begin with it"),
        cut_it_off,
    )
    for part in ("_orig_mod.", "thinker.")
]
