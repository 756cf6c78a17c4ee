"""`verify` finds every kind of damage, whoever did it."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_files import edit_manifest, edit_tensors, read_manifest, replace_file, write_bundle

import eigenzoo as ez
from eigenzoo.formats.bundle.basis_files import BasisFiles
from eigenzoo.formats.bundle.folder import open_basis
from eigenzoo.subspace.bases import basis
from eigenzoo.subspace.bundles import saving


def faults(bundle: Path) -> list[str]:
    """What verify says; a bundle that cannot be opened says it at once."""
    try:
        return list(ez.load(bundle).verify())
    except ez.EigenzooError as error:
        return [str(error)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {form: write_bundle(tmp_path_factory.mktemp(form), form) for form in ("flat", "tucker", "stacked")}


@pytest.fixture(params=["flat", "tucker", "stacked"])
def bundle(request: pytest.FixtureRequest, sound: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound[request.param], tmp_path / "bundle"))


@pytest.fixture
def flat(sound: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound["flat"], tmp_path / "flat"))


def test_a_sound_bundle_has_no_fault_and_the_card_may_be_edited(bundle: Path) -> None:
    assert faults(bundle) == []
    (bundle / "README.md").write_text("mine")
    assert faults(bundle) == []


def test_a_flipped_byte_is_found_in_every_file(bundle: Path) -> None:
    for name in read_manifest(bundle)["files"]:
        for place in (-1, 12):  # in the values, and in the header
            path = bundle / name
            data = bytearray(path.read_bytes())
            data[place] ^= 0x10
            path.write_bytes(bytes(data))
            found = faults(bundle)
            # A header may also name another tensor now: then the basis is refused before its checksum is looked at.
            assert found, (name, place)
            assert place > 0 or any(Path(name).name in fault for fault in found), (name, place)
            data[place] ^= 0x10
            path.write_bytes(bytes(data))
    assert faults(bundle) == []


def test_a_missing_file_is_found(bundle: Path) -> None:
    for name in read_manifest(bundle)["files"]:
        (bundle / name).rename(bundle.parent / "away")
        # The moments are optional: without them a bundle is whole.
        if name == "moments.safetensors":
            assert faults(bundle) == []
        else:
            assert any("is missing" in fault and name in fault for fault in faults(bundle)), name
        (bundle.parent / "away").rename(bundle / name)
    assert faults(bundle) == []


def test_a_file_that_is_gone_from_the_manifest_too_is_found(bundle: Path) -> None:
    for name in read_manifest(bundle)["files"]:
        if name.startswith(("rest/", "coefficients/")):
            copy = Path(shutil.copytree(bundle, bundle.parent / "copy"))
            (copy / name).unlink()
            edit_manifest(copy, lambda document, name=name: document["files"].pop(name))
            assert any(name in fault for fault in faults(copy)), name
            shutil.rmtree(copy)


def test_extra_files_are_found(flat: Path) -> None:
    (flat / "rest" / "evil.sh").write_text("echo")
    (flat / "link").symlink_to("/etc/hostname")
    (flat / "folder").symlink_to(flat.parent)
    os.mkfifo(flat / "pipe")
    found = faults(flat)
    for name in ("rest/evil.sh", "link", "folder", "pipe"):
        assert f"{name}: the manifest does not list it" in found
    assert len(found) == 4


def test_a_shortened_or_lengthened_file_is_found(flat: Path) -> None:
    for name in ("basis.safetensors", "coefficients/m0.safetensors"):
        data = (flat / name).read_bytes()
        for changed in (data[:-4], data + b"\0\0\0\0", b"", data[:4]):
            (flat / name).write_bytes(changed)
            assert any(Path(name).name in fault for fault in faults(flat)), (name, len(changed))
        (flat / name).write_bytes(data)


def test_a_basis_that_is_not_orthonormal_is_found(bundle: Path) -> None:
    part = {"flat": "models", "tucker": "outputs", "stacked": "weights"}[read_manifest(bundle)["layers"][0]["form"]]
    layer = read_manifest(bundle)["layers"][-1]["name"] if part == "weights" else "block.weight"
    edit_tensors(bundle, "basis.safetensors", lambda tensors: tensors[f"{layer}/{part}"].mul_(1.001))
    assert [fault for fault in faults(bundle) if f"layer {layer}: the basis deviates from orthonormality" in fault]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(bundle: Path, value: float) -> None:
    copy = Path(shutil.copytree(bundle, bundle.parent / "copy"))
    edit_tensors(copy, "coefficients/m1.safetensors", lambda tensors: tensors["coefficients"].view(-1)[:1].fill_(value))
    assert "model m1: coefficients are NaN or Inf" in faults(copy)
    with pytest.raises(ez.DataError, match="coefficients are NaN or Inf"):
        ez.load(copy).rebuild("m1")
    key = {"flat": "block.weight/mean", "tucker": "block.weight/mean", "stacked": "block.q/factors_a"}
    tensor = key[read_manifest(bundle)["layers"][0]["form"]]
    edit_tensors(bundle, "basis.safetensors", lambda tensors: tensors[tensor].view(-1)[:1].fill_(value))
    assert f"basis tensor {tensor}: NaN or Inf" in faults(bundle)


def test_coefficients_of_another_basis_are_found(flat: Path) -> None:
    other = "0" * 64
    edit_tensors(flat, "coefficients/m1.safetensors", lambda tensors: None, basis=other)
    assert any("m1.safetensors: belongs to another basis" in fault for fault in faults(flat))
    with pytest.raises(ez.BundleError, match="belongs to another basis"):
        ez.load(flat).rebuild("m1")
    assert ez.load(flat).rebuild("m0").layer("block.bias").shape == (5,)


def test_exchanged_coefficients_are_found(flat: Path) -> None:
    first, second = ((flat / f"coefficients/m{place}.safetensors").read_bytes() for place in (0, 1))
    replace_file(flat, "coefficients/m0.safetensors", second)
    replace_file(flat, "coefficients/m1.safetensors", first)
    found = faults(flat)
    assert "coefficients/m0.safetensors: belongs to model 'm1', not 'm0'" in found
    assert "coefficients/m1.safetensors: belongs to model 'm0', not 'm1'" in found


def test_coefficients_of_the_wrong_length_are_found(bundle: Path) -> None:
    def longer(tensors: dict[str, torch.Tensor]) -> None:
        tensors["coefficients"] = torch.cat([tensors["coefficients"], torch.zeros(1)])

    edit_tensors(bundle, "coefficients/m2.safetensors", longer)
    assert any("m2.safetensors: holds" in fault for fault in faults(bundle))
    with pytest.raises(ez.BundleError, match="The layers of this bundle need tensors"):
        ez.load(bundle).coefficients("m2")


def test_a_side_file_whose_name_is_not_its_content_is_found(flat: Path) -> None:
    name = next(name for name in read_manifest(flat)["files"] if name.endswith(".bin"))
    replace_file(flat, name, b'{"model_type": "other"}')
    assert f"{name}: the name is not the hash of the content" in faults(flat)


def test_a_basis_of_other_shapes_is_refused(bundle: Path) -> None:
    def wider(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("models", "weights")):
                tensors[name] = torch.cat([tensor, tensor])

    edit_tensors(bundle, "basis.safetensors", wider)
    with pytest.raises(ez.BundleError, match="The manifest says"):
        ez.load(bundle)


def test_basis_tensors_are_looked_through_in_blocks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads read as there are cores: whole bases of large layers side by side would fill the memory."""
    monkeypatch.setattr(basis, "BLOCK_BYTES", 8 * 7)
    read, runs = BasisFiles.read_flat, []

    def read_run(files: BasisFiles, name: str, start: int, stop: int, *given: Any) -> torch.Tensor:
        runs.append((start, stop))
        values = read(files, name, start, stop, *given)
        return torch.where(torch.arange(start, stop) == spoilt, torch.nan, values)

    monkeypatch.setattr(BasisFiles, "read_flat", read_run)
    files = open_basis(bundle)
    for name in files.names:
        num_values = prod(files.shape(name))
        for spoilt, finite in ((-1, True), (0, False), (num_values - 1, False)):
            runs.clear()
            assert basis.is_finite(files, name) is finite
            assert all(stop - start <= 7 for start, stop in runs)
            if spoilt:
                assert [place for run in runs for place in range(*run)] == list(range(num_values))


def test_checksums_of_a_zoo_are_taken_on_as_many_threads_as_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may have fewer cores than its machine."""
    threads: list[int | None] = []

    def pool(num: int | None = None) -> ThreadPoolExecutor:
        threads.append(num)
        return ThreadPoolExecutor(num)

    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3})
    monkeypatch.setattr(saving, "ThreadPoolExecutor", pool)
    write_bundle(tmp_path, "flat")
    assert threads == [1]
