"""The rank and the scale of a LoRA update, by PEFT's rules, from its `adapter_config.json` alone.

ΔW = s·B·A with s = alpha/r, or alpha/√r with `use_rslora`. `rank_pattern` and `alpha_pattern` override both for modules
whose name matches one of their keys: as PEFT does (`peft.utils.other.get_pattern_key`, 0.21), the first key for
which `(.*\\.)?(key)$` matches the module's name from its beginning.
Source: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA). Deviation: keys whose regular expression could take
minutes are refused, because they come from files of other people. A negative alpha is refused too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from eigenzoo.errors import FormatError, UnsupportedError

DEFAULT_RANK = 8
DEFAULT_ALPHA = 8
_MAX_PATTERN = 1024
# At most 2 ** 8 choices, and less than a second for the repetitions in the worst case.
_MAX_OPTIONAL = 8
_MAX_STEPS = 5e7


def lora_rank(config: Mapping[str, Any], module: str) -> int:
    """Give the rank that the config states for a module.

    >>> lora_rank({"r": 8, "rank_pattern": {"q_proj": 4}}, "model.layers.0.self_attn.q_proj")
    4
    """
    key, value = _of_module(config, "rank_pattern", "r", DEFAULT_RANK, module)
    if type(value) is not int or value < 1:
        raise FormatError(f"{key} is {_shown(value)}", rule="a rank is a positive integer")
    return value


def lora_alpha(config: Mapping[str, Any], module: str) -> float:
    """Give the alpha that the config states for a module: finite, and not negative.

    >>> lora_alpha({"lora_alpha": 16, "alpha_pattern": {r"layers\\.0\\..*": 2}}, "model.layers.0.mlp.up_proj")
    2.0
    """
    key, value = _of_module(config, "alpha_pattern", "lora_alpha", DEFAULT_ALPHA, module)
    if type(value) not in (int, float) or not -1e300 < value < 1e300:
        raise FormatError(f"{key} is {_shown(value)}", rule="alpha is a finite number")
    if value < 0:
        raise FormatError(
            f"{key} is {_shown(value)}", rule="alpha is not negative", next_step="negate the B factors instead"
        )
    return float(value)


def lora_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Give the factor s that PEFT multiplies B·A by for a module of this rank.

    Args:
        config: the parsed adapter config.
        module: the module's name in the base model, without PEFT's prefix `base_model.model.`.
        rank: the rank of the factors in the file.

    >>> lora_scale({"lora_alpha": 16, "use_rslora": True}, "q_proj", 64)
    2.0
    """
    if rank < 1:
        raise FormatError(f"rank {rank} is not valid", rule="a rank is a positive integer")
    rslora = config.get("use_rslora", False)
    if rslora is not None and not isinstance(rslora, bool):
        raise FormatError(f"use_rslora is {_shown(rslora)}", rule="it is true or false")
    alpha = lora_alpha(config, module)
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _of_module(config: Mapping[str, Any], pattern: str, key: str, default: int, module: str) -> tuple[str, Any]:
    """Find the entry of the config that applies to a module. Return its name and its value."""
    values = config.get(pattern)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise FormatError(f"{pattern} is {_shown(values)}", rule="it maps module names to numbers")
    if values:
        match = _pattern_key(tuple(values), module)
        if match is not None:
            return f"{pattern}[{match!r}]", values[match]
    return key, config.get(key, default)


# Cached, because each adapter of a zoo has the same patterns and modules.
@lru_cache(maxsize=65536)
def _pattern_key(keys: tuple[str, ...], module: str) -> str | None:
    for key in keys:
        compiled, repetitions = _compiled(key)
        if float(len(module)) ** min(repetitions, 9) * (module.count(".") + 1) > _MAX_STEPS:
            raise _refused_pattern(key, f"has {repetitions} repetitions for a name of {len(module)} characters")
        if compiled.match(module):
            return key
    return None


@lru_cache(maxsize=65536)
def _compiled(key: str) -> tuple[re.Pattern[str], int]:
    """Compile a key as PEFT does, and count its unbounded repetitions."""
    plain = check_pattern(key)
    try:
        return re.compile(rf"(.*\.)?({key})$"), len(re.findall(r"[*+]|\{\d*,", plain))
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"the pattern {key[:100]!r} is not a regular expression ({error})") from error


def check_pattern(key: str) -> str:
    """Refuse a regular expression that could take minutes; gives it without escapes and classes, to count its operators in."""
    plain = re.sub(r"\\.", "x", key, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    if len(key) > _MAX_PATTERN:
        raise _refused_pattern(key, f"is longer than {_MAX_PATTERN} characters")
    if re.search(r"\)[*+{]", plain):
        raise _refused_pattern(key, "repeats a group")
    if len(re.findall(r"[^(*+}]\?|\{", plain)) > _MAX_OPTIONAL:
        raise _refused_pattern(key, f"has more than {_MAX_OPTIONAL} optional parts")
    return plain


def _refused_pattern(key: str, fault: str) -> UnsupportedError:
    return UnsupportedError(
        f"the pattern {key[:100]!r} {fault}",
        rule="patterns that could take minutes to match are refused",
        next_step="name the modules one by one in rank_pattern and alpha_pattern",
    )


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge integer"
    return text if len(text) <= 60 else text[:60] + "…"
