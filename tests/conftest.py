"""Puts its folder on the path, so that all tests can import `builders`; pins threads, since tests run side by side; and
gives each run a cache of its own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how often processes were killed, and what was found afterwards."""
    total: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, value in getattr(report, "user_properties", ()):
            if name == "kills" and report.when == "call":
                total.update(value)
    if total:
        found = ", ".join(f"{name}: {total[name]}" for name in ("old", "new", "broken", "lost"))
        terminalreporter.write_line(f"kills: {total['kills']}; found afterwards: {found}")
