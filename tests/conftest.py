"""Puts its folder on the path, so that all tests can import `builders`; pins threads, since tests run side by side; and
gives each run a cache of its own, and the command line inside this process."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from kernels import NUMERICAL
from sampling import mark_further

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# A shell's job in the background ignores SIGINT, one under nohup SIGHUP, and so would every process that a test starts and stops.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
# Neither asks how long an example takes: a busy machine would fail the test.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the kernels of linear algebra could change, and the further rows of long tables."""
    numerical = [Path(__file__).parent / name for name in NUMERICAL]
    for item in items:
        if any(item.path.is_relative_to(path) for path in numerical):
            item.add_marker(pytest.mark.numerical)
    mark_further(items)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or leaves anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EIGENZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """The command line inside this process: exit code, standard output, standard error on one line."""
    from eigenzoo.cli.app import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["eigenzoo", *map(str, words)])
        out, err, code = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as leave:
                code = leave.code
        assert isinstance(code, int)
        return code, out.getvalue(), " ".join(err.getvalue().split())

    return run


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
