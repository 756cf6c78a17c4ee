"""Tell from a config alone on which modules of a base PEFT puts an adapter.

As `peft.tuners.tuners_utils.check_target_module_exists` does (0.21): `exclude_modules` and `modules_to_save` first, then
`target_modules`, a regular expression of the whole name or a list of names and endings, then `layers_to_transform`.
Deviation: regular expressions that could take minutes are refused, because they come from files of other people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.weights.lora_scale import check_pattern

ALL_LINEAR = "all-linear"
"""What PEFT replaces by the names of all linear modules when it saves."""

_MAX_STEPS = 5e8
_OF_PATTERNS, _MAX_PATTERNS = frozenset({"modules_to_save", "layers_pattern"}), 100


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether the config puts an adapter on a module of this name.

    Raises FormatError for entries of a wrong type, UnsupportedError for patterns that could take minutes.

    >>> is_target({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "model.layers.0.self_attn.q_proj")
    False
    """
    return targeting(config)(module)


def targeting(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return `is_target` of one config, whose lists are looked through once for all modules."""
    targets, is_left_out = config.get("target_modules"), _leaving_out(config)
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return lambda module: not is_left_out(module)
    if isinstance(targets, str):
        return lambda module: not is_left_out(module) and _matches(targets, module)
    names, is_in_layers = frozenset(_names(config, "target_modules")), _in_layers(config)

    def is_targeted(module: str) -> bool:
        if is_left_out(module):
            return False
        # By its whole name, in any layer.
        return module in names or (is_named_by(names, module) and is_in_layers(module))

    return is_targeted


def _leaving_out(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Tell whether `exclude_modules` or `modules_to_save` keep the adapter from a module."""
    excluded, saved = config.get("exclude_modules"), _names(config, "modules_to_save")
    names = frozenset(() if isinstance(excluded, str) else _names(config, "exclude_modules"))

    def is_left_out(module: str) -> bool:
        if _matches(excluded, module) if isinstance(excluded, str) else is_named_by(names, module):
            return True
        return any(_matches(rf"(^|.*\.){name}($|\..*)", module, name) for name in saved)

    return is_left_out


def is_named_by(names: Collection[str], module: str) -> bool:
    """Tell whether an entry of a set of names means a module: it is its name, or how its name ends."""
    return any(ending in names for ending in endings(module))


def endings(module: str) -> Iterator[str]:
    """Yield the names that mean a module in a list: its own, and what follows each of its dots.

    >>> list(endings("layers.0.q"))
    ['layers.0.q', '0.q', 'q']
    """
    yield module
    yield from (module[dot.end() :] for dot in re.finditer(r"\.", module))


def _in_layers(config: Mapping[str, Any]) -> Callable[[str], bool]:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return lambda module: True
    listed = [layers] if isinstance(layers, int) else layers
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise FormatError("layers_to_transform is not a list of numbers")
    wanted = frozenset(listed)
    patterns = config.get("layers_pattern")
    patterns = [patterns] if isinstance(patterns, str) and patterns else _names(config, "layers_pattern")
    tried = [(rf"(?:^|.*?\.){name}\.(?P<place>\d+)\..*", name) for name in patterns]

    def is_in_layers(module: str) -> bool:
        for pattern, name in tried or [(r".*?\.[^.]*\.(?P<place>\d+)\..*", "")]:
            match = _match(pattern, module, name)
            if match is not None:
                # A pattern may have its own group of this name. Then the number is that of this group.
                number = match["place"]
                return number is not None and number.isdigit() and int(number[:9]) in wanted
        return False

    return is_in_layers


def _names(config: Mapping[str, Any], key: str) -> Sequence[str]:
    names = config.get(key) or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{key} is not a list of names")
    if key in _OF_PATTERNS and len(names) > _MAX_PATTERNS:
        raise UnsupportedError(
            f"{key} has {len(names)} entries",
            rule=f"each is a pattern for every module, and at most {_MAX_PATTERNS} are tried",
        )
    return names


def _matches(pattern: str, module: str, own: str | None = None) -> bool:
    return _match(pattern, module, own) is not None


def _match(pattern: str, module: str, own: str | None = None) -> re.Match[str] | None:
    """Match a whole name. `own` is the part of the pattern that comes from a file."""
    compiled, repetitions = _compiled(pattern, pattern if own is None else own)
    # Consecutive repetitions can divide the name's characters in that many ways.
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
        raise FormatError(f"the pattern {own[:100]!r} is not a regular expression ({error})") from error
