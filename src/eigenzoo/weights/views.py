"""Views, axes and centrings: the values that users may choose, and their rules."""

from __future__ import annotations

from collections.abc import Iterable

from eigenzoo.errors import UsageError

VIEWS = ("weight", "delta", "update", "factors")
"""`weight` as it is; `delta` minus a base; `update` the scaled s·B·A of a LoRA; `factors` its A and s·B on their own."""

AXES = ("models", "outputs", "inputs")
"""The three modes of a layer's stack."""

CENTERS = ("models", "columns", "none", "global")
"""What is removed before a moment: the mean over models entry by entry, one mean per input column, nothing, one scalar."""


def check_choice(value: str, choices: tuple[str, ...], what: str) -> str:
    """Return `value` if it is one of `choices`, or raise UsageError naming them."""
    if value not in choices:
        raise UsageError(f"{what} {value!r} is unknown", rule=f"choose one of: {', '.join(choices)}")
    return value


def check_axes(axes: Iterable[str]) -> tuple[str, ...]:
    """Return the axes in the order of `AXES`, each once.

    >>> check_axes(["inputs", "models"])
    ('models', 'inputs')
    """
    wanted = {axes} if isinstance(axes, str) else set(axes)
    for axis in sorted(wanted):
        check_choice(axis, AXES, "axis")
    if not wanted:
        raise UsageError("no axis is given", rule=f"choose one or more of: {', '.join(AXES)}")
    return tuple(axis for axis in AXES if axis in wanted)
