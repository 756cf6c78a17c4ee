"""The demo, end to end with few models: what it prints is true of what it leaves."""

from __future__ import annotations

import json
import re
import shlex
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Run

import eigenzoo as ez
from eigenzoo.cli import demo
from eigenzoo.cli import fit as fit_command
from eigenzoo.cli.demo import foreign_to_a_demo

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("peft")


def metric_of(page: str) -> dict[str, Any]:
    """What a page draws of a metric; nothing where it has none."""
    (data,) = re.findall('id="report-data">(.*?)</script>', page, re.DOTALL)
    lines = json.loads(data)
    return {
        kind: lines[kind]["all"] for kind in ("rebuilt", "random_basis", "controls") if lines.get(kind, {}).get("all")
    }


@pytest.mark.slow
def test_the_demo_shows_what_it_claims(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    document = run("demo", "-o", folder, "--num-models", 12, "--rank", 4, "--json").json
    assert document["num_fitted"] == 10
    assert [row["name"] for row in document["heldout"]] == list(ez.open_zoo(folder / "zoo").names)[5::6]
    mean = document["mean"]
    assert mean["original"] > 0.9
    assert mean["mean"] < mean["original"] - 0.15, "the mean alone must not do the models' work"
    assert 0 < mean["residual"] < 1
    space = ez.load(folder / "bundle")
    assert list(space.verify()) == []
    # What the demo prints of the bundle, which knows nothing of the run that made it.
    fit_command.render(space.report)
    for row in document["heldout"]:
        projected = space.project(folder / "zoo" / row["name"])
        assert projected.residual == pytest.approx(row["residual"], rel=1e-6)
        assert row["random_basis"] < row["rebuilt"]
        assert row["name"] not in space.names
    assert document["fit"]["num_models"] == 10
    assert document["verdict"]["code"] == ez.evidence(space).verdict.code == "shared-subspace"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert document["verdict"]["text"].split(":")[0] in page
    assert document["heldout"][0]["name"] in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    (command,) = re.findall("<code>eigenzoo (report .*?)</code>", page)
    assert run(*shlex.split(unescape(command)), "--quiet").code == 0
    again = (folder / "report.html").read_text(encoding="utf-8")
    assert metric_of(again) == metric_of(page) != {}

    assert run("add", folder / "bundle", folder / "zoo" / document["heldout"][0]["name"]).code == 0
    assert foreign_to_a_demo(folder) == "", "what the demo proposes does not keep it from being made again"
    (folder / "zoo" / "notes.txt").write_text("mine")
    refused = run("demo", "-o", folder, "--force")
    assert refused.code == 2
    assert "its folder 'zoo' holds 'notes.txt', which eigenzoo did not write" in refused.err
    assert (folder / "zoo" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_the_demo_prints_no_temporary_path(run: Run, tmp_path: Path) -> None:
    found = run("demo", "-o", tmp_path / "demo", "--num-models", 6, "--rank", 1, "--quiet")
    assert found.code == 0
    assert "2. what is in it" in found.out
    assert ".tmp-" not in found.out


def test_the_demo_refuses_before_it_trains(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for words, message in (
        (("-o", tmp_path / "mine"), "exists already"),
        (("-o", tmp_path / "mine", "--force"), "is a folder of another kind"),
        (("-o", tmp_path / "new", "--kind", "digits-cnn"), "the demo has no kind 'digits-cnn'"),
        (("-o", tmp_path / "new", "--num-models", 0), "models"),
        (("-o", tmp_path / "new", "--num-models", 3), "models"),
        (("-o", tmp_path / "new", "--rank", -1), "rank"),
    ):
        result = run("demo", *words)
        assert result.code == 2, (words, result)
        assert message in result.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize(
    ("installed", "started_as", "command"),
    [
        (True, "/home/me/.local/bin/eigenzoo", "eigenzoo"),
        (False, ".venv/bin/eigenzoo", ".venv/bin/eigenzoo"),
        (False, "/home/me/eigenzoo/src/eigenzoo/__main__.py", "'/my python/python3' -m eigenzoo"),
    ],
)
def test_the_commands_to_try_next_start_as_the_demo_was_started(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    installed: bool,
    started_as: str,
    command: str,
) -> None:
    monkeypatch.setattr(demo, "which", lambda name: started_as if installed else None)
    monkeypatch.setattr(sys, "argv", [started_as, "demo"])
    monkeypatch.setattr(sys, "executable", "/my python/python3")
    demo._what_next(Path("demo"), "task-1")
    lines = capsys.readouterr().out.split("Try next:\n")[1].splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"  {command} ") for line in lines)
