"""Messages about sources, views, choices of layers, splits and names of models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from advice_case import Case
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenzoo as ez
from builders import edit_model, random_factors, random_stack, read_update, write_adapter, write_stacks
from eigenzoo.formats.bundle.manifest import MAX_NAME
from tolerance import tolerance

WEIGHTS = "model.safetensors"
SHAPES = {"block.q": (6, 4), "block.v": (4, 6)}


def write_models(root: Path, names: tuple[str, str] = ("block.weight", "block.bias")) -> list[Path]:
    """Four checkpoints of a matrix and a vector, and a copy of them in `originals`."""
    paths = write_stacks(root / "zoo", {names[0]: random_stack(4, (7, 6)), names[1]: random_stack(4, (5,), 1)})
    shutil.copytree(root / "zoo", root / "originals")
    return paths


def values(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def assert_values(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The tensors are equal to round-off."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        size = tolerance(100, dtype=torch.float32, scale=float(value.abs().max()) + 1)
        assert (found[name].double() - value.double()).abs().max() <= size, name


def assert_rebuilt(zoo: ez.Zoo | ez.Subspace, originals: Path, names: tuple[str, ...] = ()) -> None:
    """Every model of a zoo, rebuilt at full rank, holds the original's values."""
    space = zoo if isinstance(zoo, ez.Subspace) else ez.fit(zoo, rank=1.0)
    assert space.names == (names or space.names)
    for name in space.names:
        assert_values(space.rebuild(name).state_dict(), values(originals / name))


def write_adapters(root: Path) -> list[Path]:
    """Three adapters of two modules."""
    return [write_adapter(root / f"a{n}", random_factors(SHAPES, 2, n), lora_alpha=6) for n in range(3)]


def assert_updates(space: ez.Subspace, originals: Path) -> None:
    """Every adapter of a bundle, rebuilt, has the updates of the original's file."""
    for name in space.names:
        for module in space.layers:
            expected = read_update(originals / name, module)
            found = space.rebuild(name).layer(module)
            assert (found - expected).abs().max() <= tolerance(
                100, dtype=torch.float32, scale=float(expected.abs().max())
            )


def opening(write: Callable[[Path], object], **choices: object) -> Callable[[Path], object]:
    """Write models, and open them in a way that is refused."""

    def provoke(root: Path) -> None:
        write(root)
        ez.open_zoo(root / "zoo", **choices)

    return provoke


def choose_a_layer(root: Path) -> None:
    """The test widened `--include` to a layer that is there; the rebuilt models hold the files' values."""
    zoo = ez.open_zoo(root / "zoo", include=["block.*"])
    assert set(zoo.layers) == {"block.weight", "block.bias"}
    assert_rebuilt(zoo, root / "originals")


def name_the_base(root: Path) -> None:
    """The test named one of the checkpoints as the base; the rebuilt models hold the files' values."""
    assert_rebuilt(ez.open_zoo(root / "zoo", view="delta", base=root / "originals" / "m0"), root / "originals")


def leave_out_missing(root: Path) -> None:
    """The test left it out, and passed `allow_missing=True` for a layer that one model lacks; both zoos hold the files' values."""
    assert_rebuilt(ez.open_zoo(root / "zoo"), root / "originals")
    for place in ("zoo", "originals"):
        edit_model(root / place / "m1", block__bias=None)
    zoo = ez.open_zoo(root / "zoo", allow_missing=True)
    assert set(zoo.layers) == {"block.weight"}
    assert_rebuilt(zoo, root / "originals")


def use_view_weight(root: Path) -> None:
    """The test used both; the rebuilt models hold the files' values."""
    assert_rebuilt(ez.open_zoo(root / "zoo", view="weight"), root / "originals")
    name_the_base(root)


