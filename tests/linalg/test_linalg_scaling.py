"""Models at one norm, and held-out contrasts: from the Gram against weighted least squares on the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import seeded
from eigenzoo.linalg.gram import LEAST_SQUARE, SETTLED, center_gram, scale_models
from eigenzoo.linalg.heldout import FLOAT32_FROM, HeldOut, contrast, hold_out
from tolerance import tolerance

NORMS = {
    "even": lambda count: torch.ones(count, dtype=torch.float64),
    "uneven": lambda count: torch.logspace(-1, 1, count, dtype=torch.float64),
    "one giant": lambda count: torch.cat([torch.full((1,), 30.0), torch.ones(count - 1)]).double(),
}


def noise(num_models: int, num_values: int, norms: str, seed: int, offset: float = 0.0) -> Tensor:
    """Unrelated rows of these norms around a common mean `offset` times as long."""
    draw = seeded(seed)
    rows_ND = (
        torch.randn(num_models, num_values, generator=draw, dtype=torch.float64) * NORMS[norms](num_models)[:, None]
    )
    return rows_ND + offset * torch.randn(1, num_values, generator=draw, dtype=torch.float64)


def once_more(rows_ND: Tensor, squares_N: np.ndarray) -> np.ndarray:
    """s_n² again, on the weights: ‖x_n − weighted mean of the others‖², less the noise of that mean."""
    rows, found = rows_ND.numpy(), np.empty(len(rows_ND))
    for place in range(len(rows)):
        others = np.delete(np.arange(len(rows)), place)
        weights = 1 / squares_N[others] / (1 / squares_N[others]).sum()
        found[place] = ((rows[place] - weights @ rows[others]) ** 2).sum() - weights**2 @ squares_N[others]
    return found


@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_models_have_settled_at_one_norm_about_the_weighted_mean(norms, seed, offset):
    rows_ND = noise(14, 400, norms, seed, offset)
    scaled_NN, level_N = scale_models(center_gram(rows_ND @ rows_ND.T))
    squares_N = 1 / level_N.square().numpy()
    # Norms of two decades use up all rounds, and leave a hundredth of the smallest squares open.
    left_open = 0.02 if norms == "uneven" else 2 * SETTLED
    assert once_more(rows_ND, squares_N) / squares_N == pytest.approx(np.ones(14), abs=left_open)
    scaled_ND = (rows_ND - rows_ND.mean(0)) * level_N[:, None]
    bound = tolerance(400, scale=float(rows_ND.square().sum() * level_N.max().square()))
    assert float((scaled_NN - scaled_ND @ scaled_ND.T).abs().max()) <= bound


@pytest.mark.parametrize("norms", NORMS)
def test_the_norms_found_are_the_true_ones(norms):
    num_values = 20_000
    level_N = scale_models(center_gram((rows_ND := noise(20, num_values, norms, 2, 5.0)) @ rows_ND.T))[1]
    found_N = 1 / level_N / num_values**0.5
    # A sum of D squares knows its scale to √(2/D) / 2 = 0.5 %; of the largest of uneven norms all else is exact, of the
    # smallest the mean of the others is a part: four standard deviations, and twice that.
    assert found_N.tolist() == pytest.approx(NORMS[norms](20).tolist(), rel=0.04)


def test_the_mean_that_is_removed_is_that_of_generalised_least_squares():
    rows_ND = noise(14, 60, "uneven", 3, 20.0)
    scaled_NN, level_N = scale_models(rows_ND @ rows_ND.T)
    unit_N = level_N / level_N.norm()
    removed_NN = scaled_NN - torch.outer(unit_N, unit_N @ scaled_NN)
    removed_NN = removed_NN - torch.outer(removed_NN @ unit_N, unit_N)
    # Regress every value on a constant with weights 1 / s²: scaled residuals.
    weights_N = level_N.square()
    mean_D = weights_N @ rows_ND / weights_N.sum()
    residual_ND = (rows_ND - mean_D) * level_N[:, None]
    scale = float((rows_ND * level_N[:, None]).square().sum())
    assert float((removed_NN - residual_ND @ residual_ND.T).abs().max()) <= tolerance(60, scale=scale)


def test_a_copy_of_the_mean_is_not_blown_up():
    rows_ND = noise(9, 40, "even", 4)
    rows_ND = torch.cat([rows_ND, rows_ND.mean(0, keepdim=True)])
    scaled_NN, level_N = scale_models(center_gram(rows_ND @ rows_ND.T))
    assert float(level_N.max() / level_N.median()) <= 1.2 / LEAST_SQUARE**0.5
    assert bool(scaled_NN.isfinite().all())


def dense_contrast(rows_ND: Tensor, level_N: Tensor, fitted: Tensor, held: Tensor) -> tuple[np.ndarray, float, float]:
    """Cumulative energy of the held-out residuals along the fitted ones' directions, all of it, and that of an average one."""

    def residuals(places: Tensor) -> np.ndarray:
        weights = level_N[places].square()
        mean_D = weights @ rows_ND[places] / weights.sum()
        return ((rows_ND[places] - mean_D) * level_N[places][:, None]).numpy()

    _, values, vectors_KD = np.linalg.svd(residuals(fitted), full_matrices=False)
    kept = values > 1e-8 * values[0]
    along_K = ((residuals(held) @ vectors_KD[kept].T) ** 2).sum(0)
    return (
        np.cumsum(along_K),
        float((residuals(held) ** 2).sum()),
        float(values[kept] ** 2 @ along_K / (values**2).sum()),
    )


