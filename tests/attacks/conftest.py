"""Honest zoos, bundles and models that attackers copy and spoil; the processes that commands run in; the figures at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attack_runner import ADAPT, PLAIN, Ran, Sandbox, Server
from honest_files import MAKERS


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a folder by its name, made when it is first asked for."""
    root = tmp_path_factory.mktemp("honest")

    def get(name: str) -> Path:
        path = root / name
        if not path.exists():
            MAKERS[name](path, get)
        return path

    return get


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    started: dict[str, Server] = {}

    def get(kind: str) -> Server:
        if kind not in started:
            started[kind] = Server(PLAIN if kind == "plain" else ADAPT, tmp_path_factory.mktemp(kind))
        return started[kind]

    yield get
    for one in started.values():
        one.stop()


@pytest.fixture(scope="session")
def figures() -> Iterator[list[tuple[str, Ran]]]:
    """Time and memory of every command; written as a table where ATTACKS_REPORT names a file, and never asserted."""
    rows: list[tuple[str, Ran]] = []
    yield rows
    if os.environ.get("ATTACKS_REPORT"):
        lines = ["| attack | command | exit | seconds | peak MB |", "|---|---|---|---|---|"]
        for name, ran in sorted(rows, key=lambda row: -row[1].seconds):
            lines.append(f"| {name} | {ran.words[0]} | {ran.code} | {ran.seconds:.2f} | {ran.peak / 1e6:.0f} |")
        report = Path(os.environ["ATTACKS_REPORT"] + os.environ.get("PYTEST_XDIST_WORKER", ""))
        report.write_text("\n".join(lines) + "\n")


@pytest.fixture
def sandbox(
    tmp_path: Path,
    honest: Callable[[str], Path],
    server: Callable[[str], Server],
    figures: list[tuple[str, Ran]],
    request: pytest.FixtureRequest,
) -> Iterator[Sandbox]:
    (tmp_path / "box").mkdir()
    box = Sandbox(tmp_path / "box", honest, server)
    yield box
    figures.extend(
        (request.node.callspec.id if hasattr(request.node, "callspec") else request.node.name, ran) for ran in box.ran
    )
