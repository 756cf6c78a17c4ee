"""What sides keep of held-out models: against plain algebra, and against what a fit of the same ranks states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eigenzoo as ez
from builders import random_factors, random_stack, read_update, write_adapter, write_stacks
from eigenzoo.linalg.heldout import make_folds
from tolerance import tolerance

SHAPES = {"0.q": (12, 9), "1.q": (6, 14)}
NUM_MODELS = 11


def write_zoo(root: Path, view: str) -> list[Path]:
    if view == "update":
        return [write_adapter(root / f"m{n:02d}", random_factors(SHAPES, 2, n)) for n in range(NUM_MODELS)]
    stacks = {
        name: random_stack(NUM_MODELS, shape, seed, rank=6) + 3 for seed, (name, shape) in enumerate(SHAPES.items())
    }
    return write_stacks(root, stacks)


def shares(paths: list[Path], view: str, name: str, rank: int, axes: tuple[str, ...]) -> tuple[float, float]:
    """By the book: SVDs of the fitted models side by side, and every matrix projected."""
    read = read_update if view == "update" else (lambda path, name: load_file(path / "model.safetensors")[name])
    stack = np.stack([read(path, name).double().numpy() for path in paths])
    held = make_folds(NUM_MODELS, 5, 0)[0].numpy()
    fitted = np.delete(stack, held, axis=0)
    mean = fitted.mean(0)
    rows = fitted if view == "update" else fitted - mean
    left = np.linalg.svd(np.concatenate(list(rows), 1))[0][:, :rank] if "outputs" in axes else np.eye(stack.shape[1])
    right = np.linalg.svd(np.concatenate(list(rows), 0))[2][:rank].T if "inputs" in axes else np.eye(stack.shape[2])
    found = []
    for models in (fitted, stack[held]):
        kept = np.stack([left.T @ (matrix - mean) @ right for matrix in models])
        found.append(float((kept**2).sum() / ((models - mean) ** 2).sum()))
    return found[0], found[1]


@pytest.mark.parametrize("view", ["update", "weight"])
def test_shares_are_those_of_plain_algebra_and_of_a_fit(tmp_path: Path, view: str) -> None:
    paths = write_zoo(tmp_path / "zoo", view)
    document = ez.evidence(paths, axes=("outputs", "inputs")).to_dict()
    close = tolerance(NUM_MODELS * 108, dtype=torch.float64)
    for name, layer in document["layers"].items():
        for axis, side in layer["axes"].items():
            held = side["heldout"]
            for rank, *stated in zip(held["rank"], held["in_sample"], held["captured"], strict=True):
                assert stated == pytest.approx(shares(paths, view, name, rank, (axis,)), abs=max(close, 1e-9))
    pooled = document["summary"]["sides"]
    assert list(pooled) == ["outputs", "inputs", "outputs,inputs"]
    weights = {name: layer["variance"] for name, layer in document["layers"].items()}
    for axes, known in pooled.items():
        for rank, captured in zip(known["rank"], known["captured"], strict=True):
            each = {name: shares(paths, view, name, rank, tuple(axes.split(",")))[1] for name in weights}
            expected = sum(each[name] * weight for name, weight in weights.items()) / sum(weights.values())
            assert captured == pytest.approx(expected, abs=1e-9)
            # A fit of the same ranks holds the same fold out.
            fitted = ez.fit(paths, dict.fromkeys(axes.split(","), rank)).report["layers"]
            assert {name: fitted[name]["heldout"] for name in weights} == pytest.approx(each, abs=1e-6)


def test_a_plan_of_adapters_has_the_same_shares(tmp_path: Path) -> None:
    paths = write_zoo(tmp_path / "zoo", "update")
    pooled = ez.evidence(paths, axes=("outputs", "inputs")).sides
    for row in ez.plan(paths).rows:
        if "models" not in row.axes and row.core_rank is None:
            assert row.heldout == pytest.approx(pooled[",".join(row.axes)].at("captured", row.rank), abs=1e-12)


def test_where_models_cannot_be_held_out_there_are_no_shares(tmp_path: Path) -> None:
    paths = write_zoo(tmp_path / "zoo", "update")
    few = ez.evidence(paths[:4], axes=("outputs",))
    assert few.sides == {}
    assert few.axes["0.q"]["outputs"].heldout is None
    assert ez.evidence(paths).sides == {}
    assert ez.evidence(paths, axes=("outputs",), center="none").sides == {}
