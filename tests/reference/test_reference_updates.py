"""LoRA updates by their factors against dense ΔW = s·B·A in float64: mixed ranks, scales, patterns and gauges."""

from __future__ import annotations

from itertools import chain, combinations
from math import sqrt

import numpy as np
import pytest
import torch
from reference_algebra import (
    Array,
    axis_basis,
    center_of,
    largest_sine,
    model_directions,
    project_models,
    ratios,
    relative_gap,
    squares,
    unfold,
)
from reference_cases import energy, rebuilt_stack

import eigenzoo as ez
from builders import random_factors, regauge, write_adapter
from eigenzoo.linalg.lora import TRUNCATION
from eigenzoo.linalg.spectrum import explained_variance_ratio
from eigenzoo.passes.resources import Resources
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.update_moments import update_grams
from tolerance import angle_tolerance, tolerance

MODULES = {"h.0.q": (10, 8), "h.0.up": (14, 8), "h.1.q": (10, 8)}
RANKS = (2, 4, 8, 3, 4, 2, 1)
ALPHAS = (2.0, 1.0, 16.0, 3.0, 0.5, 8.0, 4.0)
AXES = ("models", "outputs", "inputs")
SUBSETS = [
    axes for axes in chain.from_iterable(combinations(AXES, count) for count in (1, 2, 3)) if axes != ("models",)
]


