"""Python's collection of cyclic garbage, while a zoo of hundreds of models is opened or passed over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Let Python look for cyclic garbage seldom: it goes through the headers of hundreds of models each time."""
    usual = gc.get_threshold()
    gc.set_threshold(max(usual[0], 100_000), *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
