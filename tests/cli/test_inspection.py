"""Inspect says what is in the files, by what this test put there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cli_runner import Run
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import edit_model, random_factors, random_stack, regauge, write_adapter, write_model, write_stacks

MODULES = {"block.q": (7, 6), "block.v": (5, 8)}


def test_models_and_roles_are_counted_from_the_files(tmp_path: Path) -> None:
    stacks = {
        "layers.0.w": random_stack(3, (8, 6), 0),
        "layers.1.w": random_stack(3, (8, 6), 1),
        "conv": random_stack(3, (4, 3, 2, 2), 2),
    }
    paths = write_stacks(tmp_path / "zoo", {**stacks, "steps": torch.arange(3)[:, None]})
    for place, path in enumerate(paths):
        tensors = load_file(path / "model.safetensors")
        tensors["layers.1.w"] = tensors["layers.1.w"].bfloat16()
        tensors["steps"] = torch.tensor([place])
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "notes.txt").write_text("mine")
    found = ez.inspect(ez.open_zoo(paths))
    assert (found.num_models, found.num_layers, found.view) == (3, 3, "weight")
    for model, path in zip(found.models, paths, strict=True):
        assert model.num_bytes == (path / "model.safetensors").stat().st_size
        assert model.num_values == 48 + 48 + 48 + 1
        assert set(model.dtypes) == {"float32", "bfloat16", "int64"}
        assert model.ignored_files == ("notes.txt",)
        assert model.ranks == ()
        assert model.num_non_finite == 0
    assert found.whole_bytes == sum(model.num_bytes for model in found.models)
    assert found.analysed_bytes == 3 * (48 * 4 + 48 * 2 + 48 * 4)
    assert sum(role.num_layers for role in found.roles) == 3
    assert sum(role.num_bytes for role in found.roles) == 48 * 4 + 48 * 2 + 48 * 4, (
        "bytes of one model, each layer once"
    )
    assert sum(role.num_values for role in found.roles) == 3 * 48
    assert {(role.shape, role.unfolding) for role in found.roles} == {((8, 6), "matrix"), ((4, 12), "kernel")}
    assert [(item.tensor, item.num_models) for item in found.left_out] == [("steps", 3)]
    assert "int64" in found.left_out[0].reason
    for source in (paths, tmp_path / "zoo", str(tmp_path / "zoo")):
        assert ez.inspect(source) == found


def test_duplicates_are_found_by_content_not_by_name_or_header(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(4, (5, 4), 0), "b": random_stack(4, (3,), 1)})
    tensors = load_file(paths[1] / "model.safetensors")
    write_model(tmp_path / "zoo" / "same", dict(reversed(tensors.items())), {"format": "pt", "note": "another header"})
    shutil.copytree(paths[1], tmp_path / "zoo" / "copy")
    write_model(tmp_path / "zoo" / "wider", {name: tensor.double() for name, tensor in tensors.items()})
    edit_model(
        Path(shutil.copytree(paths[2], tmp_path / "zoo" / "near")),
        b=load_file(paths[2] / "model.safetensors")["b"] + 1e-6,
    )
    found = ez.inspect(ez.open_zoo(tmp_path / "zoo"))
    assert [set(group) for group in found.duplicates] == [{"m1", "same", "copy"}]
    assert found.same_function == ()


def test_adapters_of_the_same_function_are_found_whatever_their_factors(tmp_path: Path) -> None:
    root = tmp_path / "zoo"
    factors = [random_factors(MODULES, 3, seed) for seed in range(3)]
    for seed in range(3):
        write_adapter(root / f"a{seed}", factors[seed])
    write_adapter(root / "turned", regauge(factors[0], 9))
    # Half of the factor, twice the scale.
    halved = {module: (b_OR / 2, a_RI) for module, (b_OR, a_RI) in factors[0].items()}
    write_adapter(root / "rescaled", halved, lora_alpha=6)
    padded = {m: (torch.cat([b, torch.zeros_like(b)], 1), torch.cat([a, a])) for m, (b, a) in factors[1].items()}
    write_adapter(root / "wider", padded, lora_alpha=6)
    nearly = {module: (b_OR * (1 + 1e-3), a_RI) for module, (b_OR, a_RI) in factors[2].items()}
    write_adapter(root / "nearly", nearly)
    only_one = {**factors[2], "block.v": random_factors(MODULES, 3, 77)["block.v"]}
    write_adapter(root / "half", only_one)
    found = ez.inspect(ez.open_zoo(root))
    assert {frozenset(group) for group in found.same_function} == {
        frozenset({"a0", "turned", "rescaled"}),
        frozenset({"a1", "wider"}),
    }
    assert found.duplicates == ()
    ranks = {model.name: model.ranks for model in found.models}
    assert ranks["a0"] == (3,)
    assert ranks["wider"] == (6,)
    assert {role.ranks for role in found.roles} == {(3, 6)}


def test_values_that_are_not_finite_are_counted_where_they_are(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(3, (5, 4), 0), "b": random_stack(3, (3,), 1)})
    edit_model(paths[1], b=torch.tensor([1.0, float("nan"), float("inf")]), w=torch.full((5, 4), float("-inf")))
    edit_model(paths[2], b=torch.tensor([0.0, 65504.0, float("nan")]).half())
    found = ez.inspect(ez.open_zoo(paths))
    assert [model.num_non_finite for model in found.models] == [0, 22, 1]
    assert [set(model.non_finite_in) for model in found.models] == [set(), {"w", "b"}, {"b"}]
    assert found.num_non_finite == 23


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64], ids=str
)
def test_values_that_are_not_finite_are_counted_in_every_dtype_that_has_them(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    values = torch.ones(4, 5)
    values[1, 2] = torch.nan
    for number in range(2):
        write_model(tmp_path / f"m{number}", {"w": torch.full((3, 3), 1.0 + number), "odd": values.to(dtype)})
    found = ez.inspect(ez.open_zoo(tmp_path))
    assert [(model.num_non_finite, model.non_finite_in) for model in found.models] == [(1, ("odd",))] * 2


def test_what_is_left_out_says_why(tmp_path: Path) -> None:
    stack = random_stack(4, (5, 4), 0).float()
    for place in range(4):
        extra = {"late": torch.ones(2)} if place == 3 else {}
        tensors = {
            "w": stack[place],
            "b": torch.ones(3),
            "mask": torch.ones(2, dtype=torch.bool),
            "odd": torch.ones(2 + place % 2),
        }
        write_model(tmp_path / "zoo" / f"m{place}", {**tensors, **extra})
    found = ez.inspect(ez.open_zoo(tmp_path / "zoo", exclude=["b"], allow_missing=True))
    reasons = {item.tensor: (item.reason, item.num_models) for item in found.left_out}
    assert reasons["b"] == ("excluded", 4)
    assert reasons["mask"] == ("not a floating weight (bool)", 4)
    assert "shape [3] in m1 but [2] in m0" in reasons["odd"][0]
    assert "m0 has no such layer, but m3 has it (3 models lack it)" in reasons["late"][0]
    assert reasons["late"][1] == 1
    assert found.num_layers == 1


def test_the_table_says_the_same_as_the_json(run: Run, tmp_path: Path) -> None:
    for place in range(15):
        write_adapter(tmp_path / "zoo" / f"a{place}", random_factors(MODULES, 1 + place % 2, place))
    document = run("inspect", tmp_path / "zoo", "--json").json
    text = run("inspect", tmp_path / "zoo").out
    assert document["num_models"] == 15
    assert document["view"] == "update"
    assert "15 models, 2 layers, view update" in text
    assert "… and 3 more models; --json lists all" in text
    assert len(document["models"]) == 15
    assert any("1, 2" in line for line in text.splitlines() if "block" in line or "7 × 6" in line)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_odd_dtypes_are_named(tmp_path: Path, dtype: torch.dtype) -> None:
    stack = random_stack(3, (5, 4), 0).float()
    for place in range(3):
        write_model(tmp_path / "zoo" / f"m{place}", {"w": stack[place], "x": stack[place].to(dtype)})
    found = ez.inspect(ez.open_zoo(tmp_path / "zoo"))
    name = str(dtype).removeprefix("torch.")
    assert set(found.models[0].dtypes) == {"float32", name}
    eight_bit = dtype.itemsize == 1
    assert [item.tensor for item in found.left_out] == (["x"] if eight_bit else [])
