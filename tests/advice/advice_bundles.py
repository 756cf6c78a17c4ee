"""Messages about bundles, and about files and folders that a command would write."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import torch
from advice_case import Case
from advice_zoos import SHAPES, assert_rebuilt, assert_updates, assert_values, values, write_models
from safetensors.torch import load, save
from typer.testing import CliRunner

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.cli.app import app


def write_bundle(root: Path, name: str = "bundle") -> Path:
    write_models(root)
    return ez.fit(root / "zoo", rank=1.0).save(root / name)


def run(*words: object) -> None:
    """Run a command of eigenzoo; raises what it raises."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None:
        raise done.exception


def load_part_of_it(root: Path) -> None:
    shutil.copytree(write_bundle(root), root / "whole")
    (root / "bundle" / "coefficients" / "m1.safetensors").unlink()
    ez.load(root / "bundle")


def load_changed(root: Path) -> None:
    shutil.copytree(write_bundle(root), root / "whole")
    for path in (root / "bundle" / "rest").glob("*.json"):
        path.write_text("{}")
    ez.load(root / "bundle").rebuild("m1").state_dict()


def load_damaged_scales(root: Path) -> None:
    write_models(root)
    shutil.copytree(ez.fit(root / "zoo", rank=2, dtype="nf4").save(root / "bundle"), root / "whole")
    path = root / "bundle" / "basis.safetensors"
    tensors = load(path.read_bytes())
    for name in tensors:
        if name.endswith(".scale"):
            tensors[name].fill_(float("nan"))
    path.unlink()
    path.write_bytes(save(tensors))
    ez.load(root / "bundle").rebuild("m1").state_dict()


def copy_the_quantised_one_again(root: Path) -> None:
    """The test copied it again, whole; `verify` finds no fault."""
    shutil.rmtree(root / "bundle")
    shutil.copytree(root / "whole", root / "bundle")
    ez.load(root / "bundle").rebuild("m1").state_dict()
    assert list(ez.load(root / "bundle").verify()) == []


def fit_large_coefficients(root: Path) -> None:
    write_models(root)
    for path in (root / "zoo").glob("*/model.safetensors"):
        tensors = load(path.read_bytes())
        path.write_bytes(save({name: 1e6 * tensor for name, tensor in tensors.items()}, {"format": "pt"}))
    run("fit", root / "zoo", "--rank", 2, "--coefficients-dtype", "float16", "-o", root / "bundle")


def fit_in_bfloat16(root: Path) -> None:
    """The test fitted with `--coefficients-dtype bfloat16`; `verify` finds no fault."""
    run("fit", root / "zoo", "--rank", 2, "--coefficients-dtype", "bfloat16", "-o", root / "bundle")
    assert list(ez.load(root / "bundle").verify()) == []


def copy_it_again(root: Path) -> None:
    """The test copied it again, whole; the rebuilt models hold the files' values."""
    shutil.rmtree(root / "bundle")
    shutil.copytree(root / "whole", root / "bundle")
    assert_rebuilt(ez.load(root / "bundle"), root / "originals")


def load_a_zoo(root: Path) -> None:
    write_models(root)
    ez.load(root / "zoo")


def fit_it(root: Path) -> None:
    """The test ran that command, with `--rank 1.0`; the rebuilt models hold the files' values."""
    run("fit", root / "zoo", "--rank", "1.0", "-o", root / "bundle")
    assert_rebuilt(ez.load(root / "bundle"), root / "originals")


def load_wrong_name(root: Path) -> None:
    write_bundle(root)
    ez.load(root / "bundel")


def load_the_name_that_was_meant(root: Path) -> None:
    """The test loaded the name that the message proposes; the rebuilt models hold the files' values."""
    assert_rebuilt(ez.load(root / "bundle"), root / "originals")


def replace_it_meanwhile(root: Path) -> None:
    write_bundle(root)
    space = ez.load(root / "bundle")
    write_stacks(root / "others", {"block.weight": random_stack(3, (7, 6), 5), "block.bias": random_stack(3, (5,), 6)})
    ez.fit(root / "others", rank=1.0).save(root / "bundle", force=True)
    space.rebuild("m0").save(root / "rebuilt")