def use_view_update(root: Path) -> None:
    """The test used both; the rebuilt adapters have the files' updates, and s·B is B times α over r."""
    assert_updates(ez.fit(ez.open_zoo(root / "zoo", view="update"), rank=1.0), root / "zoo")
    space = ez.fit(ez.open_zoo(root / "zoo", view="factors"), rank=1.0)
    expected = (
        3 * load_file(root / "zoo" / "a1" / "adapter_model.safetensors")["base_model.model.block.q.lora_B.weight"]
    )
    found = space.rebuild("a1").layer("block.q.lora_B")
    assert (found - expected).abs().max() <= tolerance(100, dtype=torch.float32, scale=float(expected.abs().max()))


def open_mixed_ranks_with_nothing_in_common(root: Path) -> None:
    for number, module in enumerate(SHAPES):
        write_adapter(root / "zoo" / f"a{number}", random_factors({module: SHAPES[module]}, 2, number))
    ez.open_zoo(root / "zoo", view="factors")


def count_as_zero(root: Path) -> None:
    """The test did both at once, `view="update", missing="zero"`; the rebuilt adapters have the files' updates, and zeros."""
    space = ez.fit(ez.open_zoo(root / "zoo", view="update", missing="zero"), rank=1.0)
    for number, (module, other) in enumerate(zip(SHAPES, reversed(SHAPES), strict=True)):
        rebuilt = space.rebuild(f"a{number}")
        expected = read_update(root / "zoo" / f"a{number}", module)
        largest = tolerance(100, dtype=torch.float32, scale=float(expected.abs().max()))
        assert (rebuilt.layer(module) - expected).abs().max() <= largest
        assert rebuilt.layer(other).abs().max() <= largest


def write_long_name(root: Path) -> None:
    name = "x" * (MAX_NAME + 1)
    for path in write_models(root):
        for place in (path, root / "originals" / path.name):
            edit_model(place, **{name: torch.ones(3)})


def exclude_the_long_name(root: Path) -> None:
    """The test excluded it by that glob; the rebuilt models hold the files' values, the long name's too."""
    assert_rebuilt(ez.open_zoo(root / "zoo", exclude=["x" * 20 + "*"]), root / "originals")


def write_without_prefix(root: Path) -> None:
    path = write_models(root)[1]
    tensors = {name.removeprefix("block."): tensor for name, tensor in values(path).items()}
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def run_the_line(root: Path) -> None:
    """The test ran the line of code of the message on the file; the rebuilt models hold the files' values."""
    with pytest.raises(ez.MismatchError, match=r"lack 'block\.'") as caught:
        ez.open_zoo(root / "zoo")
    line = re.search(r"save_file\(.*\)(?= of safetensors\.torch)", str(caught.value))
    assert line is not None
    names = {"save_file": save_file, "load_file": load_file, "path": root / "zoo" / "m1" / WEIGHTS}
    exec(line[0], names | {"others": values(root / "zoo" / "m0")})
    assert_rebuilt(ez.open_zoo(root / "zoo"), root / "originals")


def write_without_a_part(root: Path) -> None:
    for path in write_models(root, ("a.module.weight", "b.module.bias")):
        if path.name == "m1":
            tensors = {name.replace(".module", ""): tensor for name, tensor in values(path).items()}
            save_file(tensors, path / WEIGHTS, {"format": "pt"})


def save_it_as_the_others(root: Path) -> None:
    """The test saved it with the others' names; the rebuilt models hold the files' values."""
    shutil.copy(root / "originals" / "m1" / WEIGHTS, root / "zoo" / "m1")
    assert_rebuilt(ez.open_zoo(root / "zoo"), root / "originals")


def write_deep(root: Path) -> None:
    write_models(root)
    (root / "zoo").rename(root / "models")
    (root / "zoo" / "a" / "b" / "c").mkdir(parents=True)
    (root / "models").rename(root / "zoo" / "a" / "b" / "c" / "d")


