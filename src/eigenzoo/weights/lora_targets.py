"""Which modules of a base PEFT puts an adapter on, by its config alone.

As `peft.tuners.tuners_utils.check_target_module_exists` does (0.21): `exclude_modules` and `modules_to_save` first, then
`target_modules`, a regular expression of the whole name or a list of names and endings, then `layers_to_transform`.
Deviation: regular expressions that could take minutes are refused, for they come out of files that others wrote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.weights.lora_scale import check_pattern

ALL_LINEAR = "all-linear"
"""What PEFT replaces by the names of all linear modules when it saves."""

_MAX_STEPS = 5e8


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether the config puts an adapter on a module of this name.

    Raises FormatError for entries of a wrong type, UnsupportedError for patterns that could take minutes.

    >>> is_target({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "model.layers.0.self_attn.q_proj")
    False
    """
    targets = config.get("target_modules")
    if is_left_out(config, module):
        return False
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return True
    if isinstance(targets, str):
        return _matches(targets, module)
    names = _names(config, "target_modules")
    if module in names:  # by its whole name, whatever its layer
        return True
    return any(is_named(name, module) for name in names) and _is_in_layers(config, module)


def is_left_out(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether `exclude_modules` or `modules_to_save` keep the adapter from a module."""
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and _matches(excluded, module):
        return True
    if not isinstance(excluded, str) and any(is_named(name, module) for name in _names(config, "exclude_modules")):
        return True
    return any(_matches(rf"(^|.*\.){name}($|\..*)", module, name) for name in _names(config, "modules_to_save"))


def is_named(name: str, module: str) -> bool:
    """Tell whether an entry of a list of names means a module: it is its name, or how its name ends."""
    return module == name or module.endswith(f".{name}")


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    wanted = [layers] if isinstance(layers, int) else layers
    if not isinstance(wanted, list) or not all(type(layer) is int for layer in wanted):
        raise FormatError("layers_to_transform is no list of numbers")
    patterns = config.get("layers_pattern")
    patterns = [patterns] if isinstance(patterns, str) and patterns else _names(config, "layers_pattern")
    tried = [(rf"(?:^|.*?\.){name}\.(?P<place>\d+)\..*", name) for name in patterns]
    for pattern, name in tried or [(r".*?\.[^.]*\.(?P<place>\d+)\..*", "")]:
        found = _match(pattern, module, name)
        if found is not None:
            # A pattern may name a group of its own so; then the number is that one's.
            place = found["place"]
            return place is not None and place.isdigit() and int(place[:9]) in wanted
    return False


def _names(config: Mapping[str, Any], key: str) -> Sequence[str]:
    names = config.get(key) or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{key} is no list of names")
    return names


def _matches(pattern: str, module: str, own: str | None = None) -> bool:
    return _match(pattern, module, own) is not None


def _match(pattern: str, module: str, own: str | None = None) -> re.Match[str] | None:
    """Match a whole name; `own` is the part of the pattern that came out of a file."""
    compiled, repetitions = _compiled(pattern, pattern if own is None else own)
    # Repetitions one after the other share the name's characters among them in that many ways.
    if math.comb(len(module) + repetitions, repetitions) * len(module) > _MAX_STEPS:
        raise UnsupportedError(
            f"the pattern {pattern[:100]!r} has {repetitions} repetitions for a name of {len(module)} characters",
            rule="patterns that could take minutes to match are not tried",
        )
    return compiled.fullmatch(module)


@lru_cache(maxsize=4096)
def _compiled(pattern: str, own: str) -> tuple[re.Pattern[str], int]:
    plain = check_pattern(own)
    repetitions = len(re.findall(r"[*+]|\{\d*,", plain)) + (pattern != own) * 2
    try:
        return re.compile(pattern), repetitions
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"the pattern {own[:100]!r} is no regular expression ({error})") from error
