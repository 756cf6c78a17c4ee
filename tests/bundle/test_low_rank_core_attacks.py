"""Hostile bundles with low-rank cores: ranks that lie, factors of other lengths, values that are not finite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_files import edit_manifest, edit_tensors
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, write_adapter

Change = Callable[[dict[str, Any]], object]
MODULES = {"block.q": (9, 8), "block.v": (8, 9)}
SIDES_OF_2_17 = {"shape": [2**17, 2**17], "tensor_shape": [2**17, 2**17], "ranks": {"cores": 1}}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("low-rank")
    paths = [write_adapter(root / f"m{place}", random_factors(MODULES, 2, place)) for place in range(4)]
    return ez.fit(paths, axes=("outputs", "inputs"), rank=6, core_rank=2).save(root / "bundle")


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


def test_the_bundle_is_sound(bundle: Path) -> None:
    assert ez.load(bundle).verify().ok


def ranks(**changed: int) -> Change:
    return lambda document: document["layers"][0]["ranks"].update(changed)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (ranks(cores=0), "cores of rank 0"),
        (ranks(cores=3), "cores of rank 3"),  # 3 · 12 numbers are no fewer than 36
        (ranks(cores=2**62), "cores of rank 4611686018427387904"),
        (ranks(cores=-2), "greater than or equal to 0"),
        (ranks(models=1), "cores of rank 2 with ranks"),
        # 1 MB of factors that stand for 128 GiB.
        (lambda document: document["layers"][0].update(SIDES_OF_2_17), "cores of rank 1 with ranks"),
        (lambda document: document.update(schema_version=1), "schema version 1 has no low-rank cores"),
        (lambda document: document["layers"][0].update(form="stacked"), "form stacked with ranks of"),
    ],
)
def test_a_rank_that_no_cut_has_is_refused(bundle: Path, change: Change, match: str) -> None:
    edit_manifest(bundle, change)
    with pytest.raises(ez.BundleError, match=match):
        ez.load(bundle)


@pytest.mark.parametrize("cores", [1, None])
def test_factors_of_another_length_are_refused(bundle: Path, cores: int | None) -> None:
    def change(document: dict[str, Any]) -> None:
        del document["layers"][0]["ranks"]["cores"]
        if cores is not None:
            document["layers"][0]["ranks"]["cores"] = cores

    edit_manifest(bundle, change)
    space = ez.load(bundle)
    with pytest.raises(ez.BundleError, match=r"holds .*of this bundle need tensors"):
        space.rebuild("m1")
    assert any("need tensors" in fault for fault in space.verify())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_factors_that_make_no_finite_core_are_refused(bundle: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        # Each finite for itself; their products are beyond float32.
        tensors["coefficients"] = torch.where(torch.arange(tensors["coefficients"].numel()) < 24, value, 1.0)

    edit_tensors(bundle, "coefficients/m2.safetensors", change)
    space = ez.load(bundle)
    with pytest.raises(ez.DataError, match="coefficients are NaN or Inf"):
        space.rebuild("m2")
    assert any("model m2: coefficients are NaN or Inf" in fault for fault in space.verify())