def name_the_folder(root: Path) -> None:
    """The test named the folder that holds them; the rebuilt models hold the files' values."""
    assert_rebuilt(ez.open_zoo(root / "zoo" / "a" / "b" / "c" / "d"), root / "originals")


def open_many_names(root: Path) -> None:
    """The limit is lowered to ten names."""
    write_models(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eigenzoo.formats.tree.MAX_LOOKED_AT", 10)
        ez.open_zoo(str(root / "**"))


def name_a_smaller_folder(root: Path) -> None:
    """The test lowered the limit to ten names, and named a folder with fewer; the rebuilt models hold the files' values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eigenzoo.formats.tree.MAX_LOOKED_AT", 10)
        space = ez.fit(ez.open_zoo(str(root / "zoo" / "**" / "*.safetensors")), rank=1.0)
    assert len(space.names) == 4
    for number, name in enumerate(space.names):
        assert_values(space.rebuild(name).state_dict(), values(root / "originals" / f"m{number}"))


def open_many_modules(limit: str, most: int) -> Callable[[Path], object]:
    def provoke(root: Path) -> None:
        shapes = {f"layer{n}": (4, 3) for n in range(4)}
        for number in range(3):
            module = {"shared": (5, 3), f"layer{number}": shapes[f"layer{number}"]}
            write_adapter(root / "zoo" / f"a{number}", random_factors(module, 2, number))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"eigenzoo.zoo.matching.{limit}", most)
            ez.open_zoo(root / "zoo", missing="zero")

    return provoke


def assert_shared(root: Path, **choices: object) -> None:
    space = ez.fit(ez.open_zoo(root / "zoo", missing="zero", **choices), rank=1.0)
    assert "shared" in space.layers
    for name in space.names:
        expected = read_update(root / "zoo" / name, "shared")
        found = space.rebuild(name).layer("shared")
        assert (found - expected).abs().max() <= tolerance(100, dtype=torch.float32, scale=float(expected.abs().max()))


def open_adapters_of_one_base(root: Path) -> None:
    """The test lowered the limit to three, and opened the two that are of one base; the rebuilt ones have the files' updates."""
    shutil.rmtree(root / "zoo" / "a2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eigenzoo.zoo.matching.MAX_MODULES", 3)
        assert_shared(root)


def leave_out_what_few_have(root: Path) -> None:
    """The test lowered the limit to three, and did each; the rebuilt adapters have the files' updates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eigenzoo.zoo.matching.MAX_ZEROS", 3)
        assert_shared(root, exclude=["layer*"])
        for path in (root / "zoo").iterdir():
            if path.name != "a0":
                shutil.rmtree(path)
                write_adapter(path, random_factors({"shared": (5, 3), "layer0": (4, 3)}, 2, int(path.name[1:])))
        assert_shared(root)


def as_path(text: str) -> Callable[[Path], object]:
    def provoke(root: Path) -> None:
        ez.open_zoo(Path(text))

    return provoke


def write_fused(root: Path, extra: Mapping[str, Tensor]) -> None:
    for place in ("zoo", "originals"):
        for n in range(2):
            draw = torch.Generator().manual_seed(n)
            tensors = {"attn.qkv.weight": torch.randn(6, 4, generator=draw), **extra}
            (root / place / f"m{n}").mkdir(parents=True)
            save_file(tensors, root / place / f"m{n}" / WEIGHTS, {"format": "pt"})


def open_split(split: str, **extra: Tensor) -> Callable[[Path], object]:
    def provoke(root: Path) -> None:
        write_fused(root, {name.replace("__", "."): value for name, value in extra.items()})
        ez.open_zoo(root / "zoo", split=[split])

    return provoke


def assert_split(root: Path, rule: str) -> None:
    zoo = ez.open_zoo(root / "zoo", split=[rule])
    assert {"attn.qkv.weight.q", "attn.qkv.weight.k", "attn.qkv.weight.v"} <= set(zoo.layers) or {
        "attn.qkv.q.weight",
        "attn.qkv.k.weight",
        "attn.qkv.v.weight",
    } <= set(zoo.layers), list(zoo.layers)
    assert_rebuilt(zoo, root / "originals")


def narrow_the_glob(root: Path) -> None:
    """The test narrowed the glob to the fused weight; the rebuilt models hold the files' values."""
    assert_split(root, "attn.qkv.weight=q,k,v")


def give_adapters_a_base(root: Path) -> None:
    write_adapters(root / "zoo")
    save_file({"q.weight": torch.ones(6, 5)}, root / "base.safetensors")
    ez.open_zoo(root / "zoo", base=root / "base.safetensors")


def leave_out_the_base(root: Path) -> None:
    """The test left it out; the rebuilt adapters have the files' updates."""
    assert_updates(ez.fit(ez.open_zoo(root / "zoo"), rank=1.0), root / "zoo")


def split_adapters(root: Path) -> None:
    write_adapters(root / "zoo")
    ez.open_zoo(root / "zoo", split=["block.q*=q,k"])


def leave_the_split_out(root: Path) -> None:
    """The test left it out; the rebuilt adapters have the files' updates."""
    assert_updates(ez.fit(ez.open_zoo(root / "zoo"), rank=1.0), root / "zoo")


def look_at_the_names(root: Path) -> None:
    """The test took the name out of what that command prints; the rebuilt models hold the files' values."""
    from typer.testing import CliRunner

    from eigenzoo.cli.app import app

    printed = CliRunner().invoke(app, ["inspect", str(root / "zoo"), "--json"])
    (role,) = (found["role"] for found in json.loads(printed.stdout)["roles"])
    assert_split(root, f"{role}=q,k,v")


def change_while_open(root: Path) -> None:
    paths = write_models(root)
    zoo = ez.open_zoo(root / "zoo")
    edit_model(paths[1], block__weight=torch.ones(7, 6), extra=torch.ones(2))
    ez.fit(zoo, rank=1.0)


def open_it_again(root: Path) -> None:
    """The test opened it again; the rebuilt models hold the values that the files have now."""
    shutil.rmtree(root / "originals")
    shutil.copytree(root / "zoo", root / "originals")
    assert_rebuilt(ez.open_zoo(root / "zoo", allow_missing=True), root / "originals")


def open_an_answer(root: Path) -> None:
    path = write_models(root)[1]
    (path / WEIGHTS).write_bytes(b"Entry not found")
    ez.open_zoo(root / "zoo")


def get_it_again(root: Path) -> None:
    """The test put the file itself there, as a download does; the rebuilt models hold its values."""
    shutil.copy(root / "originals" / "m1" / WEIGHTS, root / "zoo" / "m1")
    assert_rebuilt(ez.open_zoo(root / "zoo"), root / "originals")


def write_four_bits(root: Path) -> None:
    """As safetensors 0.6 and later name values of half a byte."""
    path = write_models(root)[1]
    header = {"block.weight": {"dtype": "F4", "shape": [7, 6], "data_offsets": [0, 21]}}
    text = json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(21))


