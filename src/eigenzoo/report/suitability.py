"""Apply the evidence's rule of layer suitability, as the page's sliders do.

A layer has one exponent per random half of the zoo. It is suited if their mean is in range, their spread (standard deviation) is
small enough, enough of them are in range, and q = share in range / (1 + spread) is large enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LIMITS = {"low": 2.0, "high": 6.0, "spread": 1.0, "share": 0.5, "q": 0.2}
"""The sliders' positions for evidence without thresholds."""


def exponents(layer: Mapping[str, Any]) -> list[float]:
    """Return a layer's exponents for the rule: those of random halves, or the one of the zoo."""
    found = layer["suitability"]
    known = found["exponents"] or [found["exponent"]]
    return [value for value in known if value is not None]


def limits(thresholds: Mapping[str, Any]) -> dict[str, float]:
    """Return the evidence's thresholds, with defaults for missing ones."""
    return {name: usual if thresholds.get(name) is None else float(thresholds[name]) for name, usual in LIMITS.items()}
