"""How far a call wanders: the files of eigenzoo that a fit, an add and an evidence enter, and the lines of `src`.

    python -m bench.house            # of the eigenzoo that Python finds
    PYTHONPATH=OTHER/src python -m bench.house

A file is entered when a function of it is called; imports don't count. A crossing is a pair of files of which the first calls
a function of the second. A climb is a crossing into a room on a higher floor, or into a file that waits for the caller already.
The depth is the largest number of calls between files that wait for each other on one thread.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file

import eigenzoo as ez

SOURCE = Path(ez.__file__).parent
ROOMS = ("subspace", "evidence")
FLOORS = {
    "cli": 8,
    "integrations": 7,
    "adapt": 6,
    "evidence": 6,
    "nursery": 6,
    "subspace": 5,
    "zoo": 4,
    "passes": 3,
    "formats": 2,
    "linalg": 1,
    "weights": 1,
    "report": 1,
}
STEPS = ("fit of one layer", "fit of adapters", "add", "evidence")


class Ways:
    """Watches calls of all threads, and keeps which file calls which."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.crossings: set[tuple[str, str]] = set()
        self.climbs: set[tuple[str, str]] = set()
        self.depth = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note a call, and the files that wait for it."""
        if event != "call" or _file(frame) is None or frame.f_code.co_name == "<module>":
            return
        stack: list[str] = []
        waiting: FrameType | None = frame
        while waiting is not None:
            file = _file(waiting)
            if file is not None and (not stack or stack[-1] != file):
                stack.append(file)
            waiting = waiting.f_back
        self.files.add(stack[0])
        self.depth = max(self.depth, len(stack))
        if len(stack) > 1:
            crossing = (stack[1], stack[0])
            self.crossings.add(crossing)
            if _floor(stack[0]) > _floor(stack[1]) or stack[0] in stack[2:]:
                self.climbs.add(crossing)

    def counts(self) -> dict[str, int]:
        """Return the numbers of files, crossings and climbs, and the depth."""
        counts = {"files": self.files, "crossings": self.crossings, "climbs": self.climbs}
        return {**{name: len(found) for name, found in counts.items()}, "depth": self.depth}


def _file(frame: FrameType) -> str | None:
    name = frame.f_code.co_filename
    return os.path.relpath(name, SOURCE) if name.startswith(f"{SOURCE}{os.sep}") else None


def _floor(file: str) -> int:
    return FLOORS.get(file.split(os.sep)[0], 0)


def _write_weights(folder: Path, num_models: int) -> Path:
    for index in range(num_models):
        draw = torch.Generator().manual_seed(index)
        (folder / f"m{index}").mkdir(parents=True)
        save_file({"layer.weight": torch.randn(12, 8, generator=draw)}, folder / f"m{index}" / "model.safetensors")
    return folder


def _write_adapters(folder: Path, num_models: int) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q", "v"], "bias": "none"}
    for index in range(num_models):
        draw = torch.Generator().manual_seed(index)
        (folder / f"a{index}").mkdir(parents=True)
        tensors = {}
        for module in ("h.0.q", "h.0.v"):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, 8, generator=draw)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(12, 2, generator=draw)
        save_file(tensors, folder / f"a{index}" / "adapter_model.safetensors")
        (folder / f"a{index}" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def watch(step: str) -> dict[str, int]:
    """Run one step on a small random zoo, and count."""
    os.environ["EIGENZOO_CACHE"] = "off"
    for room in ROOMS:  # calls made by an import do not belong to a step
        package = importlib.import_module(f"eigenzoo.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    with tempfile.TemporaryDirectory() as home:
        weights = _write_weights(Path(home) / "weights", 6)
        adapters = _write_adapters(Path(home) / "adapters", 6)
        later = _write_adapters(Path(home) / "later" / "b", 1) / "a0"
        space = ez.fit(str(adapters), rank=2)
        steps = {
            "fit of one layer": lambda: ez.fit(str(weights), rank=2),
            "fit of adapters": lambda: ez.fit(str(adapters), rank=2),
            "add": lambda: space.add([str(later.rename(later.parent / "new"))]),
            "evidence": lambda: ez.evidence(str(adapters)),
        }
        ways = Ways()
        threading.setprofile(ways)
        sys.setprofile(ways)
        try:
            steps[step]()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return ways.counts()


def num_lines() -> int:
    """Lines of the source."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py"))


def main() -> None:
    """Print the table; each step runs in a process of its own."""
    if len(sys.argv) > 1:
        print(json.dumps(watch(sys.argv[1])))
        return
    print(f"{num_lines():,} lines in {len(list(SOURCE.rglob('*.py')))} files of {SOURCE}")
    for step in STEPS:
        done = subprocess.run([sys.executable, "-m", "bench.house", step], capture_output=True, text=True, check=True)
        counts = json.loads(done.stdout.splitlines()[-1])
        print(f"{step:18}" + "".join(f"{count:6} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
