"""Collections, truth, errors and ceiling of the benchmarks: against dense float64, transformers and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from bench import page_cache
from bench.accuracy import errors, sine
from bench.ceiling import read_once
from bench.collection import (
    PARENT,
    STAMP,
    AdapterRecipe,
    CheckpointRecipe,
    Collection,
    make,
    read_collection,
    write_adapters,
)
from bench.gemm import PRODUCTS, best_product
from bench.truth import Truth, directions, stacked_rows, truth
from tolerance import angle_tolerance, tolerance

ADAPTERS = AdapterRecipe(num_layers=1, hidden=128, kv=32, rank=4, planted=3)
CHECKPOINTS = CheckpointRecipe(hidden=64, depth=1, mlp=128, image=32, num_labels=10, planted=3)
NUM_MODELS = 12


@pytest.fixture(scope="module", params=[ADAPTERS, CHECKPOINTS], ids=["lora", "vit"])
def collection(request, tmp_path_factory) -> Collection:
    return make(request.param, NUM_MODELS, tmp_path_factory.mktemp("collections"))


def centred(rows):
    rows = rows.astype(np.float64)
    return rows - rows.mean(0)


def largest_error(values, reference) -> float:
    return float(np.abs(values - reference).max() / reference.max())


def test_rows_are_what_the_files_hold(collection):
    from safetensors.torch import load_file

    for place, file in enumerate(collection.files):
        tensors = load_file(file)
        assert set(tensors) == {tensor.key for tensor in collection.tensors.values()}
        for name, tensor in collection.tensors.items():
            assert np.array_equal(collection.rows(name)[place], tensors[tensor.key].flatten().numpy())
    name = next(iter(collection.tensors))
    blocks = list(collection.blocks(name, block_bytes=1000))
    assert len(blocks) > 1
    assert np.array_equal(np.concatenate(blocks, 1), collection.rows(name))


def test_the_truth_is_the_dense_spectrum_and_its_directions(collection):
    found = truth(collection, "weights")
    for name in collection.tensors:
        rows = centred(collection.rows(name))
        _, singular, vectors = np.linalg.svd(rows, full_matrices=False)
        known = min(NUM_MODELS - 1, rows.shape[1])
        # The bound of the sum: D products of values as large as the rows', squared where eigenvalues are small.
        assert largest_error(found.values[name][:known], singular[:known] ** 2) < tolerance(rows.shape[1])
        gap = (found.values[name][2] - found.values[name][3]) / found.values[name][0]
        # Singular vectors of the Gram: its round-off, of D products, over the gap.
        assert sine(vectors[:3], directions(collection, found, name)) < angle_tolerance(rows.shape[1], gap)


def test_the_planted_directions_lead(tmp_path):
    """With many values and models the leading eigenvectors span the planted windows, as Davis and Kahan bound it."""
    recipe = AdapterRecipe(num_layers=1, hidden=512, kv=64, rank=8, planted=3)
    collection = make(recipe, 60, tmp_path)
    found = truth(collection, "weights")
    for name, values in found.values.items():
        assert values[2] > 3 * values[3], name
        assert 0.5 < values[:3].sum() / values.sum() < 0.85, name


def test_the_truth_of_updates_is_that_of_their_dense_products(tmp_path):
    collection = make(ADAPTERS, NUM_MODELS, tmp_path)
    found = truth(collection, "updates")
    for module in ADAPTERS.modules:
        a_NRI = collection.rows(f"{module}.lora_A").reshape(NUM_MODELS, 4, -1).astype(float)
        b_NOR = collection.rows(f"{module}.lora_B").reshape(NUM_MODELS, -1, 4).astype(float)
        updates = centred((ADAPTERS.scale * b_NOR @ a_NRI).reshape(NUM_MODELS, -1))
        singular = np.linalg.svd(updates, compute_uv=False)[:-1]
        assert largest_error(found.values[module], singular**2) < tolerance(updates.shape[1])


def test_the_truth_of_columns_is_that_of_all_rows(tmp_path):
    collection = make(ADAPTERS, NUM_MODELS, tmp_path)
    found = truth(collection, "columns")
    for name in collection.sample():
        rows = stacked_rows(collection, name)
        assert rows.shape == (4 * NUM_MODELS, max(collection.tensors[name].shape))
        singular = np.linalg.svd(centred(rows), compute_uv=False)
        known = min(rows.shape[1], len(rows) - 1)
        assert largest_error(found.values[name][:known], singular[:known] ** 2) < tolerance(rows.size)
    tensor = collection.tensors["model.layers.0.self_attn.q_proj.lora_B"]
    first = collection.rows(tensor.name)[0].reshape(tensor.shape)
    assert np.array_equal(stacked_rows(collection, tensor.name)[:4], first.T)


def test_a_truth_is_kept(tmp_path):
    collection = make(ADAPTERS, NUM_MODELS, tmp_path)
    said: list[str] = []
    first, second = truth(collection, "weights", said.append), truth(collection, "weights", said.append)
    assert len(said) == 1
    assert all(np.array_equal(first.values[name], second.values[name]) for name in first.values)


def test_a_collection_is_made_once_and_an_interrupted_one_goes_on(tmp_path):
    said: list[str] = []
    whole = make(ADAPTERS, 5, tmp_path, said.append)
    times = [file.stat().st_mtime_ns for file in whole.files]
    assert make(ADAPTERS, 5, tmp_path, said.append).folder == whole.folder
    assert len(make(ADAPTERS, 3, tmp_path, said.append).files) == 3
    assert len(said) == 1
    kept = whole.files[2].read_bytes()
    (whole.folder / STAMP).unlink()
    for file in whole.paths[2].iterdir():
        file.unlink()
    whole.paths[2].rmdir()
    make(ADAPTERS, 6, tmp_path, said.append)
    assert "making 2 models" in said[1]
    assert whole.files[2].read_bytes() == kept
    assert [file.stat().st_mtime_ns for file in whole.files][:2] == times[:2]
    assert read_collection(whole.folder, 6).recipe == ADAPTERS
    assert json.loads((whole.folder / STAMP).read_text())["num_models"] == 6


def test_another_recipe_has_another_folder(tmp_path):
    first, second = (make(AdapterRecipe(1, 1024, 32, 4, 2, seed), 2, tmp_path) for seed in (0, 1))
    assert first.folder != second.folder
    name = next(iter(first.tensors))
    # Neither what the models have in common nor what is their own is that of another seed.
    for rows in (lambda each: each.rows(name).mean(0), lambda each: np.diff(each.rows(name), axis=0)[0]):
        assert abs(np.corrcoef(rows(first), rows(second))[0, 1]) < 0.08


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(SystemExit, match="choose another --folder"):
        make(ADAPTERS, 2, tmp_path)


def test_adapters_are_written_where_they_are_asked_for(tmp_path):
    write_adapters(tmp_path / "zoo", 2, num_layers=1, rank=2)
    assert sorted(path.name for path in (tmp_path / "zoo").iterdir()) == ["adapter-0000", "adapter-0001"]


def test_checkpoints_have_the_names_and_shapes_of_transformers(tmp_path):
    from safetensors import safe_open
    from transformers import ViTConfig, ViTForImageClassification

    recipe = CheckpointRecipe(hidden=64, depth=2, mlp=96, image=32, num_labels=7)
    name, config = recipe.config()
    assert name == "config.json"
    ViTForImageClassification(ViTConfig(**config)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes == {tensor.key: tensor.shape for tensor in recipe.tensors()}
    assert sum(tensor.num_values for tensor in CheckpointRecipe().tensors()) == 86_567_656


def test_fine_tunes_are_one_percent_from_their_parent(tmp_path):
    from safetensors.numpy import load_file

    collection = make(CHECKPOINTS, 3, tmp_path)
    parent = load_file(collection.folder / PARENT / CHECKPOINTS.file)
    tuned = load_file(collection.files[0])
    key = "vit.encoder.layer.0.intermediate.dense.weight"
    assert 0.005 < np.linalg.norm(tuned[key] - parent[key]) / np.linalg.norm(parent[key]) < 0.02


@pytest.mark.parametrize("angle", [1e-12, 1e-7, 1e-3, 0.5, math.pi / 2])
def test_the_sine_of_a_known_angle(angle):
    true = np.eye(3, 50)
    basis = true.copy()
    basis[1, 1], basis[1, 40] = math.cos(angle), math.sin(angle)
    assert sine(5 * basis, true) == pytest.approx(math.sin(angle), rel=1e-6, abs=1e-15)


def test_directions_beyond_the_leading_ones_do_not_help():
    assert sine(np.eye(10)[[0, 1, 5, 2]], np.eye(3, 10)) == pytest.approx(1)


def test_errors_are_the_worst_of_all_layers_and_what_is_missing_counts(tmp_path):
    collection = make(ADAPTERS, NUM_MODELS, tmp_path)
    true = Truth("weights", {"a": np.array([4.0, 2.0, 1.0]), "b": np.array([8.0, 4.0, 2.0, 1e-30])}, {})
    good = {"a": np.array([4.0, 2.0, 1.1]), "b": np.array([8.0, 3.0, 2.0, 7.0])}
    found = errors(collection, true, good, {}, 2)
    assert found == {"top": 0.25, "tail": pytest.approx(0.1), "angle": None}
    assert errors(collection, true, {"a": np.array([4.0])}, {}, 2) == {"top": 1.0, "tail": None, "angle": None}
    assert errors(collection, true, {"a": np.array([4.0, np.nan])}, {}, 2)["top"] == math.inf


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_way_to_a_product_is_the_product(name):
    rows = torch.randn(33, 9001, generator=torch.Generator().manual_seed(0))
    found, true = PRODUCTS[name](rows), rows.double() @ rows.double().T
    if isinstance(found, list):
        step = found[0].shape[0]
        parts = [(part, true[step * place : step * (place + 1), step * place :]) for place, part in enumerate(found)]
    else:
        upper = np.triu(np.asarray(found))
        parts = [(torch.from_numpy(upper), true.triu())]
    for part, expected in parts:
        assert float((part - expected).abs().max() / true.max()) < tolerance(9001, dtype=torch.float32)


def test_a_product_on_a_sample_is_scaled(monkeypatch):
    monkeypatch.setattr("bench.gemm.SAMPLE_VALUES", 1000)
    monkeypatch.setattr("bench.gemm._seconds", lambda way, sample: sample.numel())
    assert best_product(10, 5000, 1)[0] == 1000 * 50


@pytest.mark.parametrize(("threads", "chunk"), [(1, 1000), (2, 2**20)])
def test_reading_once_reads_every_byte(tmp_path, monkeypatch, threads, chunk):
    files = []
    for place in range(5):
        files.append(tmp_path / str(place))
        files[-1].write_bytes(bytes(12_345 * place))
    counted: list[int] = []
    import os

    whole = os.preadv

    def counting(descriptor, buffers, place):
        counted.append(whole(descriptor, buffers, place))
        return counted[-1]

    monkeypatch.setattr("os.preadv", counting)
    assert read_once(files, threads, chunk) > 0
    assert sum(counted) == 123_450


def test_files_are_brought_into_memory_and_out_of_it(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(4_000_000))
    page_cache.warm([file])
    share = page_cache.resident([file])
    if share is None:
        pytest.skip("this system does not say what is in memory")
    assert share >= page_cache.WARM
    left = page_cache.evict([file])
    if left is not None and left > page_cache.COLD:
        pytest.skip("this file system keeps its files in memory")
    page_cache.warm([file])
    assert page_cache.resident([file]) == 1
