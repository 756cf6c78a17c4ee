"""Numbers that are stated must be those that are there: cases in which they once were not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from tolerance import tolerance


def write(folder, models, metadata=None):
    for number, tensors in enumerate(models):
        home = folder / f"m{number}"
        home.mkdir(parents=True)
        save_file(tensors, home / "model.safetensors", metadata=metadata or {"format": "pt"})
    return folder


def noisy(num_models, shape, scale=1.0, base=None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    center = torch.zeros(shape) if base is None else base
    return [{"w": center + scale * torch.randn(shape, generator=draw)} for _ in range(num_models)]


def test_a_view_of_differences_without_a_base_is_refused_wherever_it_is_asked(tmp_path):
    zoo = ez.open_zoo(write(tmp_path, noisy(3, (4, 5))))
    with pytest.raises(ez.UsageError, match="view 'delta' needs a base"):
        ez.fit(zoo, view="delta")


def test_a_zoo_that_is_open_already_is_projected_over_the_subspaces_own_base(tmp_path):
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
    write(tmp_path / "zoo", noisy(5, (6, 5), 1e-2, base))
    save_file({"w": base}, tmp_path / "base.safetensors")
    space = ez.fit(ez.open_zoo(tmp_path / "zoo", base=tmp_path / "base.safetensors"), rank=2)
    by_path = space.project(tmp_path / "zoo" / "m0").residual
    assert space.project(ez.open_zoo(tmp_path / "zoo" / "m0")).residual == pytest.approx(by_path, rel=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_states_the_variance_that_it_really_keeps(tmp_path, dtype):
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    write(tmp_path, noisy(8, (40, 30), 3e-3, base))
    space = ez.fit(tmp_path, rank=4, dtype=dtype)
    originals = torch.stack([load_file(tmp_path / name / "model.safetensors")["w"].double() for name in space.names])
    rebuilt = torch.stack([space.rebuild(name).layer("w") for name in space.names])
    variance = (originals - originals.mean(0)).square().sum()
    kept = 1 - float((originals - rebuilt).square().sum() / variance)
    assert space.report["layers"]["w"]["captured"] == pytest.approx(kept, abs=1e-4)
    # The mean is kept in float32: rounding it would cost more than these deviations have.
    assert kept > 0.5


def test_a_side_longer_than_all_columns_together_is_a_factor_and_exact(tmp_path):
    write(tmp_path, [{"w": tensors["w"].view(1, 7, 300)} for tensors in noisy(4, (7, 300))])
    space = ez.fit(tmp_path, rank=3, axes=["inputs"])
    stack = torch.stack(
        [load_file(tmp_path / name / "model.safetensors")["w"].double().flatten() for name in space.names]
    )
    centered = stack - stack.mean(0)
    energies = torch.linalg.svdvals(centered).square()
    assert space.report["layers"]["w"]["captured"] == pytest.approx(
        float(energies[:3].sum() / energies.sum()), abs=1e-9
    )


def test_a_side_that_is_too_long_is_kept_whole_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr("eigenzoo.subspace.moments.collecting.LARGEST_SIDE", 16)
    write(tmp_path, noisy(9, (20, 6)))
    space = ez.fit(tmp_path, rank=3, axes=["outputs", "inputs"])
    layer = space.report["layers"]["w"]
    assert layer["rank"] == {"outputs": 20, "inputs": 3}
    assert "kept whole" in layer["reason"]["outputs"]
    assert list(space.verify()) == []
    assert any(row.axes == ("outputs", "inputs") for row in ez.plan(tmp_path).rows)


def test_values_that_overflow_the_files_dtype_are_an_error_and_not_inf(tmp_path):
    models = noisy(4, (6, 6), 1.0)
    for number, tensors in enumerate(models):
        tensors["w"] = (tensors["w"].sign() * (60000 if number else -60000)).half()
    write(tmp_path / "zoo", models)
    space = ez.fit(tmp_path / "zoo", rank=1)
    coefficients = space.coefficients("m0")
    coefficients.values["w"].mul_(40)
    with pytest.raises(ez.DataError, match="overflow"):
        space.rebuild(coefficients).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_mean_alone_loses_the_variance_whatever_the_center(tmp_path):
    base = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    models = noisy(6, (8, 8), 0.1, base)
    write(tmp_path, models)
    stack = torch.stack([tensors["w"].double() for tensors in models])
    expected = float((stack - stack.mean(0)).square().sum() / stack.square().sum())
    for center in ("models", "none"):
        assert ez.plan(tmp_path, axes=["models"], center=center).mean_only_residual == pytest.approx(expected, rel=1e-6)


def test_contents_that_models_share_are_counted_once(tmp_path):
    models = noisy(10, (8, 8))
    table = torch.arange(20000)
    for tensors in models:
        tensors["table"] = table.clone()
    write(tmp_path / "zoo", models)
    space = ez.fit(tmp_path / "zoo", rank=2)
    space.save(tmp_path / "bundle")
    real = sum(
        p.stat().st_size for p in (tmp_path / "bundle").rglob("*") if p.is_file() and p.name != "moments.safetensors"
    )
    row = next(row for row in ez.plan(tmp_path / "zoo", axes=["models"]).rows if row.rank == 2)
    assert row.bytes == pytest.approx(real, rel=0.05)
    assert space.report["bytes"]["per_model"] < table.nbytes / 10
    assert ez.load(tmp_path / "bundle").report["bytes"]["whole_bundle"] == real


def test_the_break_even_follows_from_the_bytes_that_are_stated(tmp_path):
    write(tmp_path, noisy(12, (64, 64)))
    sizes = ez.fit(tmp_path, rank=2).report["bytes"]
    fixed = sizes["whole_bundle"] - 12 * sizes["per_model"]
    models = sizes["break_even_models"]
    assert fixed + models * sizes["per_model"] < models * sizes["whole_zoo"] / 12
    assert fixed + (models - 1) * sizes["per_model"] >= (models - 1) * sizes["whole_zoo"] / 12


def test_a_refresh_keeps_small_deviations_beside_a_large_mean(tmp_path):
    base = 100 * torch.randn(12, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    models = [{"w": base + tensors["w"].double() * 1e-4} for tensors in noisy(7, (12, 10))]
    write(tmp_path, models)
    paths = [tmp_path / f"m{number}" for number in range(7)]
    whole = ez.fit(paths, rank=4)
    grown = ez.fit(paths[:6], rank=4).add(paths[6:], refresh=True)
    expected, found = (space.moments("w").centered_NN for space in (whole, grown))
    # Deviations are a millionth of the weights: that much less of each of them is left after any subtraction.
    assert float((expected - found).abs().max() / expected.abs().max()) <= tolerance(1e6)


def test_the_card_says_what_the_report_says(tmp_path):
    models = noisy(8, (30, 20))
    for tensors in models:
        tensors["tiny"] = 1e-6 * tensors["w"][:3, 0].clone()
    write(tmp_path / "zoo", models)
    ez.fit(tmp_path / "zoo", rank=3).save(tmp_path / "bundle")
    report = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["report"]
    layer = report["layers"]["w"]
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert f"{layer['captured']:.1%} in-sample and {layer['heldout']:.1%}" in card


def test_two_numbers_make_a_null_and_not_a_nan(tmp_path):
    write(tmp_path, [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
    layer = ez.fit(tmp_path, rank=1).report["layers"]["w"]
    assert layer["null"] is not None
    assert 0 <= layer["null"] <= 1 + tolerance(10)
