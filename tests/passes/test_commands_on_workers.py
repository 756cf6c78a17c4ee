"""Every command reads and multiplies weights on threads that torch and BLAS have one thread each for."""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info

import eigenzoo.cli
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.formats.model import Piece
from eigenzoo.formats.safetensors.file import SafetensorsFile

NUM_VALUES = 300
"""A read of at least so many values is one of weights or bases, and not of coefficients."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[int, ...]]]:
    """By file: torch's and BLAS's threads where large tensors were read."""
    seen: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    read_flat, read_bytes = SafetensorsFile.read_flat, SafetensorsFile.read_bytes

    def note(file: SafetensorsFile) -> None:
        blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        seen[file.path.name].add((torch.get_num_threads(), *sorted(blas)))

    def spied(self: SafetensorsFile, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        if stop - start >= NUM_VALUES:
            note(self)
        return read_flat(self, name, start, stop, out)

    def spied_bytes(self: SafetensorsFile, pieces: Sequence[Piece]) -> None:
        if sum(len(view) // self.tensors[name].dtype.itemsize for name, _, view in pieces) >= NUM_VALUES:
            note(self)
        read_bytes(self, pieces)

    monkeypatch.setattr(SafetensorsFile, "read_flat", spied)
    monkeypatch.setattr(SafetensorsFile, "read_bytes", spied_bytes)
    return seen


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What each command's progress bar is told."""
    seen: list[tuple[str, int, int]] = []

    @contextmanager
    def recorded(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
        assert not quiet
        yield lambda stage, done, total: seen.append((stage, done, total))

    for path in sorted(Path(eigenzoo.cli.__file__).parent.glob("*.py")):
        module = importlib.import_module(f"eigenzoo.cli.{path.stem}")
        if path.stem != "console" and hasattr(module, "progress_bar"):
            monkeypatch.setattr(module, "progress_bar", recorded)
    return seen


@pytest.fixture(params=["weights", "updates"])
def zoo(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "weights":
        write_stacks(tmp_path / "zoo", {"w": random_stack(8, (24, 20), 0), "v": random_stack(8, (20, 20), 1)})
    else:
        for place in range(8):
            factors = random_factors({"q_proj": (160, 120)}, rank=4, seed=place)
            write_adapter(tmp_path / "zoo" / f"m{place}", factors)
    return tmp_path / "zoo"


def measure(path: Path) -> float:
    """A metric that reads nothing."""
    return float(len(path.name))


COMMANDS = {
    "inspect": ("inspect", "ZOO"),
    "evidence": ("evidence", "ZOO", "--no-cache"),
    "plan": ("plan", "ZOO"),
    "fit": ("fit", "ZOO", "-o", "OUT", "--rank", 2, "--no-cache"),
    "project": ("project", "BUNDLE", "ZOO/m6", "ZOO/m7"),
    "rebuild": ("rebuild", "BUNDLE", "m0", "-o", "OUT"),
    "rebuild of another": ("rebuild", "BUNDLE", "ZOO/m7", "-o", "OUT"),
    "add": ("add", "BUNDLE", "ZOO/m6", "-o", "OUT"),
    "add, refreshed": ("add", "BUNDLE", "ZOO/m6", "-o", "OUT", "--refresh"),
    "verify": ("verify", "BUNDLE"),
    "evaluate": ("evaluate", "BUNDLE", "--metric", "test_commands_on_workers:measure", "--models", "ZOO/m6"),
    "report": ("report", "ZOO", "-o", "OUT.html", "--no-cache"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_are_read_on_threads_of_their_own(
    command, zoo, tmp_path, reads, steps, call: Callable[..., tuple[int, str, str]]
):
    usual = torch.get_num_threads()
    bundle = tmp_path / "bundle"
    if "BUNDLE" in COMMANDS[command]:
        assert call("fit", *(zoo / f"m{place}" for place in range(6)), "-o", bundle, "--rank", 2)[0] == 0
        reads.clear()
        steps.clear()
    words = [
        str(word).replace("ZOO", str(zoo)).replace("BUNDLE", str(bundle)).replace("OUT", str(tmp_path / "out"))
        for word in COMMANDS[command]
    ]
    torch.set_num_threads(3)
    try:
        code, _, err = call(*words)
    finally:
        torch.set_num_threads(usual)
    assert code == 0, err
    assert reads, "nothing large was read: the test looks at the wrong place"
    assert {threads for found in reads.values() for threads in found} == {(1, 1)}, dict(reads)
    assert steps, "no progress is shown"


def test_import_reads_on_threads_of_their_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reads: dict[str, set[tuple[int, ...]]],
    steps: list[tuple[str, int, int]],
    call: Callable[..., tuple[int, str, str]],
) -> None:
    pytest.importorskip("vlora")
    from tests.formats.vlora_cases import fitted

    monkeypatch.setattr(sys.modules[__name__], "NUM_VALUES", 16)  # vLoRA's bases here are small
    fitted(tmp_path, num_components=3).save(tmp_path / "vlora")
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        code, _, err = call("import", tmp_path / "vlora", "--like", tmp_path / "zoo" / "a1", "-o", tmp_path / "out")
    finally:
        torch.set_num_threads(usual)
    assert code == 0, err
    assert reads
    assert {threads for found in reads.values() for threads in found} == {(1, 1)}, dict(reads)
    assert steps
