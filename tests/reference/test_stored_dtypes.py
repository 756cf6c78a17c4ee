"""Coefficients in half precision and bases in eight and four bits: what is stated is what is stored, against float64 algebra."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_half_precision_bounds import lost, zoo  # noqa: F401 (a fixture)

import eigenzoo as ez
from builders import edit_model, random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.adapt.maps import map_of
from eigenzoo.errors import DataError
from eigenzoo.formats.bundle.coded_tensors import CodedWriter
from tolerance import tolerance

SIDES = {"outputs": 4, "inputs": 3}
RANKS = [{"models": 3}, SIDES, {**SIDES, "models": 4}]
HALVES = ["float16", "bfloat16"]
CODED = ["int8", "nf4"]


def dense(basis, values) -> torch.Tensor:
    """A layer as it is rebuilt."""
    found = basis.rebuild(values)
    return found if isinstance(found, torch.Tensor) else found[0] @ found[1]


def models_of(source: ez.Zoo, layer: str) -> list[torch.Tensor]:
    stack = source.stack(layer)
    whole = (
        torch.mm(*stack.factors(place)) if source.view == "update" else stack.matrix(place)
        for place in range(len(stack))
    )
    return [matrix.double() for matrix in whole]


@pytest.mark.parametrize("coefficients_dtype", ["float32", *HALVES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *CODED])
@pytest.mark.parametrize("rank", RANKS, ids="+".join)
def test_the_stated_loss_is_that_of_what_is_stored(zoo, rank, dtype, coefficients_dtype, tmp_path):  # noqa: F811
    space = ez.load(ez.fit(zoo, rank, dtype=dtype, coefficients_dtype=coefficients_dtype).save(tmp_path / "bundle"))
    assert lost(zoo, space) == pytest.approx(space.report["residual"], rel=1e-6)
    assert not [check.name for check in space.verify().checks if check.faults]
    for name in space.names:
        stored, projected = space.coefficients(name), space.project(zoo.models[space.names.index(name)].path)
        with safe_open(tmp_path / "bundle" / f"coefficients/{name}.safetensors", "pt") as file:
            assert file.get_tensor("coefficients").dtype == getattr(torch, coefficients_dtype)
        # Projection repeats the fit's; of bases in float32 the fit's come from the moments, and may round to the neighbour.
        step = 2 * torch.finfo(getattr(torch, coefficients_dtype)).eps
        for layer, values in stored.values.items():
            size = float(values.abs().max())
            torch.testing.assert_close(projected.values[layer], values, rtol=step, atol=max(1e-5, step / 8) * size)
        assert projected.residual == pytest.approx(stored.residual, rel=1e-5)


@pytest.mark.parametrize("dtype", CODED)
@pytest.mark.parametrize("rank", RANKS, ids="+".join)
def test_projection_is_the_nearest_point_of_the_quantised_subspace(zoo, rank, dtype):  # noqa: F811
    """The residual is orthogonal to whatever coefficients can reach: what normal equations on the stored values would give."""
    space = ez.fit(zoo, rank, dtype=dtype)
    for layer, basis in space.layers.items():
        zero = torch.zeros(basis.coefficient_shape)
        middle = dense(basis, zero)
        reach = torch.stack(
            [dense(basis, unit.view_as(zero)) - middle for unit in torch.eye(basis.num_coefficients)]
        ).flatten(1)
        # Orthonormal as they are read, though the stored values are not.
        torch.testing.assert_close(reach @ reach.T, torch.eye(len(reach), dtype=torch.float64), atol=1e-5, rtol=0)
        assert basis.orthonormality() > 1e-4 or basis.form == "stacked"
        for place, matrix in enumerate(models_of(zoo, layer)):
            nearest = reach @ (matrix - middle).flatten()
            found = space.all_coefficients[layer][place].flatten().double()
            size = float((matrix - middle).norm())
            torch.testing.assert_close(found, nearest, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("dtype", CODED)
def test_more_bits_lose_less(zoo, dtype):  # noqa: F811
    """Of what directions hold, eight bits lose less than a thousandth and four less than a twentieth."""
    exact, stored = (ez.fit(zoo, 3, dtype=dtype).report["layers"] for dtype in ("float32", dtype))
    for name, layer in stored.items():
        lost_more = exact[name]["captured"] - layer["captured"]
        assert 0 <= lost_more < {"int8": 1e-3, "nf4": 5e-2}[dtype]


def test_bytes_are_those_of_files(tmp_path):
    """Of a layer of 4,096 values and 16 directions: 4, 2, 1 + 2/64 and ½ + 2/64 bytes a value, and 2 a coefficient."""
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(20, (64, 64), 0)})
    values, spaces = 16 * 4096, {}
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("int8", 1 + 2 / 64), ("nf4", 0.5 + 2 / 64)):
        for each in ("float32", "float16"):
            spaces[dtype, each] = ez.fit(paths, 16, dtype=dtype, coefficients_dtype=each)
            folder = spaces[dtype, each].save(tmp_path / f"{dtype}-{each}")
            found = ez.load(folder).report["bytes"]
            files = [
                file.stat().st_size
                for file in folder.rglob("*")
                if file.is_file() and file.name != "moments.safetensors"
            ]
            assert found["whole_bundle"] == sum(files)
            with safe_open(folder / "basis.safetensors", "pt") as file:
                held = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
            assert sum(held.values()) - 4 * 4096 == size * values
    counts, sizes = [], []
    for each in ("float32", "float16"):
        counts.append(spaces["nf4", each].report["bytes"]["per_model"])
        files = list((tmp_path / f"nf4-{each}" / "coefficients").iterdir())
        sizes.append(sum(file.stat().st_size for file in files) // len(files))
    assert counts[0] - counts[1] == sizes[0] - sizes[1] >= 2 * 16


def test_blocks_that_spans_cut_are_those_of_the_whole(tmp_path):
    """Spans end anywhere: a block that two of them share waits for its second half."""
    values = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    for coding in CODED:
        for place, runs in enumerate(
            ([(0, 185)], [(0, 30), (30, 100), (100, 101), (101, 185)], [(64, 185), (10, 64), (0, 10)])
        ):
            (tmp_path / f"{coding}{place}").mkdir()
            writer = CodedWriter(tmp_path / f"{coding}{place}", ["w"], 2, coding)
            writer.begin("w/models", torch.float32, (5, 37))
            for start, stop in runs:
                writer.write_flat("w/models", start, values.view(-1)[start:stop])
            torch.testing.assert_close(writer.read_flat("w/models", 3, 180), values.view(-1)[3:180], atol=0.5, rtol=0)
            writer.finish()
        first, *others = [(tmp_path / f"{coding}{place}" / "basis.safetensors").read_bytes() for place in range(3)]
        assert all(other == first for other in others)


@pytest.mark.parametrize("form", ["models", "sides"])
def test_growth_keeps_dtypes(tmp_path, form):
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(8, (9, 7), 0)})
    rank = 3 if form == "models" else SIDES
    space = ez.fit(paths[:6], rank, dtype="nf4", coefficients_dtype="bfloat16")
    for refresh in (False, True):
        grown = ez.load(space.add(paths[6:], refresh=refresh).save(tmp_path / f"grown{refresh}"))
        assert (grown.manifest.schema_version, grown.manifest.dtype) == (2, "nf4")
        assert not [check.name for check in grown.verify().checks if check.faults]
        assert lost(ez.open_zoo(paths), grown) == pytest.approx(grown.report["residual"], rel=1e-6)


def test_coefficients_beyond_float16_are_refused_with_a_way_out(tmp_path):
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(5, (9, 7), 0)})
    for place, path in enumerate(paths):
        edit_model(path, w=torch.full((9, 7), 1e5 * place))
    for dtype in ("float32", "nf4"):
        with pytest.raises(
            DataError,
            match=r"layer 'w': a coefficient of \S+\. The largest number in float16 is 6\.55e\+04\. Store .* bfloat16",
        ):
            ez.fit(paths, 1, dtype=dtype, coefficients_dtype="float16")
        assert ez.fit(paths, 1, dtype=dtype, coefficients_dtype="bfloat16").report["residual"] < 0.02


def test_defaults_are_written_as_version_1(tmp_path: Path):
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(5, (9, 7), 0)})
    plain = ez.fit(paths, 2).manifest
    assert plain.schema_version == 1
    assert "coefficients_dtype" not in plain.options
    for changed in ({"dtype": "int8"}, {"coefficients_dtype": "float16"}):
        assert ez.fit(paths, 2, **changed).manifest.schema_version == 2


def test_rounded_coefficients_add_their_distance_to_the_loss(tmp_path):
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(12, (9, 7), 0)})
    exact, stored = (ez.fit(paths, 5, coefficients_dtype=dtype) for dtype in ("float32", "bfloat16"))
    distance = (exact.all_coefficients["w"] - stored.all_coefficients["w"]).double().square().sum()
    more = stored.manifest.discarded["w"] - exact.manifest.discarded["w"]
    assert more == pytest.approx(float(distance), rel=tolerance(1, dtype=torch.float32) + 1e-4)


@pytest.mark.parametrize("dtype", CODED)
@pytest.mark.parametrize("rank", RANKS, ids="+".join)
def test_maps_of_coefficients_are_those_that_rebuild(zoo, rank, dtype):  # noqa: F811
    """Adaptation, attached modules and PEFT read a basis through `operator`: the same orthonormalised one."""
    space = ez.fit(zoo, rank, dtype=dtype)
    for layer, basis in space.layers.items():
        values, layer_map = space.all_coefficients[layer][0], map_of(basis, torch.float64)
        found = layer_map.matrix(values.double()) + layer_map.mean()
        torch.testing.assert_close(found, dense(basis, values), rtol=0, atol=1e-5 * float(values.norm()))


@pytest.mark.parametrize("dtype", CODED)
def test_a_layer_in_spans_is_that_of_one_read(tmp_path, monkeypatch, dtype):
    """Spans of whole rows do not end with blocks of 64; a reader's blocks do not begin with them."""
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(8, (41, 7), 0)})
    whole = ez.fit(paths, 3, dtype=dtype, cache=False)
    monkeypatch.setattr("eigenzoo.passes.resources.MAX_LAYER_BYTES", 0)
    monkeypatch.setattr("eigenzoo.zoo.stack.SPAN_BYTES", 8 * 8 * 7 * 5)
    monkeypatch.setattr("eigenzoo.subspace.bases.flat.BLOCK_BYTES", 8 * 3 * 50)
    parts = ez.fit(paths, 3, dtype=dtype, cache=False, workspace=tmp_path)
    assert len(ez.open_zoo(paths).stack("w").spans()) > 5
    for name in ("w/models", "w/mean"):
        first, second = (space.layers["w"].tensors.read(name) for space in (whole, parts))
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.all_coefficients["w"], parts.all_coefficients["w"], atol=1e-5, rtol=0)
    assert parts.report["residual"] == pytest.approx(whole.report["residual"], rel=1e-6)


