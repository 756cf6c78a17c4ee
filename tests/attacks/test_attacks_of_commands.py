"""The attacks on single commands and kinds of models, held to the promise of README.md beside this file."""

from __future__ import annotations

import attacks_adapt
import attacks_beside
import attacks_diffusion
import attacks_factors
import attacks_imports
import attacks_merge
import attacks_route
import attacks_verify
import attacks_words
import pytest
from attack_runner import Attack, Sandbox, carry_out, thinned

FAMILIES = (
    attacks_adapt,
    attacks_beside,
    attacks_verify,
    attacks_imports,
    attacks_merge,
    attacks_diffusion,
    attacks_factors,
    attacks_route,
    attacks_words,
)
ATTACKS = [attack for family in FAMILIES for attack in family.ATTACKS]


@pytest.mark.parametrize("attack", thinned(ATTACKS))
def test_attack(attack: Attack, sandbox: Sandbox) -> None:
    carry_out(attack, sandbox)
