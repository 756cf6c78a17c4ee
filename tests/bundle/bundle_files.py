"""A small bundle of each form, and ways to damage one as an attacker would: with checksums that fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks

FORMS = ("flat", "tucker", "stacked")
MODULES = {"block.q": (7, 6), "block.v": (5, 8)}


def write_zoo(root: Path, form: str, num_models: int = 5) -> list[Path]:
    """Models with side files and tensors that no layer holds."""
    if form == "stacked":
        head = {"base_model.model.head.weight": torch.ones(2, 3)}
        paths = [
            write_adapter(root / f"m{place}", random_factors(MODULES, 2, place), others=head)
            for place in range(num_models)
        ]
    else:
        stacks = {"block.weight": random_stack(num_models, (7, 6), 0), "block.bias": random_stack(num_models, (5,), 1)}
        stacks["steps"] = torch.arange(num_models).double()[:, None]
        paths = write_stacks(root, stacks)
        for place, path in enumerate(paths):
            tensors = load_file(path / "model.safetensors")
            save_file({**tensors, "steps": torch.tensor([place])}, path / "model.safetensors", {"format": "pt"})
    for path in paths:
        (path / ("config.json" if form != "stacked" else "tokenizer_config.json")).write_text('{"model_type": "small"}')
    return paths


def fit_form(paths: list[Path], form: str, **options: Any) -> ez.Subspace:
    return ez.fit(paths, {"models": 2} if form != "tucker" else {"outputs": 3, "inputs": 2, "models": 2}, **options)


def write_bundle(root: Path, form: str = "flat") -> Path:
    return fit_form(write_zoo(root / "zoo", form), form).save(root / "bundle")


def read_manifest(bundle: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return document


def write_manifest(bundle: Path, document: Any) -> None:
    (bundle / "manifest.json").write_text(json.dumps(document))


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = read_manifest(bundle)
    change(document)
    write_manifest(bundle, document)


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """Put other bytes into a file of the bundle, and their checksum into the manifest."""
    (bundle / name).write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(bundle, lambda document: document["files"].__setitem__(name, record))


def edit_tensors(bundle: Path, name: str, change: Callable[[dict[str, Tensor]], object], **metadata: str) -> None:
    """Change the tensors of a file of the bundle, checksum included."""
    path = bundle / name
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        kept = {**(file.metadata() or {}), **metadata}
    change(tensors)
    path.unlink()  # files may be hard links of the unsaved subspace's
    save_file(tensors, path, kept)
    replace_file(bundle, name, path.read_bytes())


def touch_everything(bundle: Path, target: Path) -> None:
    """Do with a bundle all that a reader does."""
    space = ez.load(bundle)
    list(space.verify())
    for name in space.names:
        rebuilt = space.rebuild(name)
        for layer in space.layers:
            rebuilt.layer(layer)
        rebuilt.save(target / f"model{space.names.index(name)}")
    space.save(target / "again")