@pytest.mark.parametrize("num_values", [60, 5])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_contrasts_are_those_of_the_weights(norms, seed, num_values):
    rows_ND = noise(14, num_values, norms, seed, 10.0)
    order = torch.randperm(14, generator=seeded(seed))
    fitted, held = order[:10], order[10:]
    scaled_NN, level_N = scale_models(center_gram(rows_ND @ rows_ND.T))
    found = contrast(scaled_NN, level_N, fitted, held)
    captured_K, energy, cloud = dense_contrast(rows_ND, level_N, fitted, held)
    # The mean that is left in the scaled rows, which the projection cancels.
    bound = tolerance(num_values, scale=float(scaled_NN.diagonal().sum()) * 100)
    assert found.captured_K.numpy() == pytest.approx(captured_K, abs=bound * 10)
    assert found.energy == pytest.approx(energy, abs=bound)
    assert found.cloud == pytest.approx(cloud, abs=bound)
    assert found.freedom == 3


def test_contrasts_of_large_zoos_are_right_to_float32():
    num_models, num_fitted = FLOAT32_FROM + 60, FLOAT32_FROM + 20
    rows_ND = noise(num_models, 400, "uneven", 5)
    fitted, held = torch.arange(num_fitted), torch.arange(num_fitted, num_models)
    scaled_NN, level_N = scale_models(center_gram(rows_ND @ rows_ND.T))
    found = contrast(scaled_NN, level_N, fitted, held)
    captured_K, energy, cloud = dense_contrast(rows_ND, level_N, fitted, held)
    assert found.captured_K.dtype == torch.float64
    # Shares; neighbouring eigenvalues lie a thousandth of the largest apart, and directions turn by float32 over that.
    assert found.captured_K[:16].numpy() / energy == pytest.approx(captured_K[:16] / energy, abs=1e-4)
    assert found.energy == pytest.approx(energy, rel=1e-9)
    assert found.cloud == pytest.approx(cloud, rel=1e-4)


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("norms", ["even", "one giant"])
def test_copies_have_neither_directions_nor_contrasts(norms, count):
    """Of most counts the mean of equal numbers is not that number to the last bit: what is left over is no direction."""
    first_D, second_D = noise(2, 30, norms, 6)
    rows_ND = torch.stack([first_D] * count + [second_D] * 3)
    gram_NN = center_gram(rows_ND @ rows_ND.T)
    fitted, held = torch.arange(count), torch.arange(count, count + 3)
    scaled_NN, level_N = scale_models(gram_NN)
    found = contrast(scaled_NN, level_N, fitted, held)
    assert found.captured_K.numel() == 0
    assert found.cloud <= tolerance(30)
    assert found.energy <= tolerance(30, scale=float(scaled_NN.diagonal().sum()))
    near_ND = rows_ND + 1e-8 * noise(count + 3, 30, "even", 7)
    for seen in (hold_out(gram_NN, fitted, held), hold_out(center_gram(near_ND @ near_ND.T), fitted, held)):
        _assert_no_directions(seen, first_D, second_D)


def _assert_no_directions(seen: HeldOut, first_D: Tensor, second_D: Tensor) -> None:
    assert seen.captured_K.numel() == seen.in_sample_K.numel() == 0
    assert seen.fitted_energy == 0
    assert seen.energy == pytest.approx(3 * float((first_D - second_D).square().sum()), rel=1e-6)
