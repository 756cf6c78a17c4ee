"""The one limit of time in the tests: a guard against a hang, far beyond what a busy machine takes. No test asserts a duration.

A bound on work is a bound on processor time, which other processes do not lengthen.
"""

from __future__ import annotations

import time
from collections.abc import Callable

HANG = 600.0
"""Seconds after which anything counts as hung."""


def wait_until(holds: Callable[[], bool]) -> None:
    """Look again until something holds."""
    deadline = time.monotonic() + HANG
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {HANG:.0f} s"
        time.sleep(0.01)
