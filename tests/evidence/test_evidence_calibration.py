"""How often the verdict is wrong, over zoos of noise and zoos with planted directions: few of them, and always the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evidence_zoos import find, noise, normal, planted

from eigenzoo.evidence.layer_evidence import findings
from eigenzoo.evidence.unseen import capture
from eigenzoo.subspace.moments.layer_moments import from_raw_gram

pytestmark = pytest.mark.slow

SETTINGS = [(8, 12), (12, 20), (24, 16)]
"""Models, and the side of each layer's square matrix."""


def test_noise_is_hardly_ever_taken_for_structure(tmp_path: Path) -> None:
    """Norms are the models' own, the same in all layers: what they do to a test, they do to it everywhere."""
    codes = []
    for seed in range(30):
        num_models, side = SETTINGS[seed % 3]
        spread = (0.0, 0.5, 1.2)[seed // 3 % 3]
        norms_N = torch.exp(spread * normal(num_models, 1, 1, seed=seed + 300))
        stacks = {f"w{place}": norms_N * noise(num_models, (side, side), 1000 * seed + place) for place in range(3)}
        codes.append(find(tmp_path / str(seed), stacks, seed=seed).verdict.code)
    assert sum(code != "no-shared-structure" for code in codes) <= 2, codes


def test_planted_directions_are_always_found(tmp_path: Path) -> None:
    """Four directions at four times the strength at which they can be told from noise at all, in each of four layers."""
    codes = []
    for seed in range(12):
        num_models, side = [(32, 20), (40, 24), (60, 16)][seed % 3]
        # In units of the noise's variance per entry a direction is found from √(D / N) on (Baik, Ben Arous and Péché 2005).
        strength = 4 * (side * side / num_models) ** 0.5 / (side * side)
        stacks = {
            f"w{place}": planted(num_models, 4, strength, (side, side), 1000 * seed + place) for place in range(4)
        }
        codes.append(find(tmp_path / str(seed), stacks, seed=seed).verdict.code)
    assert codes == ["shared-subspace"] * 12


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_p_values_of_noise_are_no_smaller_than_they_say(spread: float) -> None:
    """Below p in no more than p of all layers; they are bounds, since they pay for the ranks tried."""
    found = []
    for seed in range(200):
        rows_ND = noise(16, (200,), seed, spread)
        found.append(findings(from_raw_gram(rows_ND @ rows_ND.T, 200), 200, None, seed)[0].directions)
    p_values = np.array([each.p_value for each in found])
    for level in (0.01, 0.05):
        # Three standard errors of a binomial of that chance.
        assert (p_values < level).mean() <= level + 3 * (level * (1 - level) / 200) ** 0.5
    assert sum(each.shared for each in found) <= 1


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_held_out_contrasts_of_noise_are_chance_on_average(spread: float) -> None:
    """Any k directions hold k / D of a contrast: the mean over many zoos is one, whatever the norms."""
    found = []
    for seed in range(100):
        rows_ND = noise(15, (120,), seed + 400, spread) + 5 * normal(1, 120, seed=seed)
        sums = capture(from_raw_gram(rows_ND @ rows_ND.T, 120), None, seed)
        assert sums is not None
        found.append(sums.over_chance)
    ratios = torch.tensor(found)
    error = ratios.std(0) / 10
    assert bool(((ratios.mean(0) - 1).abs() <= 4 * error + 0.01).all()), (ratios.mean(0), error)
