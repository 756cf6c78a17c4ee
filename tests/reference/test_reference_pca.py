"""Axis `models` of full weights: through files and the public API against numpy's SVD and scikit-learn's PCA.

Bases are stored in float64 here, so that subspaces are compared to float64 round-off; coefficients are float32 by format.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reference_algebra import center_of, largest_sine, model_directions, project_models, ratios, relative_gap, squares
from reference_cases import DTYPES, SHAPES, energy, rebuilt_stack, stacks, stored, write_zoo
from sklearn.decomposition import PCA

import eigenzoo as ez
from eigenzoo.linalg.spectrum import NUMERICAL_RANK, explained_variance_ratio
from tolerance import angle_tolerance, tolerance

RANK = 3
CENTERS = ("models", "none", "columns", "global")


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def zoo(dtype, tmp_path_factory) -> list[Path]:
    return write_zoo(tmp_path_factory.mktemp("zoo"), dtype)


@pytest.fixture(scope="module", params=CENTERS)
def fitted(request, zoo):
    return request.param, ez.fit(zoo, rank=RANK, center=request.param, dtype="float64")


def kept_rank(values: np.ndarray, whole: float) -> int:
    """The rule of the docstrings: what is asked, of what is above round-off; nothing where nothing varies."""
    return min(RANK, int((values > NUMERICAL_RANK * values[0]).sum())) if values.sum() > 1e-12 * whole else 0


@pytest.mark.parametrize("layer", SHAPES)
def test_spectrum_energies_directions_and_reconstruction(fitted, dtype, layer):
    center, space = fitted
    stack_NOI = stored(stacks()[layer], dtype)
    removed = center_of(stack_NOI, center)
    centered_NOI = stack_NOI - removed
    values, whole, total = squares(centered_NOI, "models"), energy(stack_NOI), energy(centered_NOI)
    rank = kept_rank(values, whole)
    record, basis = space.report["layers"][layer], space.layers[layer]
    # Round-off of a Gram is a share of the energy about the models' mean and, for other centers, of the mean's too.
    size = stack_NOI[0].size

    assert record["rank"] == {"models": rank}
    if rank:
        found = explained_variance_ratio(space.moments(layer).centered_NN).numpy()
        assert np.abs(found - ratios(centered_NOI)).max() <= tolerance(size)
        assert record["captured"] == pytest.approx(values[:rank].sum() / total, abs=tolerance(size))
    else:
        assert record["captured"] is None
        assert record["note"] == "no variance"
    left_out = values[rank:].sum()
    assert record["residual"] == pytest.approx(left_out / whole if whole else 0.0, abs=tolerance(size))

    gap = relative_gap(centered_NOI, "models", rank)
    if gap > NUMERICAL_RANK:
        directions = basis.tensors.read(f"{layer}/models").reshape(rank, -1).double().numpy()
        assert (
            np.abs(directions @ directions.T - np.eye(rank)).max() <= 1e-6
        )  # flat.ORTHONORMAL: corrected only above it
        assert largest_sine(directions.T, model_directions(centered_NOI, rank).T) <= angle_tolerance(size, gap)
    # A float32 coefficient loses eps of itself; where there is no gap, errors are equal though directions differ.
    bound = tolerance(rank + 1, dtype=torch.float32, scale=float(np.abs(centered_NOI).max()) + 1e-300)
    rebuilt_NOI = rebuilt_stack(space, layer)
    if gap > 1e-6:
        assert np.abs(rebuilt_NOI - removed - project_models(centered_NOI, rank)).max() <= bound
    assert (
        abs(energy(stack_NOI - rebuilt_NOI) - left_out)
        <= tolerance(size, dtype=torch.float32, scale=total) + 1e-12 * whole
    )


def test_the_same_as_scikit_learn(zoo, dtype):
    space = ez.fit(zoo, rank=RANK, dtype="float64")
    for layer in ("random", "wide", "noisy", "kernel"):
        flat_ND = stored(stacks()[layer], dtype).reshape(len(zoo), -1)
        pca = PCA(RANK, svd_solver="full").fit(flat_ND)
        found = explained_variance_ratio(space.moments(layer).centered_NN)[:RANK].numpy()
        assert np.abs(found - pca.explained_variance_ratio_).max() <= tolerance(flat_ND.shape[1])
        gap = relative_gap((flat_ND - flat_ND.mean(0))[:, :, None], "models", RANK)
        directions = space.layers[layer].tensors.read(f"{layer}/models").reshape(RANK, -1).numpy()
        assert largest_sine(directions.T, pca.components_.T) <= angle_tolerance(flat_ND.shape[1], gap)
        rebuilt_ND = rebuilt_stack(space, layer).reshape(len(zoo), -1)
        assert np.abs(rebuilt_ND - pca.inverse_transform(pca.transform(flat_ND))).max() <= tolerance(
            RANK + 1, dtype=torch.float32, scale=np.abs(flat_ND).max()
        )


@pytest.mark.parametrize("axes", [("models",), ("outputs",), ("outputs", "inputs"), ("models", "outputs", "inputs")])
@pytest.mark.parametrize("center", ["models", "none"])
def test_one_model_is_its_own_mean_or_its_own_direction(tmp_path, axes, center):
    zoo = write_zoo(tmp_path, num_models=1)
    space = ez.fit(zoo, rank=1.0, axes=axes, center=center)
    assert space.report["residual"] <= tolerance(1, dtype=torch.float32) ** 2
    for layer in SHAPES:
        stack_NOI = stored(stacks(1)[layer], torch.float32)
        record = space.report["layers"][layer]
        if center == "models" or layer == "zero":
            assert set(record["rank"].values()) == {0}
            assert record["note"] == "no variance"
        bound = tolerance(2, dtype=torch.float32, scale=np.abs(stack_NOI).max())
        assert np.abs(rebuilt_stack(space, layer) - stack_NOI).max() <= bound


def test_a_model_outside_the_zoo_is_projected_as_numpy_does(tmp_path, dtype, zoo):
    (outside,) = write_zoo(tmp_path, dtype, num_models=1)
    space = ez.fit(zoo, rank=RANK, dtype="float64")
    coefficients = space.project(outside)
    lost = whole = 0.0
    for layer in SHAPES:
        stack_NOI, new_OI = stored(stacks()[layer], dtype), stored(stacks(1)[layer], dtype)[0]
        centered_NOI = stack_NOI - stack_NOI.mean(0)
        rank = space.report["layers"][layer]["rank"]["models"]
        directions = model_directions(centered_NOI, rank)
        offset = (new_OI - stack_NOI.mean(0)).reshape(-1)
        outside_energy = float(((offset - directions.T @ (directions @ offset)) ** 2).sum())
        lost, whole = lost + outside_energy, whole + energy(new_OI)
        if rank and relative_gap(centered_NOI, "models", rank) < 1e-6:
            continue
        share = outside_energy / energy(new_OI) if energy(new_OI) else 0.0
        # The correction of flat.ORTHONORMAL leaves 1e-6; energies outside move by its square.
        assert coefficients.residuals[layer] == pytest.approx(share, abs=1e-10)
    assert coefficients.residual == pytest.approx(lost / whole, abs=1e-10)
