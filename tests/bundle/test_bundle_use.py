"""Bundles where a user puts them, and what becomes of files that were mixed up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import eigenzoo as ez
from eigenzoo.formats.checkpoint import Checkpoint


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    for number in range(4):
        home = tmp_path / "zoo" / f"m{number}"
        home.mkdir(parents=True)
        save_file({"w": torch.randn(6, 5, generator=draw), "n": torch.tensor(number)}, home / "model.safetensors")
        (home / "config.json").write_text('{"model_type": "none"}')
    return tmp_path / "zoo"


def test_a_bundle_inside_its_zoo_is_not_taken_for_models(zoo: Path) -> None:
    ez.fit(zoo, rank=2).save(zoo / "bundle")
    assert ez.open_zoo(zoo).names == ("m0", "m1", "m2", "m3")


def test_a_bundle_in_the_place_of_a_zoo_is_named_as_what_it_is(zoo: Path, tmp_path: Path) -> None:
    ez.fit(zoo, rank=2).save(tmp_path / "bundle")
    with pytest.raises(ez.ZooError, match="is a bundle, not a zoo or a model"):
        ez.open_zoo(tmp_path / "bundle")


def test_coefficients_of_another_model_are_not_rebuilt_under_this_name(zoo: Path, tmp_path: Path) -> None:
    ez.fit(zoo, rank=2).save(tmp_path / "bundle")
    folder = tmp_path / "bundle" / "coefficients"
    shutil.copyfile(folder / "m1.safetensors", folder / "m0.safetensors")
    with pytest.raises(ez.BundleError, match="holds the coefficients of 'm1'"):
        ez.load(tmp_path / "bundle").rebuild("m0")


def test_contents_that_were_edited_are_not_written_out(zoo: Path, tmp_path: Path) -> None:
    ez.fit(zoo, rank=2).save(tmp_path / "bundle")
    (side_file,) = (tmp_path / "bundle" / "rest").glob("*.bin")
    side_file.write_text('{"model_type": "other"}')
    with pytest.raises(ez.BundleError, match="the content does not match the hash in its name"):
        ez.load(tmp_path / "bundle").rebuild("m0").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_its_moments_still_projects_rebuilds_and_grows(zoo: Path, tmp_path: Path) -> None:
    ez.fit(ez.open_zoo(zoo).select(names=["m0", "m1", "m2"]), rank=2).save(tmp_path / "bundle")
    (tmp_path / "bundle" / "moments.safetensors").unlink()
    space = ez.load(tmp_path / "bundle")
    assert list(space.verify()) == []
    assert space.rebuild("m0").layer("w").shape == (6, 5)
    grown = space.add(zoo / "m3")
    assert grown.names == ("m0", "m1", "m2", "m3")
    assert not grown.has_moments


def test_project_refuses_several_models_before_it_reads_them(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = ez.fit(zoo, rank=2)
    read: list[str] = []
    own = Checkpoint.read_flat

    def read_flat(model: Checkpoint, name: str, *args: Any, **options: Any) -> Any:
        read.append(name)
        return own(model, name, *args, **options)

    monkeypatch.setattr(Checkpoint, "read_flat", read_flat)
    with pytest.raises(ez.UsageError, match=r"2 models are named\. Project takes one\. Use project_many"):
        space.project([zoo / "m0", zoo / "m1"])
    assert read == []
    assert space.project(zoo / "m0").name == "m0"
    assert read, "what the test looks at is how models are read"


def test_a_linked_model_keeps_the_name_of_its_link(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "mine").symlink_to(zoo / "m2")
    assert ez.open_zoo(tmp_path / "links").names == ("mine",)


def test_a_model_whose_coefficients_are_damaged_is_not_rebuilt(zoo: Path, tmp_path: Path) -> None:
    ez.fit(zoo, rank=2).save(tmp_path / "bundle")
    file = tmp_path / "bundle" / "coefficients" / "m0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    space = ez.load(tmp_path / "bundle")
    with pytest.raises(ez.BundleError, match=r"m0\.safetensors: the checksum differs.*Run verify"):
        space.rebuild("m0")
    assert space.rebuild("m1").name == "m1"


def test_a_mistyped_bundle_is_told_from_a_folder_of_another_kind(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ez.fit(zoo, rank=2).save(zoo.parent / "bundles" / "mine")
    monkeypatch.chdir(zoo.parent)
    for mistyped in (Path("bundles/mnie"), Path("bundels/mine"), "./bundles/mine2"):
        with pytest.raises(ez.BundleError, match=r"there is no such folder.*Did you mean 'bundles/mine'\?"):
            ez.load(mistyped)
    with pytest.raises(ez.BundleError, match=r"^bundels: there is no such folder.*Did you mean 'bundles'\?"):
        ez.load("bundels")
    with pytest.raises(ez.BundleError, match=r"^/nowhere/at/all: there is no such folder[^?]*$"):
        ez.load("/nowhere/at/all")
    with pytest.raises(ez.BundleError, match=r"^zoo: there is no manifest\.json"):
        ez.load("zoo")
