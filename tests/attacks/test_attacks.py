"""Every attack of the tables, held to the promise of README.md beside this file."""

from __future__ import annotations

import attacks_adapt
import attacks_bundles
import attacks_configs
import attacks_diffusion
import attacks_imports
import attacks_names
import attacks_outputs
import attacks_paths
import attacks_pickle
import attacks_safetensors
import attacks_verify
import attacks_words
import pytest
from attack_runner import Attack, Ran, Sandbox, carry_out

FAMILIES = (
    attacks_pickle,
    attacks_safetensors,
    attacks_configs,
    attacks_paths,
    attacks_names,
    attacks_bundles,
    attacks_outputs,
    attacks_adapt,
    attacks_verify,
    attacks_imports,
    attacks_diffusion,
    attacks_words,
)
ATTACKS = [attack for family in FAMILIES for attack in family.ATTACKS]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack: Attack, sandbox: Sandbox, figures: list[tuple[str, Ran]]) -> None:
    carry_out(attack, sandbox)
