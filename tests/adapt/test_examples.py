"""Every example runs as a reader would run it, on a smaller zoo, and prints what its docstring promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from eigenzoo import nursery
from guard import HANG

EXAMPLES = Path(__file__).parents[2] / "examples"

PROMISED = {
    "plain_torch.py": ("zoo", "digits-vit", r"the same from the file +(0\.\d+)"),
    "gradient_free.py": ("zoo", "digits-vit", r"over models: .* accuracy (0\.\d+)"),
    "peft_trainer.py": ("lora-zoo", "digits-lora", r"plain LoRA.* (0\.\d+)"),
    "lora_zoo.py": ("adapters", "digits-lora", r"accuracy with PEFT: the adapter \d\.\d+, rebuilt (0\.\d+)"),
}
"""The zoo that an example makes, and a line of its output with an accuracy."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zoos smaller than the examples' own."""
    folder = tmp_path_factory.mktemp("examples")
    for name, kind in {(name, kind) for name, kind, _ in PROMISED.values()}:
        nursery.make(kind, folder / name, num_models=26)
    return folder


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
@pytest.mark.slow
def test_an_example_runs_and_learns_its_task(folder: Path, name: str) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name), str(folder)], capture_output=True, text=True, check=False, timeout=HANG
    )
    assert run.returncode == 0, run.stderr
    accuracy = re.search(PROMISED[name][2], run.stdout)
    assert accuracy, run.stdout
    # A guess is right half the time, and the mean of the zoo about .6.
    assert float(accuracy[1]) > 0.75