def save_as_floats(root: Path) -> None:
    """The test saved the weights as float32; the rebuilt models hold their values."""
    get_it_again(root)


FOREIGN = {"tf_model.h5": b"\x89HDF", "flax_model.msgpack": b"", "model.onnx": b""}


def write_foreign(root: Path) -> None:
    for path, (name, data) in zip(write_models(root), FOREIGN.items(), strict=False):
        (path / WEIGHTS).unlink()
        (path / name).write_bytes(data)


def save_it_as_safetensors(root: Path) -> None:
    """The test saved each as safetensors beside the other file; the rebuilt models hold the values."""
    for path in (root / "zoo").iterdir():
        shutil.copy(root / "originals" / path.name / WEIGHTS, path)
    assert_rebuilt(ez.open_zoo(root / "zoo"), root / "originals")


CASES = [
    Case(
        "A choice that leaves no layer",
        opening(write_models, include=["attention*"]),
        ("iden --include",),
        choose_a_layer,
    ),
    Case(
        "View `delta` without a base",
        opening(write_models, view="delta"),
        ("ame the parent checkpoint",),
        name_the_base,
    ),
    Case(
        "`--missing zero` with checkpoints",
        opening(write_models, missing="zero"),
        ("only an update can be zero".capitalize(), "eave out missing='zero'", "--allow-missing leaves out layers"),
        leave_out_missing,
    ),
    Case(
        "View `update` of checkpoints",
        opening(write_models, view="update"),
        ("needs LoRA adapters", "se view 'weight', or 'delta' with a base"),
        use_view_weight,
    ),
    Case(
        "View `weight` of adapters",
        opening(lambda root: write_adapters(root / "zoo"), view="weight"),
        ("needs full weights", "se view 'update' or 'factors'"),
        use_view_update,
    ),
    Case(
        "Adapters without a module in common, in view `factors`",
        open_mixed_ranks_with_nothing_in_common,
        ("se view 'update', where --missing zero",),
        count_as_zero,
    ),
    Case(
        "A name that no bundle can hold",
        opening(write_long_name),
        ("a layer name of", "--exclude 'xxxx"),
        exclude_the_long_name,
    ),
    Case(
        "One model whose names lack a prefix",
        opening(write_without_prefix),
        ("m1: the names of its tensors lack 'block.'", "save_file("),
        run_the_line,
    ),
    Case(
        "One model whose names lack a part in the middle",
        opening(write_without_a_part),
        ("m1: the names of its tensors lack 'module.'", "ave it as m0 was saved"),
        save_it_as_the_others,
    ),
    Case("Models four folders deep", opening(write_deep), ("three folders deep",), name_the_folder),
    Case("More names than a glob looks at", open_many_names, ("ame a smaller folder",), name_a_smaller_folder),
    Case(
        "More modules than `--missing zero` counts",
        open_many_modules("MAX_MODULES", 3),
        ("4 different modules", "pen only adapters of one base"),
        open_adapters_of_one_base,
    ),
    Case(
        "More lacking modules than `--missing zero` fills",
        open_many_modules("MAX_ZEROS", 3),
        ("adapters lack more than 3 modules", "-exclude the modules", "open only adapters that train"),
        leave_out_what_few_have,
    ),
    Case(
        "A split that matches nothing",
        open_split("attention*=q,k,v"),
        ("`eigenzoo inspect --json`",),
        look_at_the_names,
    ),
    Case(
        "A split that matches a tensor that is not a weight",
        open_split("attn.*=q,k,v", attn__steps=torch.arange(6)),
        ("cannot be split", "arrow the glob"),
        narrow_the_glob,
    ),
    Case(
        "A split that matches GPT-2's Conv1D",
        open_split("attn.*weight=q,k,v", attn__c__weight=torch.ones(3, 9), attn__c__bias=torch.ones(9)),
        ("its bias has 9 outputs", "arrow the glob to leave it out"),
        narrow_the_glob,
    ),
    Case("A base for adapters", give_adapters_a_base, ("read without it", "eave out --base"), leave_out_the_base),
    Case("A split of adapters", split_adapters, ("eave the split out: PEFT stores",), leave_the_split_out),
    Case(
        "A file that changes while it is read", change_while_open, ("changed since", "pen the zoo again"), open_it_again
    ),
    Case(
        "An answer of the hub under a file's name", open_an_answer, ("'Entry not found'", "hf download"), get_it_again
    ),
    Case(
        "Weights of half a byte", opening(write_four_bits), ("dtype 'F4'", "ave them in one of these"), save_as_floats
    ),
    Case(
        "Weights of Keras, Flax or ONNX",
        opening(write_foreign),
        ("an HDF5 file", "ave the model as safetensors where it comes from"),
        save_it_as_safetensors,
    ),
]
