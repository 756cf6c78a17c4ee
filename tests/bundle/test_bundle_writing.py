"""How a bundle's files are written: known files in few calls, and the basis hashed once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from bundle_files import FORMS, fit_form, read_manifest, write_zoo
from safetensors.torch import save

import eigenzoo as ez
from eigenzoo.formats.bundle import folder as bundle_folder
from eigenzoo.formats.layout import TensorLayout
from eigenzoo.formats.writers import write_tensors
from eigenzoo.subspace.bundles import storage


@pytest.mark.parametrize("form", FORMS)
def test_the_basis_is_hashed_as_it_is_written_and_never_read_again_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    hashed: list[str] = []

    def spied(path: Path) -> str:
        hashed.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    for module in (bundle_folder, storage):
        monkeypatch.setattr(module, "file_sha256", spied)
    bundle = fit_form(write_zoo(tmp_path / "zoo", form), form).save(tmp_path / "bundle")
    assert hashed
    assert "basis.safetensors" not in hashed
    manifest = read_manifest(bundle)
    found = hashlib.sha256((bundle / "basis.safetensors").read_bytes()).hexdigest()
    assert manifest["files"]["basis.safetensors"]["sha256"] == found
    assert manifest["basis_id"] == hashlib.sha256(found.encode()).hexdigest()
    assert ez.load(bundle).verify().ok


def test_a_file_of_many_small_tensors_takes_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{place:03d}": torch.randn(20, generator=torch.Generator().manual_seed(place)) for place in range(200)}
    calls: list[int] = []
    write = os.pwrite

    def counted(descriptor: int, data: memoryview, position: int) -> int:
        calls.append(len(data))
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", counted)
    layout = [TensorLayout(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    path = tmp_path / "x.safetensors"
    write_tensors(path, layout, tensors.__getitem__, {"format": "pt"})
    assert calls == [path.stat().st_size]
    assert path.read_bytes() == save(tensors, {"format": "pt"})


@pytest.mark.parametrize("large", [0, 1, 2])
def test_tensors_larger_than_what_is_gathered_stand_where_the_library_puts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr("eigenzoo.formats.safetensors.writer.GATHERED_BYTES", 1000)
    sizes = [60, 70, 80]
    sizes[large] = 100_000
    tensors = {f"t{place}": torch.arange(size, dtype=torch.float32) for place, size in enumerate(sizes)}
    layout = [TensorLayout(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    write_tensors(tmp_path / "x.safetensors", layout, tensors.__getitem__, {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == save(tensors, {"format": "pt"})
