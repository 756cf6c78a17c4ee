"""Traits of moments as a zoo grows: exact with the old models' files at hand, unknown and said to be so without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from growth_zoos import MODULES, Case, delete, open_case, saved, truth, write
from safetensors.torch import load_file

import eigenzoo as ez
from builders import PREFIX, random_factors, write_adapter
from tolerance import tolerance

VIEWS = ("weight", "delta", "update", "factors")


def dense(paths: list[Path], view: str, root: Path) -> dict[str, torch.Tensor]:
    """Every layer's rows (N, D), from the files."""
    models = truth(open_case(root, Case(view), paths))
    names = list(models)
    return {layer: torch.stack([models[name][layer].flatten() for name in names]) for layer in models[names[0]]}


def assert_traits(space: ez.Subspace, rows: dict[str, torch.Tensor], view: str) -> None:
    for layer, rows_ND in rows.items():
        moments = space.moments(layer)
        scale = float(rows_ND.abs().sum(1).max())
        assert moments.sums_N is not None
        assert float((moments.sums_N - rows_ND.sum(1)).abs().max()) <= tolerance(rows_ND.shape[1], scale=scale)
        assert (moments.singular_NR is None) == (moments.starts_NN is None) == (view != "update")
        if view == "update":
            assert moments.entries is None, "updates are never multiplied out"
        else:
            # (Σ v)² / Σ v² of the entries' variances, without what Σ v² has by chance: v̂² is v²·(1 + 2/(N − 1)) on average.
            v_D, count = (rows_ND - rows_ND.mean(0)).square().sum(0), len(rows_ND)
            expected = float(v_D.sum() ** 2 / v_D.square().sum()) * (count + 1) / (count - 1)
            assert moments.entries == pytest.approx(expected, rel=tolerance(rows_ND.shape[1]))
        if moments.singular_NR is not None:
            for row_D, values_R in zip(rows_ND, moments.singular_NR, strict=True):
                expected = np.linalg.svd(row_D.view(MODULES[layer]).numpy(), compute_uv=False)[: len(values_R)]
                assert values_R.numpy() == pytest.approx(expected, abs=tolerance(rows_ND.shape[1], scale=expected[0]))


def starts(paths: list[Path], layer: str, num_rows: int) -> torch.Tensor:
    key = f"{PREFIX}{layer}.lora_A.weight"
    rows_ND = torch.stack(
        [load_file(path / "adapter_model.safetensors")[key][:num_rows].flatten() for path in paths]
    ).double()
    return rows_ND @ rows_ND.T


@pytest.mark.parametrize("refresh", [False, True], ids=["kept", "refreshed"])
@pytest.mark.parametrize("view", VIEWS)
def test_traits_of_a_grown_zoo_are_those_of_its_weights(tmp_path: Path, view: str, refresh: bool) -> None:
    paths = write(tmp_path / "zoo", view)
    case, rows = Case(view), dense(paths, view, tmp_path / "zoo")
    grown = saved(ez.fit(open_case(tmp_path / "zoo", case, paths[:5]), 2), tmp_path / "old")
    for step, places in enumerate(([5], [6, 7])):
        new = open_case(tmp_path / "zoo", case, [paths[place] for place in places])
        grown = saved(grown.add(new, refresh=refresh), tmp_path / f"grown{step}")
    assert_traits(grown, rows, view)
    whole = ez.fit(open_case(tmp_path / "zoo", case, paths), 2)
    for layer in rows:
        first, second = grown.moments(layer), whole.moments(layer)
        if view == "update":
            expected = starts(paths, layer, 1)
            for moments in (first, second):
                assert float((moments.starts_NN - expected).abs().max()) <= tolerance(99, scale=float(expected.max()))


def test_a_new_model_of_lower_rank_leaves_fewer_rows_to_compare(tmp_path: Path) -> None:
    """The old models' products are of four rows of A; with a model of rank two only two of them can be compared."""
    paths = [
        write_adapter(tmp_path / "zoo" / f"m{place}", random_factors(MODULES, 4 if place < 5 else 2, place))
        for place in range(7)
    ]
    old = saved(ez.fit(paths[:5], 2), tmp_path / "old")
    grown = saved(old.add(paths[5:]), tmp_path / "grown")
    for layer, (outputs, inputs) in MODULES.items():
        for space, count, num_rows in ((old, 5, 4), (grown, 7, 2)):
            expected = starts(paths[:count], layer, num_rows)
            found = space.moments(layer).starts_NN
            assert float((found - expected).abs().max()) <= tolerance(inputs * 4, scale=float(expected.max()))
        assert grown.moments(layer).singular_NR.shape == (7, 4)
        assert float(grown.moments(layer).singular_NR[5:, 2:].abs().max()) == 0
        assert outputs > 4
    higher = [write_adapter(tmp_path / "zoo" / "m7", random_factors(MODULES, 6, 7))]
    again = saved(grown.add(higher), tmp_path / "again")
    for layer in MODULES:
        assert again.moments(layer).singular_NR.shape == (8, 6)
        expected = starts([*paths, *higher], layer, 2)
        assert float((again.moments(layer).starts_NN - expected).abs().max()) <= tolerance(
            99, scale=float(expected.max())
        )


@pytest.mark.parametrize("view", ["weight", "update"])
def test_growth_from_the_bundle_alone_does_not_guess(tmp_path: Path, view: str) -> None:
    paths = write(tmp_path / "zoo", view)
    old = saved(ez.fit(open_case(tmp_path / "zoo", Case(view), paths[:5]), {"models": 3}), tmp_path / "old")
    before = ez.evidence(old).to_dict()
    delete(paths[:5])
    grown = saved(old.add(open_case(tmp_path / "zoo", Case(view), paths[5:])), tmp_path / "grown")
    for layer in grown.layers:
        moments = grown.moments(layer)
        assert moments.entries is moments.sums_N is moments.singular_NR is moments.starts_NN is None
    document = ez.evidence(grown).to_dict()
    assert document["num_models"] == 8
    for name, layer in document["layers"].items():
        assert before["layers"][name]["null"]["permuted"] is not None
        assert layer["null"]["permuted"] is layer["null"]["spectrum_matched"] is None
        assert len(layer["null"]["norm_matched"]) == 7
    if view == "update":
        assert document["lineage"]["groups"] == []
        assert [document["lineage"]["cosines"][place][place] for place in range(8)] == pytest.approx([1.0] * 8)
    assert any("from the bundle alone" in warning for warning in document["warnings"])
