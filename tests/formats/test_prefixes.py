"""The one prefix by which a model differs from the others is named with the model, and its next step gives one zoo."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.errors import FormatError, MismatchError
from eigenzoo.formats.layout import ModelLayout, layout_of
from eigenzoo.formats.opening import open_model

LAYERS = ("model.layers.0.q.weight", "model.layers.1.q.weight", "model.norm.weight")


def zoo_of(root: Path, num_models: int = 4) -> list[Path]:
    stacks = {name: random_stack(num_models, (4, 3), seed) for seed, name in enumerate(LAYERS)}
    return write_stacks(root, {**stacks, "lm_head.weight": random_stack(num_models, (5, 3), 9)})


def rename(path: Path, change: Callable[[str], str]) -> None:
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def follow(error: MismatchError, path: Path, other: Path | None = None) -> None:
    """Carry out the line of code that the error gives."""
    line = re.search(r"save_file\(.*\)(?= of safetensors\.torch)", str(error))
    assert line is not None, str(error)
    exec(line[0], {"save_file": save_file, "load_file": load_file, "path": path, "others": load_file(other or path)})


CHANGES: dict[str, tuple[Callable[[str], str], str]] = {
    "DataParallel": (
        lambda name: f"module.{name}",
        r"m2: the names of its tensors begin with 'module\.', which those of m0 lack",
    ),
    "compiled": (lambda name: f"_orig_mod.{name}", r"begin with '_orig_mod\.'"),
    "both": (lambda name: f"module._orig_mod.{name}", r"begin with 'module\._orig_mod\.'"),
    "within": (
        lambda name: name.replace("layers.", "layers._orig_mod."),
        r"hold '_orig_mod\.', which those of m0 lack",
    ),
    "a larger model": (lambda name: f"thinker.{name}", r"begin with 'thinker\.'"),
    "the inner model": (lambda name: name.removeprefix("model."), r"lack 'model\.', which those of m0 begin with"),
}


@pytest.mark.parametrize("which", CHANGES)
def test_the_prefix_of_one_model_is_named_and_can_be_removed(tmp_path: Path, which: str) -> None:
    folders = zoo_of(tmp_path / "zoo")
    want = ez.open_zoo(tmp_path / "zoo").layers.keys()
    change, text = CHANGES[which]
    rename(folders[2] / "model.safetensors", change)
    with pytest.raises(MismatchError, match=text) as caught:
        ez.open_zoo(tmp_path / "zoo")
    follow(caught.value, folders[2] / "model.safetensors", folders[0] / "model.safetensors")
    assert ez.open_zoo(tmp_path / "zoo").layers.keys() == want


def test_a_prefix_of_all_names_is_told_with_allow_missing_too(tmp_path: Path) -> None:
    folders = zoo_of(tmp_path / "zoo")
    rename(folders[2] / "model.safetensors", lambda name: f"module.{name}")
    with pytest.raises(MismatchError, match=r"m2: the names of its tensors begin with 'module"):
        ez.open_zoo(tmp_path / "zoo", allow_missing=True)


def test_a_missing_prefix_is_put_before_all_names(tmp_path: Path) -> None:
    folders = zoo_of(tmp_path / "zoo")
    for folder in folders:
        rename(folder / "model.safetensors", lambda name: f"net.{name}")
    rename(folders[1] / "model.safetensors", lambda name: name.removeprefix("net."))
    with pytest.raises(MismatchError, match=r"m1: the names of its tensors lack 'net\.'") as caught:
        ez.open_zoo(tmp_path / "zoo")
    follow(caught.value, folders[1] / "model.safetensors", folders[0] / "model.safetensors")
    assert len(ez.open_zoo(tmp_path / "zoo").layers) == 4


def test_adapters_are_named_by_their_files_names(tmp_path: Path) -> None:
    folders = [
        write_adapter(tmp_path / f"t{n}", random_factors({"q": (6, 5), "v": (4, 5)}, 2, seed=n)) for n in range(3)
    ]
    rename(folders[1] / "adapter_model.safetensors", lambda name: f"_orig_mod.{name}")
    with pytest.raises(MismatchError, match=r"t1: the names of its tensors begin with '_orig_mod\.'") as caught:
        ez.open_zoo(tmp_path)
    follow(caught.value, folders[1] / "adapter_model.safetensors")
    assert set(ez.open_zoo(tmp_path).layers) == {"q", "v"}


def test_a_base_by_other_names_is_told(tmp_path: Path) -> None:
    zoo_of(tmp_path / "zoo")
    (base,) = zoo_of(tmp_path / "base", 1)
    rename(base / "model.safetensors", lambda name: f"module.{name}")
    with pytest.raises(MismatchError, match=r"the base: the names of its tensors begin with 'module\.'") as caught:
        ez.open_zoo(tmp_path / "zoo", base=base)
    follow(caught.value, base / "model.safetensors")
    assert len(ez.open_zoo(tmp_path / "zoo", base=base).layers) == 4


@pytest.mark.parametrize("kind", ["weights", "adapters", "factors"])
def test_a_model_is_projected_under_the_bundles_names(tmp_path: Path, kind: str) -> None:
    """Under one prefix it is the same model, in another process too, and its files' names come back when it is rebuilt."""
    if kind == "weights":
        folders, file = zoo_of(tmp_path / "zoo"), "model.safetensors"
    else:
        modules, file = {"q": (6, 5), "v": (4, 5)}, "adapter_model.safetensors"
        folders = [write_adapter(tmp_path / "zoo" / f"t{n}", random_factors(modules, 2, seed=n)) for n in range(3)]
    space = ez.fit(tmp_path / "zoo", rank=1, view="factors" if kind == "factors" else None)
    want = space.project(folders[1])
    path = folders[1].rename(tmp_path / "away") / file
    rename(
        path,
        lambda name: (
            f"base_model.model.net.{name.removeprefix('base_model.model.')}" if "lora" in name else f"net.{name}"
        ),
    )
    found = space.project(path.parent)
    for name, values in want.values.items():
        assert torch.equal(found.values[name], values)
    assert load_file(space.rebuild(found).save(tmp_path / "again") / file).keys() == load_file(path).keys()
    opened = pickle.loads(pickle.dumps(space.open(path.parent)))
    assert opened.layers.keys() == space.layers.keys()


