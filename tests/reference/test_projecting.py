"""Projecting many models: the same as dense algebra whatever the blocks, and the basis is read once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, random_stack, read_update, write_adapter, write_stacks
from eigenzoo.formats.bundle.basis_files import BasisFiles
from tolerance import tolerance

NUM_FITTED, NUM_NEW = 6, 10
SHAPES = {"block.0.q": (24, 18), "block.1.q": (10, 30)}
RANKS = {
    "models": {"models": 4},
    "sides": {"outputs": 7, "inputs": 9},
    "all": {"models": 4, "outputs": 7, "inputs": 9},
}
CASES = [(kind, axes) for kind in ("dense", "updates") for axes in RANKS]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory) -> tuple[ez.Subspace, list[Path], str]:
    """A subspace of six models, ten others, and their kind."""
    kind, axes = request.param
    root = tmp_path_factory.mktemp("zoo")
    if kind == "dense":
        stacks = {
            name: random_stack(NUM_FITTED + NUM_NEW, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())
        }
        paths = write_stacks(root, stacks)
    else:
        paths = [
            write_adapter(root / f"m{seed}", random_factors(SHAPES, 2 + seed % 3, seed), lora_alpha=3)
            for seed in range(NUM_FITTED + NUM_NEW)
        ]
    return ez.fit(paths[:NUM_FITTED], RANKS[axes], dtype="float64"), paths[NUM_FITTED:], kind


def dense(path: Path, layer: str, kind: str) -> Tensor:
    return read_update(path, layer) if kind == "updates" else ez.open_zoo([path]).stack(layer).matrix(0).double()


def check(space: ez.Subspace, paths: list[Path], kind: str) -> None:
    """What is stated of each model is the distance of the dense model from the dense rebuilt one."""
    for path, coefficients in zip(paths, space.project_many(paths).values(), strict=True):
        for layer, basis in space.layers.items():
            matrix = dense(path, layer, kind)
            values = basis.rebuild(coefficients.values[layer])
            other = values if isinstance(values, Tensor) else values[0] @ values[1]
            energy = float(matrix.square().sum())
            # Coefficients are handed out in float32.
            bound = tolerance(basis.num_coefficients, dtype=torch.float32)
            assert coefficients.energies[layer] == pytest.approx(energy, rel=tolerance(matrix.numel()))
            assert coefficients.residuals[layer] == pytest.approx(
                float((matrix - other).square().sum()) / energy, rel=bound, abs=bound**2
            )


def test_residuals_are_those_of_dense_algebra(case):
    check(*case)


@pytest.mark.parametrize(("model_bytes", "block_bytes"), [(2**40, 1500), (4000, 2**40), (4000, 1500)])
def test_blocks_of_models_and_of_the_basis_change_nothing(case, monkeypatch, model_bytes, block_bytes):
    """A few values at a time of the models, of the basis, and of both."""
    space, paths, kind = case
    whole = space.project_many(paths)
    for form in ("flat", "stacked"):
        monkeypatch.setattr(f"eigenzoo.subspace.bases.{form}.MODEL_BYTES", model_bytes, raising=False)
        monkeypatch.setattr(f"eigenzoo.subspace.bases.{form}.BLOCK_BYTES", block_bytes, raising=False)
    check(space, paths, kind)
    for name, coefficients in space.project_many(paths).items():
        for layer, values in coefficients.values.items():
            torch.testing.assert_close(
                values, whole[name].values[layer], rtol=0, atol=tolerance(values.numel(), dtype=torch.float32, scale=30)
            )


def read_of_the_basis(space: ez.Subspace, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> int:
    """Values of the basis that are read to project these models."""
    count = [0]

    def counting(method):
        def read(self, *given, **named):
            found = method(self, *given, **named)
            count[0] += found.numel()
            return found

        return read

    with monkeypatch.context() as patch:
        for name in ("read", "read_flat"):
            patch.setattr(BasisFiles, name, counting(getattr(BasisFiles, name)))
        space.project_many(paths)
    return count[0]


def test_the_basis_is_read_once_for_all_models(case, monkeypatch):
    space, paths, _ = case
    files = BasisFiles(sorted(space.path.glob("basis*.safetensors")))
    num_values = sum(torch.Size(files.shape(name)).numel() for name in files.names)
    assert read_of_the_basis(space, paths, monkeypatch) <= num_values
    # Where neither the models nor the basis are held, directions of whole layers are read twice, however many models there are.
    for form in ("flat", "stacked"):
        monkeypatch.setattr(f"eigenzoo.subspace.bases.{form}.BLOCK_BYTES", 1500, raising=False)
    assert read_of_the_basis(space, paths, monkeypatch) <= 2 * num_values
    monkeypatch.setattr("eigenzoo.subspace.bases.flat.MODEL_BYTES", 4000, raising=False)
    assert read_of_the_basis(space, paths, monkeypatch) <= 2 * num_values


def test_nan_is_named_in_whatever_run_it_lies(tmp_path, monkeypatch):
    stack = random_stack(8, (24, 18))
    paths = write_stacks(tmp_path / "zoo", {"w": stack})
    space = ez.fit(paths[:6], 3)
    stack[7, 20, 5] = float("nan")
    broken = write_stacks(tmp_path / "broken", {"w": stack})
    monkeypatch.setattr("eigenzoo.subspace.bases.flat.MODEL_BYTES", 1000, raising=False)
    with pytest.raises(ez.DataError, match=r"layer 'w' of m7: 1 values are NaN or Inf"):
        space.project_many(broken[6:])
