"""One run of the benchmarks at their smallest size, shared by all tests here: processes are what takes its time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main


@dataclass(frozen=True)
class Run:
    """The raw numbers, what was printed, and the folder of the collections."""

    raw: dict[str, Any]
    printed: str
    folder: Path

    def runs(self, case: str) -> dict[str, dict[str, Any]]:
        """The runs of one case by peer."""
        found = next(each for each in self.raw["cases"] if each["case"] == case)
        return {run["peer"]: run for run in found["runs"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("bench.tables.Table.show", lambda table, screen: printed.append("\n".join(table.markdown())))
        main(["--size", "ci", "--folder", str(folder), "--json", str(folder / "raw.json")])
    return Run(json.loads((folder / "raw.json").read_text()), "\n".join(printed), folder)
