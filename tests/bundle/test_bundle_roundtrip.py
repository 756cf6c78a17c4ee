"""Save → load gives the same bits, and the bundle counts its own bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from bundle_files import FORMS, fit_form, read_manifest, write_bundle, write_zoo

import eigenzoo as ez
from builders import random_stack, write_model

NAMES = [
    "a/b",
    "..",
    ".",
    "...",
    "späß 模型 🦙",
    "x" * 230,
    "y" * 230 + "1",
    "y" * 230 + "2",
    "%2E",
    "a b%20c",
    "con",
    "-o",
    "C:\\x",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moments", [True, False])
def test_save_and_load_give_the_same_bits(tmp_path: Path, form: str, moments: bool) -> None:
    fitted = fit_form(write_zoo(tmp_path / "zoo", form), form)
    fitted.save(tmp_path / "first", moments=moments)
    loaded = ez.load(tmp_path / "first")
    loaded.save(tmp_path / "second")
    again = ez.load(tmp_path / "second")
    assert {basis.form for basis in again.layers.values()} == {form}
    assert again.names == fitted.names
    assert again.has_moments is moments
    for name in fitted.names:
        first, second = fitted.coefficients(name), again.coefficients(name)
        assert first.residuals == second.residuals
        for layer, basis in fitted.layers.items():
            assert torch.equal(first.values[layer], second.values[layer])
            assert torch.equal(fitted.rebuild(name).layer(layer), again.rebuild(name).layer(layer))
            assert again.layers[layer].ranks == basis.ranks
            if moments:
                assert torch.equal(fitted.moments(layer).gram_NN, again.moments(layer).gram_NN)
        folders = [
            space.rebuild(name).save(tmp_path / f"{number}-{name}") for number, space in enumerate((fitted, again))
        ]
        files = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        assert files[0] == files[1]
        assert len(files[0]) >= 2
        assert all((folders[0] / file).read_bytes() == (folders[1] / file).read_bytes() for file in files[0])
    for file in loaded.files():
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert list(again.verify()) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_bundle_counts_its_own_bytes(tmp_path: Path, form: str) -> None:
    fitted = fit_form(write_zoo(tmp_path / "zoo", form), form)
    for moments in (True, False):
        bundle = fitted.save(tmp_path / f"bundle{moments}", moments=moments)
        sizes = {
            path.relative_to(bundle).as_posix(): path.stat().st_size for path in bundle.rglob("*") if path.is_file()
        }
        assert ("moments.safetensors" in sizes) is moments
        counted = ez.load(bundle).report["bytes"]
        assert counted["moments"] == sizes.pop("moments.safetensors", 0)
        assert counted["whole_bundle"] == sum(sizes.values())
        assert counted["bundle"] == sum(
            size for name, size in sizes.items() if name.startswith(("basis", "coefficients/"))
        )
        assert set(read_manifest(bundle)["files"]) >= set(sizes) - {"manifest.json", "README.md"}


def test_without_moments_the_bundle_says_what_it_lacks(tmp_path: Path) -> None:
    fit_form(write_zoo(tmp_path / "zoo", "flat"), "flat").save(tmp_path / "bundle", moments=False)
    space = ez.load(tmp_path / "bundle")
    with pytest.raises(ez.BundleError, match="the bundle has no moments"):
        space.moments("block.weight")
    assert 0 < space.coefficients("m0").residual < 1


def test_every_name_survives(tmp_path: Path) -> None:
    """Names come from folders and from whoever renames a zoo; none may collide, climb or be lost."""
    stack = random_stack(len(NAMES), (4, 3), 0).float()
    paths = [write_model(tmp_path / "zoo" / f"m{place}", {"w": layer}) for place, layer in enumerate(stack)]
    bundle = ez.fit(ez.open_zoo(paths).renamed(NAMES), 1.0).save(tmp_path / "bundle")
    space = ez.load(bundle)
    assert list(space.names) == NAMES
    assert list(space.verify()) == []
    files = os.listdir(bundle / "coefficients")
    assert len({file.lower() for file in files}) == len(NAMES)
    assert all(len(file) < 200 and file.isascii() for file in files)
    for name, layer in zip(NAMES, stack, strict=True):
        assert torch.allclose(space.rebuild(name).layer("w"), layer.double(), atol=1e-5)


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    space = ez.load(bundle)
    with pytest.raises(ez.OutputError, match="exists already"):
        space.save(bundle)
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "today.txt").write_text("dear diary")
    with pytest.raises(ez.OutputError, match="is a folder of another kind"):
        space.save(tmp_path / "diary", force=True)
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(ez.OutputError, match=r"holds 'notes.txt', which eigenzoo did not write"):
        space.save(bundle, force=True)
    (bundle / "notes.txt").unlink()
    space.save(bundle, force=True)
    assert list(ez.load(bundle).verify()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ez.OutputError, match="cannot be created"):
        space.save(tmp_path / "file" / "bundle")
    assert sorted(os.listdir(tmp_path)) == ["bundle", "diary", "file", "zoo"]
