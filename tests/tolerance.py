"""The one tolerance of the tests: c · eps · size · scale; over the gap, where directions are compared.

Round-off of a sum of `size` terms of magnitude `scale` is at most eps · size · scale, and c covers the handful of steps
behind one figure. A test that needs a larger number says why beside it.
"""

from __future__ import annotations

import torch

STEPS = 16
"""c: how many roundings of full size one compared figure may have gone through."""

ONE_IMAGE = 1 / 500 + 1e-9
"""Of the nursery's 500 test images one may lie so near the border that another order of the same sums decides it otherwise."""


def tolerance(size: float, *, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> float:
    """Largest error that `size` roundings in `dtype` of numbers as large as `scale` explain.

    >>> tolerance(1) == STEPS * 2.0**-52
    True
    """
    return STEPS * torch.finfo(dtype).eps * size * scale


def angle_tolerance(size: float, gap: float, *, dtype: torch.dtype = torch.float64) -> float:
    """Largest sine of an angle that round-off explains (Davis and Kahan 1970); `gap` is the relative one of the eigenvalues."""
    return tolerance(size, dtype=dtype) / gap
