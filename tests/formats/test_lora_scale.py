"""Rank and scale from the config alone, against PEFT's own matching of patterns."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.weights.lora_scale import lora_alpha, lora_rank, lora_scale

MODULES = ("q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "layers.0", "xq_proj")
KEYS = ("q_proj", r"layers\.0\..*", r"layers.(0|1)\..*\.q_proj", "^model.layers.10.mlp.up_proj", "up_proj|q_proj", "l?")


@given(st.permutations(KEYS).flatmap(lambda keys: st.integers(0, len(keys)).map(lambda n: keys[:n])))
def test_patterns_are_matched_as_peft_does(keys: list[str]) -> None:
    ranks = {key: number + 2 for number, key in enumerate(keys)}
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": {k: 10 * v for k, v in ranks.items()}}
    for module in MODULES:
        expected = ranks.get(get_pattern_key(ranks.keys(), module), 1)
        assert lora_rank(config, module) == expected
        assert lora_alpha(config, module) == (10 * expected if expected > 1 else 1)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 0.25), (True, 1.0), (None, 0.25)])
def test_the_scale_is_alpha_over_rank_or_its_root(rslora: bool | None, expected: float) -> None:
    assert lora_scale({"lora_alpha": 4, "use_rslora": rslora}, "x", 16) == expected
    assert math.isclose(lora_scale({"lora_alpha": 4, "use_rslora": True}, "x", 2), 4 / math.sqrt(2))


def test_defaults_are_peft_s() -> None:
    assert (lora_rank({}, "x"), lora_alpha({"alpha_pattern": None}, "x")) == (8, 8.0)


BAD = {
    "nan alpha": ({"lora_alpha": math.nan}, "lora_alpha is nan"),
    "infinite alpha": ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    "huge alpha": ({"lora_alpha": 10**400}, "lora_alpha is a huge integer"),
    "negative alpha": ({"lora_alpha": -2}, "lora_alpha is -2.*negate the B factors|lora_alpha is -2.*Negate"),
    "text alpha": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "true alpha": ({"lora_alpha": True}, "lora_alpha is True"),
    "list pattern": ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
    "null in pattern": ({"alpha_pattern": {"x": None}}, r"alpha_pattern\['x'\] is None"),
    "text rslora": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    "bad regex": ({"alpha_pattern": {"(": 1}}, r"the pattern '\(' is not a regular expression"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_entry_is_named(case: str) -> None:
    config, message = BAD[case]
    with pytest.raises(FormatError, match=message):
        lora_scale(config, "x", 4)


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", True, None])
def test_a_bad_rank_is_named(rank: object) -> None:
    with pytest.raises(FormatError, match=rf"r is {re.escape(repr(rank))}"):
        lora_rank({"r": rank}, "x")
    with pytest.raises(FormatError, match=r"rank_pattern\['x'\] is"):
        lora_rank({"rank_pattern": {"x": rank}}, "x")
    with pytest.raises(FormatError, match="rank 0"):
        lora_scale({}, "x", 0)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a*){20}b", "a?" * 30 + "a" * 30, ".*.*.*.*.*.*b", "(?:a+)+b", "a" * 2000, "[)](a+)+"],
)
def test_a_pattern_that_could_take_minutes_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedError, match=r"could take minutes.*[Nn]ame the modules"):
        lora_rank({"rank_pattern": {pattern: 4}}, "a." * 50)