@pytest.mark.parametrize(
    "stored", [{"coefficients_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"dtype": "int8"}], ids=str
)
def test_what_sides_lose_of_the_mean_is_not_a_loss_of_variance(zoo, stored):  # noqa: F811
    """The mean of updates lies in their sides too: rounding that takes nothing leaves the stated variance where it was."""
    exact, rounded = (ez.fit(zoo, SIDES, **options).report["layers"] for options in ({}, stored))
    for name, layer in rounded.items():
        assert layer["captured"] == pytest.approx(exact[name]["captured"], abs=1e-3)


@pytest.mark.parametrize("stored", [{"dtype": "nf4"}, {"coefficients_dtype": "bfloat16"}], ids=str)
def test_a_refresh_without_files_states_no_less_than_is_lost(tmp_path, stored):
    """Quantised factors are not the models': what a refresh takes for them is what the bundle rebuilds."""
    updates = [random_factors({"w": (12, 9)}, 2, seed=place) for place in range(8)]
    paths = [write_adapter(tmp_path / f"m{place}", update) for place, update in enumerate(updates)]
    bundle = ez.fit(paths[:6], 4, **stored).save(tmp_path / "bundle")
    kept = [Path(shutil.move(path, tmp_path / "kept" / path.name)) for path in paths[:6]]
    grown = ez.load(ez.load(bundle).add(paths[6:], refresh=True).save(tmp_path / "grown"))
    assert grown.report["growth"]["exact"] == ("dtype" not in stored)  # unrounded factors are the models
    assert not [check.name for check in grown.verify().checks if check.faults]
    assert lost(ez.open_zoo([*kept, *paths[6:]]), grown) <= grown.report["residual"] * (1 + 1e-6)
