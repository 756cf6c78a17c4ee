"""The attacks by files and names, held to the promise of README.md beside this file."""

from __future__ import annotations

import attacks_bundles
import attacks_configs
import attacks_names
import attacks_outputs
import attacks_paths
import attacks_pickle
import attacks_safetensors
import pytest
from attack_runner import Attack, Sandbox, carry_out, thinned

FAMILIES = (
    attacks_pickle,
    attacks_safetensors,
    attacks_configs,
    attacks_paths,
    attacks_names,
    attacks_bundles,
    attacks_outputs,
)
ATTACKS = [attack for family in FAMILIES for attack in family.ATTACKS]


@pytest.mark.parametrize("attack", thinned(ATTACKS))
def test_attack(attack: Attack, sandbox: Sandbox) -> None:
    carry_out(attack, sandbox)
