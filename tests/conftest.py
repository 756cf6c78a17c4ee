"""Puts its folder on the path, so that all tests can import `builders`; pins threads, since tests run side by side; and
gives each run a cache of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or leaves anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EIGENZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
