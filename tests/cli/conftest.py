"""The command line inside this process, for speed; one thread, as everywhere."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_runner import Result, Run

from builders import random_stack, write_stacks
from eigenzoo.cli.app import main


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*words: object) -> Result:
        monkeypatch.setattr("sys.argv", ["eigenzoo", *map(str, words)])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as leave:
            main()
        return Result(leave.value.code, out.getvalue(), err.getvalue())  # type: ignore[arg-type]

    return call


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Run a command that must be refused as bad usage or input; returns its one message."""

    def call(*words: object) -> str:
        result = run(*words)
        assert result.code == 2, (result.code, result.out, result.err)
        assert result.out == ""
        assert "Traceback" not in result.err
        assert result.err.strip()
        return " ".join(result.err.split())

    return call


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Six checkpoints of three layers."""
    stacks = {"block.weight": random_stack(6, (8, 7), 0), "block.bias": random_stack(6, (5,), 1)}
    write_stacks(tmp_path / "zoo", {**stacks, "head.weight": random_stack(6, (3, 8), 2)})
    return tmp_path / "zoo"


@pytest.fixture
def bundle(zoo: Path, run: Run, tmp_path: Path) -> Path:
    """Five of them at rank 2."""
    paths = [zoo / f"m{place}" for place in range(5)]
    assert run("fit", *paths, "-o", tmp_path / "bundle", "--rank", 2).code == 0
    return tmp_path / "bundle"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """Work inside the temporary folder."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