@pytest.mark.parametrize("kind", ["weights", "adapters"])
def test_a_model_whose_names_lack_more_than_a_prefix_is_told(tmp_path: Path, kind: str) -> None:
    """A part in the middle of the names, or several prefixes."""
    if kind == "weights":
        folders, file = write_stacks(tmp_path / "zoo", {"net.w": random_stack(3, (4, 3))}), "model.safetensors"
        change, text = (
            (lambda name: name.replace("net.", "net._orig_mod.")),
            r"hold '_orig_mod\.', which those of the bundle",
        )
    else:
        modules, file = {"q": (6, 5), "v": (4, 5)}, "adapter_model.safetensors"
        folders = [write_adapter(tmp_path / "zoo" / f"t{n}", random_factors(modules, 2, seed=n)) for n in range(3)]
        change, text = (
            (lambda name: name.replace("model.q", "model.a.q").replace("model.v", "model.b.v")),
            "has none of the bundle's layers",
        )
    space = ez.fit(tmp_path / "zoo", rank=1)
    path = folders[1].rename(tmp_path / "away") / file
    rename(path, change)
    with pytest.raises(MismatchError, match=text):
        space.project(path.parent)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "not a mapping"),
        ({"gone": "x"}, "not a mapping from tensors of a checkpoint"),
        ({LAYERS[0]: 3}, "or one has none"),
        ({LAYERS[0]: ""}, "or one has none"),
        ({LAYERS[0]: LAYERS[1]}, "two tensors have one name"),
    ],
)
def test_names_of_a_layout_that_others_wrote_are_checked(tmp_path: Path, names: object, message: str) -> None:
    layout = layout_of(open_model(zoo_of(tmp_path, 1)[0]))
    renamed = replace(layout, names={LAYERS[0]: LAYERS[1], LAYERS[1]: "other"})
    assert ModelLayout.from_json(renamed.to_json()) == renamed
    with pytest.raises(FormatError, match=message):
        ModelLayout.from_json({**layout.to_json(), "names": names})


def test_models_without_a_common_layer_are_not_sent_to_allow_missing(tmp_path: Path) -> None:
    write_stacks(tmp_path / "a", {"x.weight": random_stack(1, (4, 3))})
    write_stacks(tmp_path / "b", {"y.weight": random_stack(1, (4, 3))})
    with pytest.raises(MismatchError, match=r"[Nn]o layer is in all models: name models of one architecture") as caught:
        ez.open_zoo([tmp_path / "a" / "m0", tmp_path / "b" / "m0"])
    assert "allow-missing" not in str(caught.value)
    assert "x.weight" in ez.open_zoo(tmp_path / "a").layers
