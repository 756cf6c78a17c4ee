"""Layers and models that are zero: what is said to be lost of them is what a dense comparison finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks

LAYERS = ("first", "second")


def zoo_of(root: Path, kind: str) -> tuple[list[Path], Callable[[int], dict[str, Tensor]]]:
    """Six models, of which the third has a layer that is zero and the fourth is zero; and their layers, dense."""
    num_models = 6
    if kind == "update":
        stacks = [random_factors(dict.fromkeys(LAYERS, (7, 6)), 2, seed) for seed in range(num_models)]
        for place, layers in ((2, LAYERS[:1]), (3, LAYERS)):
            for layer in layers:
                stacks[place][layer] = (torch.zeros(7, 2), stacks[place][layer][1])
        paths = [write_adapter(root / f"m{place}", factors) for place, factors in enumerate(stacks)]
        return paths, lambda place: {layer: b.double() @ a.double() for layer, (b, a) in stacks[place].items()}
    dense = {layer: random_stack(num_models, (7, 6), seed) for seed, layer in enumerate(LAYERS)}
    dense["first"][2] = dense["first"][3] = dense["second"][3] = 0
    return write_stacks(root, dense), lambda place: {layer: stack[place].double() for layer, stack in dense.items()}


def lost(space: ez.Subspace, rebuilt: ez.RebuiltModel, model: dict[str, Tensor]) -> tuple[float, float]:
    """‖X − X̂‖² and ‖X‖² of a model, dense."""
    found = [rebuilt.layer(layer).double() for layer in space.layers]
    pairs = list(zip(model.values(), found, strict=True))
    return sum(float((x - y).square().sum()) for x, y in pairs), sum(float(x.square().sum()) for x, _ in pairs)


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": {"outputs": 3, "inputs": 2}}], ids=["models", "sides"])
@pytest.mark.parametrize("kind", ["dense", "update"])
def test_what_is_lost_of_zeros_is_what_a_dense_comparison_finds(
    tmp_path: Path, kind: str, options: dict[str, object]
) -> None:
    paths, model = zoo_of(tmp_path / "zoo", kind)
    space = ez.load(ez.fit(paths, cache=False, **options).save(tmp_path / "bundle"))
    for place in (1, 2, 3):
        kept, projected = space.coefficients(f"m{place}"), space.project(paths[place])
        outside, energy = lost(space, space.rebuild(kept), model(place))
        for coefficients in (kept, projected):
            assert sum(coefficients.outside.values()) == pytest.approx(outside, rel=1e-5, abs=1e-9)
            if energy > 0:
                assert coefficients.residual == pytest.approx(outside / energy, rel=1e-5)
            else:
                assert coefficients.residual > 1e9 or outside < 1e-9
            assert "NaN" not in json.dumps(coefficients.to_dict(), allow_nan=False)


@pytest.mark.parametrize("gone", [False, True], ids=["old files", "bundle alone"])
def test_a_model_of_zeros_that_is_added_counts_with_all_that_it_is_rebuilt_as(tmp_path: Path, gone: bool) -> None:
    paths, model = zoo_of(tmp_path / "zoo", "update")
    space = ez.load(ez.fit([*paths[:2], *paths[4:]], 2, cache=False).save(tmp_path / "bundle"))
    if gone:
        for path in (*paths[:2], *paths[4:]):
            shutil.rmtree(path)
    grown = ez.load(space.add(paths[2:4]).save(tmp_path / "grown"))
    outside = sum(lost(grown, grown.rebuild(f"m{place}"), model(place))[0] for place in (0, 1, 2, 3, 4, 5))
    energy = sum(lost(grown, grown.rebuild(f"m{place}"), model(place))[1] for place in (0, 1, 2, 3, 4, 5))
    assert grown.report["residual"] == pytest.approx(outside / energy, rel=1e-5)
    assert grown.coefficients("m3").residual > 1e9
    assert all(bool(torch.isfinite(grown.moments(layer).gram_NN).all()) for layer in grown.layers)
    assert list(grown.verify()) == []