def load_it_again(root: Path) -> None:
    """The test opened it again; the rebuilt models hold the values of the zoo that is in it now."""
    assert_rebuilt(ez.load(root / "bundle"), root / "others", ("m0", "m1", "m2"))


def take_a_bundle_as_base(root: Path) -> None:
    ez.open_zoo(root / "zoo", base=write_bundle(root))


def name_the_base(root: Path) -> None:
    """The test named a model's folder, and its file; the rebuilt models hold the files' values."""
    for base in (root / "originals" / "m3", root / "originals" / "m3" / "model.safetensors"):
        assert_rebuilt(ez.open_zoo(root / "zoo", base=base), root / "originals")


def project_a_model(root: Path) -> None:
    """The test named a model of that architecture; what is rebuilt of its coefficients holds the file's values."""
    space = ez.load(root / "bundle")
    assert_values(space.rebuild(space.project(root / "zoo" / "m2")).state_dict(), values(root / "originals" / "m2"))


def project_another_kind(root: Path) -> None:
    space = ez.load(write_bundle(root))
    write_stacks(root / "others", {"conv.weight": random_stack(1, (7, 6))})
    space.project(root / "others" / "m0")


def project_an_adapter(root: Path) -> None:
    space = ez.load(write_bundle(root))
    space.project(write_adapter(root / "a0", random_factors(SHAPES, 2, 0)))


def project_lacking(root: Path) -> None:
    for n in range(3):
        write_adapter(root / "zoo" / f"a{n}", random_factors(SHAPES, 2, n))
    few = {"block.q": SHAPES["block.q"]}
    write_adapter(root / "others" / "a3", random_factors(few, 2, 3))
    ez.fit(root / "zoo", rank=1.0).save(root / "bundle")
    ez.load(root / "bundle").project(root / "others" / "a3")


def fit_with_zeros(root: Path) -> None:
    """The test fitted it so; the bundle takes the adapter, and the models have the files' updates."""
    space = ez.fit(ez.open_zoo(root / "zoo", missing="zero"), rank=1.0)
    assert_updates(space, root / "zoo")
    found = space.rebuild(space.project(root / "others" / "a3")).layer("block.v")
    assert found.shape == SHAPES["block.v"]


def store() -> tuple[fsspec.AbstractFileSystem, str]:
    return fsspec.filesystem("memory"), "/advice-zoo"


def write_at_source(seed: int) -> list[bytes]:
    system, place = store()
    files = []
    for n in range(3):
        draw = torch.Generator().manual_seed(seed + n)
        tensors = {name: torch.randn(5, 4, generator=draw) for name in ("w", "head")}
        files.append(save(tensors, {"format": "pt"}))
        system.pipe_file(f"{place}/m{n}/model.safetensors", files[-1])
    return files


def rebuild_from_another_source(root: Path) -> None:
    write_at_source(0)
    ez.fit(ez.open_zoo("memory://advice-zoo", exclude=["head"]), rank=1.0).save(root / "bundle")
    write_at_source(10)
    ez.load(root / "bundle").rebuild("m0", fetch=True).save(root / "rebuilt")


def fit_again(root: Path) -> None:
    """The test did both; the rebuilt models hold the values that the store has now."""
    files = write_at_source(10)
    for place, choices in enumerate(({"exclude": ["head"]}, {})):
        ez.fit(ez.open_zoo("memory://advice-zoo", **choices), rank=1.0).save(root / f"bundle{place}")
        for n, data in enumerate(files):
            rebuilt = ez.load(root / f"bundle{place}").rebuild(f"m{n}", fetch=True).save(root / f"rebuilt{place}-{n}")
            assert_values(values(rebuilt), load(data))
    system, folder = store()
    system.rm(folder, recursive=True)


def save_over_another(root: Path) -> None:
    write_bundle(root)
    ez.fit(root / "zoo", rank=1).save(root / "bundle")


def choose_another_name_or_force(root: Path) -> None:
    """The test did both; each bundle is the new one, and the first is as it was until `force=True`."""
    space = ez.fit(root / "zoo", rank=1)
    new = (space.save(root / "another") / "basis.safetensors").read_bytes()
    assert (root / "bundle" / "basis.safetensors").read_bytes() != new
    assert (space.save(root / "bundle", force=True) / "basis.safetensors").read_bytes() == new


