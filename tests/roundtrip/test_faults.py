"""Faulty zoos are refused by name before anything is left on disk, and outputs appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eigenzoo as ez
from builders import edit_model, random_factors, random_stack, write_adapter, write_model, write_stacks

SHAPES = {"block.0.weight": (6, 5), "block.1.weight": (6, 5), "norm.bias": (6,)}
MODULES = {"layers.0.q_proj": (8, 6), "layers.1.q_proj": (8, 6)}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    write_stacks(
        tmp_path / "zoo", {name: random_stack(4, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    )
    return tmp_path / "zoo"


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    for seed, rank in enumerate((2, 3, 2)):
        write_adapter(tmp_path / "zoo" / f"a{seed}", random_factors(MODULES, rank, seed), lora_alpha=4)
    return tmp_path / "zoo"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axes", [("models",), ("outputs", "inputs")], ids="+".join)
def test_a_value_that_is_not_finite_is_named(zoo: Path, value: float, axes: tuple[str, ...]) -> None:
    bad = torch.zeros(6, 5)
    bad[2, 3] = bad[5, 4] = value
    edit_model(zoo / "m2", block__1__weight=bad)
    with pytest.raises(
        ez.DataError, match=r"layer 'block\.1\.weight' of m2: 2 values are NaN or Inf.*--exclude the layer"
    ):
        ez.fit(zoo, rank=1, axes=axes)
    carried = ez.fit(ez.open_zoo(zoo, exclude=["block.1.weight"]), rank=1.0, axes=axes)
    assert torch.equal(
        carried.rebuild("m2").state_dict()["block.1.weight"].nan_to_num(7, 8, 9), bad.nan_to_num(7, 8, 9)
    )


@pytest.mark.parametrize("axes", [("models",), ("outputs", "inputs")], ids="+".join)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_not_finite_is_named(adapters: Path, factor: str, axes: tuple[str, ...]) -> None:
    key = f"base_model.model.layers.1.q_proj.lora_{factor}.weight"
    bad = load_file(adapters / "a1" / "adapter_model.safetensors")[key]
    bad[0, 0] = float("nan")
    edit_model(adapters / "a1", "adapter_model.safetensors", **{key: bad})
    with pytest.raises(ez.DataError, match=r"layer 'layers\.1\.q_proj' of a1: 1 values are NaN or Inf"):
        ez.fit(adapters, rank=1, axes=axes)


def test_values_whose_sum_overflows_are_fine(tmp_path: Path) -> None:
    """Finite one by one: a check by sums alone would refuse them."""
    stack = random_stack(3, (6, 5))
    stack[1] *= 1e37
    write_stacks(tmp_path / "zoo", {"a.weight": stack})
    space = ez.fit(tmp_path / "zoo", rank=1.0)
    found = space.rebuild("m1").layer("a.weight")
    assert (found - stack[1]).norm() <= 1e-5 * stack[1].norm()


def test_an_unseen_model_with_nan_is_named(zoo: Path, tmp_path: Path) -> None:
    space = ez.fit(zoo, rank=1)
    shutil.copytree(zoo / "m0", tmp_path / "unseen")
    edit_model(tmp_path / "unseen", norm__bias=torch.full((6,), float("nan")))
    with pytest.raises(ez.DataError, match=r"layer 'norm\.bias' of unseen: 6 values are NaN or Inf"):
        space.project(tmp_path / "unseen")


def test_a_missing_layer_is_named(zoo: Path) -> None:
    edit_model(zoo / "m1", block__1__weight=None)
    rule = r"layer 'block\.1\.weight': m1 has no such layer, but m0 has it \(1 model lacks it\).*allow-missing"
    with pytest.raises(ez.MismatchError, match=rule):
        ez.fit(zoo, rank=1)


def test_another_shape_is_named(zoo: Path) -> None:
    edit_model(zoo / "m3", block__0__weight=torch.zeros(5, 6))
    rule = r"layer 'block\.0\.weight': shape \[5, 6\] in m3 but \[6, 5\] in m0.*must have the same shape in all models"
    with pytest.raises(ez.MismatchError, match=rule):
        ez.fit(zoo, rank=1)


def test_every_layer_that_differs_is_named_at_once(zoo: Path) -> None:
    edit_model(zoo / "m3", block__0__weight=torch.zeros(5, 6), norm__bias=None)
    with pytest.raises(
        ez.MismatchError, match=r"layer 'block\.0\.weight': shape.*Also: layer 'norm\.bias' \(m3 has no such layer"
    ):
        ez.fit(zoo, rank=1)


def test_task_heads_of_other_shapes_are_carried(zoo: Path, tmp_path: Path) -> None:
    heads = [torch.randn(3 + number % 2, 6) for number in range(4)]
    for number, head in enumerate(heads):
        edit_model(zoo / f"m{number}", classifier__weight=head)
    space = ez.load(ez.fit(zoo, rank=1).save(tmp_path / "bundle"))
    assert "classifier.weight" not in space.layers
    (left_out,) = space.report["left_out"]
    assert left_out["tensor"] == "classifier.weight"
    assert left_out["num_models"] == 4
    assert left_out["reason"] == "shape [4, 6] in m1 but [3, 6] in m0"
    for number, head in enumerate(heads):
        rebuilt = load_file(space.rebuild(f"m{number}").save(tmp_path / f"out{number}") / "model.safetensors")
        assert torch.equal(rebuilt["classifier.weight"], head)


def test_a_head_that_some_models_lack_is_an_error(zoo: Path) -> None:
    edit_model(zoo / "m0", classifier__weight=torch.randn(3, 6))
    with pytest.raises(
        ez.MismatchError, match=r"layer 'classifier\.weight': m1 has no such layer, but m0 has it \(3 models lack it\)"
    ):
        ez.fit(zoo, rank=1)


def test_a_truncated_file_is_named(zoo: Path) -> None:
    file = zoo / "m2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ez.FormatError, match=r"m2.*model\.safetensors.*the safetensors library refuses it"):
        ez.fit(zoo, rank=1)


def test_a_file_that_shrinks_after_it_was_opened_is_named(zoo: Path) -> None:
    opened = ez.open_zoo(zoo)
    file = zoo / "m2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ez.FormatError, match=r"m2.*the file changed since its header was read.*Open the zoo again"):
        ez.fit(opened, rank=1)


def test_one_model_by_two_paths_is_refused(zoo: Path) -> None:
    with pytest.raises(
        ez.ZooError, match=r"the name 'm0' is used by more than one model\. Names of models must be unique"
    ):
        ez.open_zoo([zoo / "m0", zoo / "m1", zoo / "m1" / ".." / "m0"])


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for number in range(2):
        write_model(tmp_path / "zoo" / f"run{number}" / "last", {"a.weight": torch.randn(4, 3)})
    space = ez.load(ez.fit(tmp_path / "zoo", rank=1.0).save(tmp_path / "bundle"))
    assert space.names == ("run0/last", "run1/last")
    before = load_file(tmp_path / "zoo" / "run1" / "last" / "model.safetensors")["a.weight"]
    rebuilt = load_file(space.rebuild("run1/last").save(tmp_path / "out") / "model.safetensors")["a.weight"]
    torch.testing.assert_close(rebuilt, before, rtol=1e-6, atol=1e-6)


def test_allow_missing_counts_what_it_leaves_out(zoo: Path, tmp_path: Path) -> None:
    edit_model(zoo / "m1", block__1__weight=None)
    file = zoo / "m2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (zoo / "m9").mkdir()
    (zoo / "m9" / "adapter_config.json").write_text("{}")
    opened = ez.open_zoo(zoo, allow_missing=True)
    assert opened.names == ("m0", "m1", "m3")
    assert [model.path for model in opened.skipped] == ["m2", "m9"]
    assert "the safetensors library refuses it" in opened.skipped[0].reason
    space = ez.load(ez.fit(opened, rank=1.0).save(tmp_path / "bundle"))
    assert set(space.layers) == {"block.0.weight", "norm.bias"}
    assert [model["path"] for model in space.report["skipped"]] == ["m2", "m9"]
    (left_out,) = space.report["left_out"]
    assert (left_out["tensor"], left_out["num_models"]) == ("block.1.weight", 2)
    assert "m1 has no such layer" in left_out["reason"]
    # What was left out is carried where it was, and only there.
    carried = load_file(zoo / "m3" / "model.safetensors")["block.1.weight"]
    assert torch.equal(space.rebuild("m3").state_dict()["block.1.weight"], carried)
    assert set(space.rebuild("m1").state_dict()) == {"block.0.weight", "norm.bias"}


def test_adapters_and_checkpoints_are_no_zoo(zoo: Path) -> None:
    write_adapter(zoo / "adapter", random_factors(MODULES, 2, 0))
    with pytest.raises(ez.EigenzooError, match="adapter"):
        ez.fit(zoo, rank=1)


def test_coefficients_of_another_subspace_are_refused(zoo: Path) -> None:
    space, other = ez.fit(zoo, rank=1), ez.fit(ez.open_zoo(zoo, exclude=["norm*"]), rank=1)
    with pytest.raises(ez.UsageError, match="m0: the coefficients are of another subspace"):
        space.rebuild(other.coefficients("m0"))
    wider = ez.fit(zoo, rank=2)
    with pytest.raises(
        ez.UsageError, match=r"layer 'block\.0\.weight' of m0: coefficients of shape \[2\]\. This subspace has"
    ):
        space.rebuild(wider.coefficients("m0"))


def test_unseen_models_that_do_not_fit_are_named(zoo: Path, tmp_path: Path) -> None:
    space = ez.fit(zoo, rank=1)
    shutil.copytree(zoo / "m0", tmp_path / "short")
    edit_model(tmp_path / "short", block__0__weight=None)
    with pytest.raises(
        ez.MismatchError, match=r"layer 'block\.0\.weight': short has no such layer\. The subspace has it"
    ):
        space.project(tmp_path / "short")
    shutil.copytree(zoo / "m0", tmp_path / "other")
    edit_model(tmp_path / "other", block__0__weight=torch.zeros(7, 5))
    with pytest.raises(
        ez.MismatchError, match=r"layer 'block\.0\.weight': has shape \[7, 5\] in other.*The subspace has \[6, 5\]"
    ):
        space.project(tmp_path / "other")


def test_a_damaged_bundle_is_found_out(zoo: Path, tmp_path: Path) -> None:
    bundle = ez.fit(zoo, rank=1).save(tmp_path / "bundle")
    assert list(ez.load(bundle).verify()) == []
    basis = bundle / "basis.safetensors"
    data = bytearray(basis.read_bytes())
    data[-2] ^= 0x10
    basis.write_bytes(bytes(data))
    assert any("basis.safetensors" in fault for fault in ez.load(bundle).verify())
    (bundle / "coefficients" / "m1.safetensors").unlink()
    with pytest.raises(ez.BundleError, match=r"the file 'coefficients/m1\.safetensors' is missing"):
        ez.load(bundle)


def test_a_newer_bundle_is_refused_by_its_version(zoo: Path, tmp_path: Path) -> None:
    manifest = ez.fit(zoo, rank=1).save(tmp_path / "bundle") / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 3}))
    with pytest.raises(ez.BundleError, match=r"schema version 3.*reads schema versions up to 2.*pgrade eigenzoo"):
        ez.load(tmp_path / "bundle")
