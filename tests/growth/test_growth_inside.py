"""What a bundle alone knows of models that came to it later: moments from coefficients, copies, checksums that stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from growth_zoos import delete, saved, write
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from eigenzoo.formats.bundle.folder import MOMENTS
from tolerance import tolerance

FLOAT32 = tolerance(64, dtype=torch.float32)


def alone(root: Path, *, num: int | float = 3) -> tuple[ez.Subspace, ez.Subspace, list[Path]]:
    """Five models fitted and deleted, three more added; and where these three lie."""
    paths = write(root / "zoo", "weight")
    old = saved(ez.fit(paths[:5], num), root / "old")
    delete(paths[:5])
    return old, saved(old.add(paths[5:]), root / "grown"), paths[5:]


def test_the_border_is_that_of_coefficients_and_energies(tmp_path: Path) -> None:
    old, grown, paths = alone(tmp_path)
    new = ez.open_zoo(paths)
    assert (grown.path / MOMENTS).read_bytes() == (old.path / MOMENTS).read_bytes()
    for layer in grown.layers:
        before, after = old.moments(layer), grown.moments(layer)
        assert after.num_models == 8
        assert torch.equal(after.gram_NN[:5, :5], before.gram_NN)
        rows_NK = torch.stack([grown.coefficients(name).values[layer] for name in grown.names]).double()
        size = float(after.gram_NN.diagonal().max())
        inside_NN = rows_NK @ rows_NK.T
        off_diagonal = ~torch.eye(8, dtype=torch.bool)
        off_diagonal[:5, :5] = False
        assert torch.allclose(after.gram_NN[off_diagonal], inside_NN[off_diagonal], atol=FLOAT32 * size)
        matrices = [new.stack(layer).matrix(place).double() for place in range(3)]
        energies = torch.stack([matrix.square().sum() for matrix in matrices])
        assert torch.allclose(after.energies_N[5:], energies, rtol=FLOAT32)
        about_mean = torch.stack([(matrix - old.layers[layer].removed()).square().sum() for matrix in matrices])
        assert torch.allclose(after.gram_NN.diagonal()[5:], about_mean, rtol=FLOAT32, atol=FLOAT32 * size)
        assert after.sums_N is None
        assert after.entries is None


def test_it_is_the_same_in_two_steps(tmp_path: Path) -> None:
    _, grown, paths = alone(tmp_path)
    first = saved(ez.load(tmp_path / "old").add(paths[:1]), tmp_path / "first")
    second = saved(first.add(paths[1:]), tmp_path / "second")
    for layer in grown.layers:
        assert torch.allclose(second.moments(layer).raw_NN, grown.moments(layer).raw_NN, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", [1.0, 2], ids=["whole", "part"])
def test_copies_are_told_where_coefficients_can_tell(tmp_path: Path, kept: float) -> None:
    """A copy of an old model, under another name, with all directions and with a few: then the bundle cannot know."""
    paths = write(tmp_path / "zoo", "weight")
    shutil.copytree(paths[1], tmp_path / "copy")
    shutil.copytree(paths[6], tmp_path / "twin")
    old = saved(ez.fit(paths[:5], kept), tmp_path / "old")
    delete(paths[:5])
    grown = saved(old.add([paths[6], tmp_path / "twin", tmp_path / "copy"]), tmp_path / "grown")
    assert grown.report["duplicates"] == ([["m1", "copy"]] if kept == 1.0 else [])


def test_damage_is_not_taken_for_what_was_meant(tmp_path: Path) -> None:
    old, _, paths = alone(tmp_path)
    basis = old.path / "basis.safetensors"
    data = bytearray(basis.read_bytes())
    data[-3] ^= 1
    basis.unlink()
    basis.write_bytes(data)
    again = saved(ez.load(old.path).add(paths), tmp_path / "again")
    assert any("checksum" in fault for fault in again.verify())


def test_a_model_that_nothing_tells_the_energy_of_is_refused(tmp_path: Path) -> None:
    _, grown, _ = alone(tmp_path)
    layer = next(iter(grown.layers))
    file = grown.path / grown.manifest.models[6].coefficients
    values = load_file(file)
    metadata = {"model": "m6", "basis": grown.manifest.basis_id}
    assert values.pop("energy").dtype == torch.float64
    file.unlink()
    save_file(values, file, metadata)
    with pytest.raises(ez.BundleError, match="tell the energies of 'm6'"):
        ez.load(grown.path).moments(layer)
    file.unlink()
    save_file({**values, "energy": torch.ones(1 + len(grown.layers), dtype=torch.float64)}, file, metadata)
    with pytest.raises(ez.BundleError, match="layers of this bundle need tensors"):
        ez.load(grown.path).coefficients("m6")