def write_updates(root, dtype=torch.float32) -> tuple[list, dict[str, Array]]:
    """Adapters of mixed ranks, scales (rsLoRA too) and patterns; their folders, and every ΔW stack dense."""
    folders, dense = [], {module: [] for module in MODULES}
    for place, (rank, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
        rslora = place % 3 == 1
        factors = random_factors(MODULES, rank, seed=place, dtype=dtype)
        config = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
        if place == 3:
            factors["h.1.q"] = random_factors(MODULES, 5, seed=100, dtype=dtype)["h.1.q"]
            config |= {"rank_pattern": {"h.1.q": 5}, "alpha_pattern": {"h.1.q": 7}}
        folders.append(write_adapter(root / f"a{place}", factors, **config))
        for module, (b_OR, a_RI) in factors.items():
            patterned = place == 3 and module == "h.1.q"
            own_rank, own_alpha = (5, 7) if patterned else (rank, alpha)
            scale = own_alpha / (sqrt(own_rank) if rslora else own_rank)
            dense[module].append(scale * (b_OR.double() @ a_RI.double()).numpy())
    return folders, {module: np.stack(stack) for module, stack in dense.items()}


@pytest.fixture(scope="module", params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def written(dtype, tmp_path_factory):
    return write_updates(tmp_path_factory.mktemp("updates"), dtype)


def bound(stack_NOI: Array, dtype: torch.dtype = torch.float64) -> float:
    return tolerance(stack_NOI[0].size, dtype=dtype, scale=float((stack_NOI**2).max()) * len(stack_NOI))


# Two models have six ranks in all, fewer than a side is long: there the moments of sides are held as factors.
@pytest.mark.parametrize("num_models", [2, len(RANKS)])
@pytest.mark.parametrize("module", MODULES)
def test_moments_equal_the_dense_ones(written, module, num_models, monkeypatch):
    folders, dense = written
    stack_NOI = dense[module][:num_models]
    stack = ez.open_zoo(folders[:num_models]).stack(module)
    flat_ND = unfold(stack_NOI, "models")
    for tile_bytes in (2**26, 2000, 1):
        monkeypatch.setattr("eigenzoo.subspace.moments.update_moments.TILE_BYTES", tile_bytes)
        grams = update_grams(stack, Resources())
        assert np.abs(grams.raw_NN.numpy() - flat_ND @ flat_ND.T).max() <= bound(stack_NOI)
        assert np.abs(grams.sums_N.numpy() - flat_ND.sum(1)).max() <= bound(stack_NOI)
        singular = np.linalg.svd(stack_NOI, compute_uv=False)[:, : grams.singular_NR.shape[1]]
        # Roots of eigenvalues: right to half of the digits, relative to the largest.
        assert np.abs(grams.singular_NR.numpy() - singular).max() <= sqrt(tolerance(10)) * singular.max()
    for center in ("models", "none"):
        moments = collect(stack, AXES, center)
        centered_ND = unfold(stack_NOI - center_of(stack_NOI, center), "models")
        assert np.abs(moments.centered_NN.numpy() - centered_ND @ centered_ND.T).max() <= bound(stack_NOI)
        assert np.abs(moments.energies_N.numpy() - (flat_ND**2).sum(1)).max() <= bound(stack_NOI)
        share = num_models * energy(stack_NOI.mean(0)) / energy(stack_NOI)
        assert moments.mean_share == pytest.approx(share, abs=tolerance(100))
        for axis, side in (("outputs", moments.outputs), ("inputs", moments.inputs)):
            assert (side.factor_SP is not None) == (num_models == 2)
            expected = unfold(stack_NOI, axis) @ unfold(stack_NOI, axis).T
            assert np.abs(side.matrix_SS.numpy() - expected).max() <= bound(stack_NOI) * max(stack_NOI.shape)


@pytest.mark.parametrize("center", ["models", "none"])
@pytest.mark.parametrize("rank", [0, 2, 1.0])
def test_models_axis_is_pca_of_the_dense_updates(written, center, rank):
    folders, dense = written
    space = ez.fit(folders, rank=rank, center=center)
    for module, stack_NOI in dense.items():
        removed = center_of(stack_NOI, center)
        centered_NOI = stack_NOI - removed
        kept = space.report["layers"][module]["rank"]["models"]
        assert kept == (rank if rank != 1.0 else len(RANKS) - (center == "models"))
        found = explained_variance_ratio(space.moments(module).centered_NN).numpy()
        assert np.abs(found - ratios(centered_NOI)).max() <= tolerance(stack_NOI[0].size)
        rebuilt_NOI = rebuilt_stack(space, module)
        expected_NOI = removed + project_models(centered_NOI, kept)
        # Float32 coefficients; and factors of least rank leave out TRUNCATION of each update's energy at most.
        for rebuilt_OI, expected_OI in zip(rebuilt_NOI, expected_NOI, strict=True):
            room = sqrt(TRUNCATION * energy(expected_OI)) + tolerance(
                kept + 1, dtype=torch.float32, scale=sqrt(energy(stack_NOI))
            )
            assert sqrt(energy(rebuilt_OI - expected_OI)) <= room
        share = squares(centered_NOI, "models")[kept:].sum() / energy(stack_NOI)
        assert space.report["layers"][module]["residual"] == pytest.approx(share, abs=tolerance(100))


@pytest.mark.parametrize("num_models", [2, len(RANKS)])
@pytest.mark.parametrize("axes", SUBSETS, ids="+".join)
@pytest.mark.parametrize("center", ["models", "none"])
def test_sides_come_from_the_updates_about_zero_and_hold_the_mean(written, axes, center, num_models):
    folders, dense = written
    ranks = {axis: min(3, num_models - 1) if axis == "models" else 3 for axis in axes}
    space = ez.fit(folders[:num_models], rank=ranks, center=center, dtype="float64")
    for module, whole_NOI in dense.items():
        stack_NOI = whole_NOI[:num_models]
        left, right = (
            axis_basis(stack_NOI, axis, 3 if axis in axes else stack_NOI.shape[mode])
            for mode, axis in ((1, "outputs"), (2, "inputs"))
        )
        for axis, expected in (("outputs", left), ("inputs", right)):
            if axis in axes:
                found = space.layers[module].tensors.read(f"{module}/{axis}").numpy()
                gap = relative_gap(stack_NOI, axis, 3)
                assert largest_sine(found, expected) <= angle_tolerance(stack_NOI.size, gap)
        cores_NPQ = left.T @ stack_NOI @ right
        mean_PQ = cores_NPQ.mean(0) if center == "models" else 0.0
        if "models" in axes:
            cores_NPQ = mean_PQ + project_models(cores_NPQ - mean_PQ, ranks["models"])
        expected_NOI = left @ cores_NPQ @ right.T
        rebuilt_NOI = rebuilt_stack(space, module)
        for rebuilt_OI, expected_OI in zip(rebuilt_NOI, expected_NOI, strict=True):
            room = sqrt(TRUNCATION * energy(expected_OI)) + tolerance(
                4, dtype=torch.float32, scale=sqrt(energy(stack_NOI))
            )
            assert sqrt(energy(rebuilt_OI - expected_OI)) <= room
        share = energy(stack_NOI - expected_NOI) / energy(stack_NOI)
        assert space.report["layers"][module]["residual"] == pytest.approx(share, abs=tolerance(100))


def test_an_update_outside_the_zoo_is_projected_as_the_dense_one(written, tmp_path, dtype):
    folders, dense = written
    new = random_factors(MODULES, 6, seed=77, dtype=dtype)
    folder = write_adapter(tmp_path / "new", new, lora_alpha=3)
    for rank in ({"models": 3}, {"outputs": 3, "inputs": 4}):
        space = ez.fit(folders, rank=rank, dtype="float64")
        coefficients = space.project(folder)
        for module, stack_NOI in dense.items():
            b_OR, a_RI = new[module]
            update_OI = 3 / 6 * (b_OR.double() @ a_RI.double()).numpy()
            if "models" in rank:
                mean_OI = stack_NOI.mean(0)
                directions = model_directions(stack_NOI - mean_OI, 3)
                offset = (update_OI - mean_OI).ravel()
                expected_OI = mean_OI + (directions.T @ (directions @ offset)).reshape(mean_OI.shape)
                norms = sqrt(float((coefficients.values[module].double() ** 2).sum()))
                bound32 = tolerance(3, dtype=torch.float32, scale=sqrt(energy(update_OI)))
                assert norms == pytest.approx(float(np.linalg.norm(directions @ offset)), abs=bound32)
            else:
                left, right = axis_basis(stack_NOI, "outputs", 3), axis_basis(stack_NOI, "inputs", 4)
                expected_OI = left @ left.T @ update_OI @ right @ right.T
            share = energy(update_OI - expected_OI) / energy(update_OI)
            assert coefficients.residuals[module] == pytest.approx(share, abs=tolerance(100))
            rebuilt_OI = space.rebuild(coefficients).layer(module).numpy()
            room = sqrt(TRUNCATION * energy(expected_OI)) + tolerance(
                4, dtype=torch.float32, scale=sqrt(energy(stack_NOI))
            )
            assert sqrt(energy(rebuilt_OI - expected_OI)) <= room


def test_a_saved_adapter_is_the_rebuilt_update(written, tmp_path, dtype):
    folders, _ = written
    space = ez.fit(folders, rank=2)
    name = space.names[3]
    folder = space.rebuild(name).save(tmp_path / "out")
    stack = ez.open_zoo([folder]).stack("h.1.q")
    b_OR, a_RI = stack.factors(0)
    expected_OI = space.rebuild(name).layer("h.1.q")
    error = float((b_OR @ a_RI - expected_OI).abs().max())
    # Factors are rounded to the adapter's dtype: one rounding each in a sum over their rank.
    scale = float(b_OR.abs().max() * a_RI.abs().max()) * b_OR.shape[1]
    assert error <= tolerance(1, dtype=dtype, scale=scale) + 1e-12 * scale


def test_gauge_changes_change_nothing(tmp_path):
    plain, turned = [], []
    for place in range(5):
        factors = random_factors(MODULES, 3, seed=place, dtype=torch.float64)
        plain.append(write_adapter(tmp_path / f"plain{place}", factors))
        turned.append(write_adapter(tmp_path / f"turned{place}", regauge(factors, seed=place)))
    first, second = (ez.fit(zoo, rank={"models": 2, "outputs": 3}) for zoo in (plain, turned))
    for module, shape in MODULES.items():
        grams = [space.moments(module).centered_NN for space in (first, second)]
        # regauge stretches rows by up to three either way: products of factors grow by 81.
        size = 81 * tolerance(shape[0] * shape[1], scale=float(grams[0].abs().max()))
        assert float((grams[0] - grams[1]).abs().max()) <= size
        found = [rebuilt_stack(space, module) for space in (first, second)]
        bound32 = tolerance(4, dtype=torch.float32, scale=float(np.abs(found[0]).max()))
        assert np.abs(found[0] - found[1]).max() <= bound32
    assert ez.fit([*plain, turned[2]], rank=2).report["duplicates"] == [["plain2", "turned2"]]


def test_fresh_adapters_have_nothing_to_keep(tmp_path):
    folders = []
    for place in range(3):
        factors = random_factors(MODULES, 2, seed=place)
        zeroed = {module: (torch.zeros_like(b_OR), a_RI) for module, (b_OR, a_RI) in factors.items()}
        folders.append(write_adapter(tmp_path / f"a{place}", zeroed))
    for axes in [("models",), *SUBSETS]:
        space = ez.fit(folders, rank=1.0, axes=axes)
        for module in MODULES:
            assert space.report["layers"][module]["rank"] == dict.fromkeys(axes, 0)
            assert np.abs(rebuilt_stack(space, module)).max() == 0
        assert space.report["residual"] == 0
        assert space.project(folders[0]).residual == 0


def test_equal_updates_keep_their_mean(tmp_path):
    factors = random_factors(MODULES, 2, seed=0)
    folders = [write_adapter(tmp_path / f"a{place}", factors) for place in range(3)]
    for axes in [("models",), *SUBSETS]:
        space = ez.fit(folders, rank=1.0, axes=axes)
        for module, (b_OR, a_RI) in factors.items():
            expected_OI = (b_OR.double() @ a_RI.double()).numpy()
            for rebuilt_OI in rebuilt_stack(space, module):
                room = sqrt(TRUNCATION * energy(expected_OI)) + tolerance(
                    3, dtype=torch.float32, scale=sqrt(energy(expected_OI))
                )
                assert sqrt(energy(rebuilt_OI - expected_OI)) <= room
            assert space.report["layers"][module]["note"] == "no variance"