def save_over_a_stranger(root: Path) -> None:
    (write_bundle(root) / "notes.txt").write_text("mine")
    ez.fit(root / "zoo", rank=1.0).save(root / "bundle", force=True)


def move_it_away(root: Path) -> None:
    """The test did both; the new bundle's models hold the files' values, and the file of another kind is where it was moved."""
    space = ez.fit(root / "zoo", rank=1.0)
    assert_rebuilt(ez.load(space.save(root / "another")), root / "originals")
    (root / "bundle").rename(root / "moved")
    assert_rebuilt(ez.load(space.save(root / "bundle", force=True)), root / "originals")
    assert (root / "moved" / "notes.txt").read_text() == "mine"


def report_into_a_link(root: Path) -> None:
    write_models(root)
    (root / "report.md").symlink_to(root / "elsewhere")
    run("report", root / "zoo", "-o", root / "report.md")


def choose_another_name(root: Path) -> None:
    """The test chose another name; the page is there, and nothing was written through the link."""
    run("report", root / "zoo", "-o", root / "page.md")
    assert (root / "page.md").read_text().startswith("# ")
    assert not (root / "elsewhere").exists()


def verify_a_checkpoint(root: Path) -> None:
    write_models(root)
    ez.verify_adapter(root / "zoo" / "m0")


def verify_an_adapter(root: Path) -> None:
    """The test named an adapter and a bundle; nothing is wrong with either."""
    write_adapter(root / "a0", random_factors(SHAPES, 2, 0))
    assert not ez.verify_adapter(root / "a0").faults
    assert list(ez.load(ez.fit(root / "zoo", rank=1.0).save(root / "bundle")).verify()) == []


CASES = [
    Case(
        "A bundle without one of its files",
        load_part_of_it,
        ("is missing", "opy the whole bundle again"),
        copy_it_again,
    ),
    Case(
        "A bundle with a changed file",
        load_changed,
        ("does not match the hash in its name", "opy the whole bundle again"),
        copy_it_again,
    ),
    Case(
        "A quantised bundle whose scales are damaged",
        load_damaged_scales,
        ("scales are negative, NaN or Inf", "opy the whole bundle again"),
        copy_the_quantised_one_again,
    ),
    Case(
        "Coefficients that are too large for float16",
        fit_large_coefficients,
        ("he largest number in float16", "tore coefficients in bfloat16"),
        fit_in_bfloat16,
    ),
    Case("A zoo where a bundle is expected", load_a_zoo, ("eigenzoo fit ZOO -o BUNDLE",), fit_it),
    Case(
        "A bundle's name that is not there", load_wrong_name, ("id you mean '…/bundle'?",), load_the_name_that_was_meant
    ),
    Case("A bundle that is replaced while it is open", replace_it_meanwhile, ("pen it again",), load_it_again),
    Case(
        "A bundle where a model is asked for",
        take_a_bundle_as_base,
        ("ame the folder or file of a model",),
        name_the_base,
    ),
    Case(
        "A model of another architecture than the bundle's",
        project_another_kind,
        ("has none of the bundle's layers", "ame a model of the bundle's architecture"),
        project_a_model,
    ),
    Case(
        "An adapter where a bundle has full weights",
        project_an_adapter,
        ("these are LoRA adapters", "ame full weights of its zoo's base"),
        project_a_model,
    ),
    Case(
        "An adapter that lacks modules of a bundle",
        project_lacking,
        ("a3 has no such layer", "it the subspace with --missing zero"),
        fit_with_zeros,
    ),
    Case(
        "A model in a store that is not the one that was fitted",
        rebuild_from_another_source,
        ("not the one that was fitted", "without --include and --exclude"),
        fit_again,
    ),
    Case(
        "An output that exists already",
        save_over_another,
        ("exists already", "or --force (force=True) to replace it"),
        choose_another_name_or_force,
    ),
    Case(
        "An output folder with other files in it",
        save_over_a_stranger,
        ("notes.txt", "hoose another name, or move it away"),
        move_it_away,
    ),
    Case(
        "An output file that is a link",
        report_into_a_link,
        ("is not a regular file", "hoose another name"),
        choose_another_name,
    ),
    Case(
        "What is verified is not an adapter",
        verify_a_checkpoint,
        ("is not an adapter", "ame a bundle, or"),
        verify_an_adapter,
    ),
]
