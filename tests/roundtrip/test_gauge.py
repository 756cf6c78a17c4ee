"""A LoRA update is B·A: A → MA, B → BM⁻¹ is another pair of factors of the same update, and must change nothing."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

import eigenzoo as ez
from builders import Factors, random_factors, read_update, regauge, write_adapter

MODULES = {"model.layers.0.q_proj": (20, 24), "model.layers.0.up_proj": (30, 24), "model.layers.1.q_proj": (20, 24)}
AXES = [("models",), ("outputs", "inputs"), ("models", "outputs")]
ROUND_OFF = 1e-5
"""Float32 factors, inverted and multiplied by matrices of condition 9: a few 1e-7 of the update, more after squares and sums."""


def write_zoo(root: Path, factors: list[dict[str, Factors]], alphas: list[float]) -> Path:
    for number, (model, alpha) in enumerate(zip(factors, alphas, strict=True)):
        write_adapter(root / f"a{number}", model, lora_alpha=alpha)
    return root


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """One zoo by two gauges: ranks 2 to 4, and in the second alphas four times as large over factors B a quarter as large."""
    ranks = [2, 3, 4, 3, 2]
    factors = [random_factors(MODULES, rank, seed) for seed, rank in enumerate(ranks)]
    changed = [
        {name: (b / 4, a) for name, (b, a) in regauge(model, 50 + number).items()}
        for number, model in enumerate(factors)
    ]
    plain = write_zoo(tmp_path / "plain", factors, [2 * rank for rank in ranks])
    return plain, write_zoo(tmp_path / "changed", changed, [8 * rank for rank in ranks])


def coefficients_gram(space: ez.Subspace, layer: str) -> torch.Tensor:
    """Inner products of the models' coefficients: free of the signs and rotations that a basis is only known up to."""
    rows = torch.stack([space.coefficients(name).values[layer].flatten() for name in space.names]).double()
    return rows @ rows.T


def test_the_gauge_changes_the_factors_and_not_the_update(pair: tuple[Path, Path]) -> None:
    """What the other tests rest on; without it they would pass for a gauge that does nothing."""
    plain, changed = pair
    for module in MODULES:
        update, other = read_update(plain / "a2", module), read_update(changed / "a2", module)
        assert (update - other).norm() < ROUND_OFF * update.norm()
    spaces = [ez.fit(folder / "a2", view="factors", rank=1.0) for folder in pair]
    layer = f"{next(iter(MODULES))}.lora_A"
    first, second = (space.rebuild("a2").layer(layer) for space in spaces)
    assert (first - second).norm() > 0.5 * first.norm()


@pytest.mark.parametrize("axes", AXES, ids="+".join)
@pytest.mark.parametrize("rank", [1, 0.7, "auto", 1.0])
def test_a_gauge_changes_no_fit(pair: tuple[Path, Path], axes: tuple[str, ...], rank: int | float | str) -> None:
    first, second = (ez.fit(folder, rank=rank, axes=axes) for folder in pair)
    assert first.view == "update"
    for layer in MODULES:
        before, after = first.report["layers"][layer], second.report["layers"][layer]
        assert after["rank"] == before["rank"]
        assert after["note"] == before["note"]
        for key in ("captured", "mean_energy", "residual"):
            assert after[key] == pytest.approx(before[key], abs=ROUND_OFF), key
        gram, other = coefficients_gram(first, layer), coefficients_gram(second, layer)
        assert (gram - other).norm() <= ROUND_OFF * float(first.moments(layer).energies_N.sum())
        for name in first.names:
            update, rebuilt = first.rebuild(name).layer(layer), second.rebuild(name).layer(layer)
            assert (update - rebuilt).norm() <= 10 * ROUND_OFF * float(first.moments(layer).energies_N.sum()) ** 0.5


def test_a_gauge_changes_no_moment_and_no_spectrum(pair: tuple[Path, Path]) -> None:
    first, second = (ez.fit(folder, rank=1.0) for folder in pair)
    for layer in MODULES:
        before, after = first.moments(layer).centered_NN, second.moments(layer).centered_NN
        assert (before - after).norm() <= ROUND_OFF * before.norm()
        spectrum, other = torch.linalg.eigvalsh(before), torch.linalg.eigvalsh(after)
        assert (spectrum - other).abs().max() <= ROUND_OFF * spectrum.max()
        dense = torch.stack([read_update(pair[0] / name, layer).flatten() for name in first.names])
        dense = dense - dense.mean(0)
        # And it is the right one: the updates multiplied out, in float64.
        assert (dense @ dense.T - before).norm() <= 1e-12 * before.norm()


@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_a_gauge_changes_no_projection(tmp_path: Path, pair: tuple[Path, Path], axes: tuple[str, ...]) -> None:
    space = ez.fit(pair[0], rank=2, axes=axes)
    unseen = random_factors(MODULES, 3, 77)
    write_adapter(tmp_path / "unseen", unseen, lora_alpha=6)
    write_adapter(tmp_path / "turned", regauge(unseen, 5, scale=2.0), lora_alpha=6)
    first, second = space.project(tmp_path / "unseen"), space.project(tmp_path / "turned")
    # Above 1 where the mean points elsewhere than the model.
    assert first.residual > 0.05
    assert second.residual == pytest.approx(first.residual, abs=ROUND_OFF)
    for layer in MODULES:
        assert second.residuals[layer] == pytest.approx(first.residuals[layer], abs=ROUND_OFF)
        size = read_update(tmp_path / "unseen", layer).norm()
        assert (first.values[layer] - second.values[layer]).norm() <= ROUND_OFF * size


def test_six_gauges_of_one_update_are_one_model(tmp_path: Path) -> None:
    """The case in which averaging and decomposing A and B apart lose half of the update."""
    factors = random_factors(MODULES, 4, 0)
    models = [factors, *(regauge(factors, seed, scale=2.0 ** (seed - 3)) for seed in range(1, 6))]
    zoo = write_zoo(tmp_path / "zoo", models, [8.0] * 6)
    space = ez.fit(zoo, rank=1)
    assert [tuple(pair) for pair in space.report["duplicates"]] == list(combinations(space.names, 2))
    assert len(space.report["duplicates"]) == 15
    for layer in space.report["layers"].values():
        assert layer["note"] == "no variance"
        assert layer["rank"] == {"models": 0}
        assert layer["captured"] is None
    for name in space.names:
        coefficients = space.project(zoo / name)
        assert coefficients.residual < 1e-6
        assert max(coefficients.residuals.values()) < 1e-6
        folder = space.rebuild(coefficients).save(tmp_path / name)
        for module, (b_OR, a_RI) in factors.items():
            update = 2 * b_OR.double() @ a_RI.double()
            assert (read_update(folder, module) - update).norm() < ROUND_OFF * update.norm()


def test_six_different_updates_are_no_duplicates(tmp_path: Path) -> None:
    """The counterpart: also not those of one direction and two sizes."""
    models = [random_factors(MODULES, 4, seed) for seed in range(5)]
    models.append({name: (1.01 * b, a) for name, (b, a) in models[0].items()})
    space = ez.fit(write_zoo(tmp_path / "zoo", models, [8.0] * 6), rank=1)
    assert space.report["duplicates"] == []
    assert all(layer["note"] != "no variance" for layer in space.report["layers"].values())
