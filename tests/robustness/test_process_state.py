"""What of the process a call changes is given back: generators, threads, filters of warnings, folders, the environment."""

from __future__ import annotations

import gc
import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import arguments
from operations import Net, write_start
from threadpoolctl import threadpool_info
from torch import nn

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo import adapt
from eigenzoo.adapt.search import search
from eigenzoo.adapt.training import TensorData, train
from eigenzoo.cli.app import main
from sampling import slow_but

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("peft")

TASK = "5-against-5:0,1,2,3,4"


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def state() -> dict[str, Any]:
    """What belongs to the process and to whoever has called."""
    import datasets
    import huggingface_hub.utils as hub
    import transformers.utils.logging as transformers_logging

    numpy_state: Any = np.random.get_state()
    return {
        "torch's draws": torch.get_rng_state().tolist(),
        "numpy's draws": (numpy_state[1].tolist(), numpy_state[2:]),
        "Python's draws": random.getstate(),
        "threads": (
            torch.get_num_threads(),
            sorted((pool["filepath"], pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"),
        ),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": list(warnings.filters),
        "environment": {name: text for name, text in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "folder": Path.cwd(),
        "umask": _umask(),
        "path": list(sys.path),
        "loggers": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "progress bars": (
            hub.are_progress_bars_disabled(),
            transformers_logging.is_progress_bar_enabled(),
            datasets.is_progress_bar_enabled(),
        ),
        "verbosity": (transformers_logging.get_verbosity(), datasets.logging.get_verbosity()),
        "switches": sys.getswitchinterval(),
        "garbage": (gc.isenabled(), gc.get_threshold()),
        "numpy's errors": np.geterr(),
    }


def _quietly(*words: object) -> None:
    said = io.StringIO()
    with arguments(*words), redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit, match="0"):
        main()


def _loss(module: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return module.layer[0](nn.functional.dropout(batch[0])).square().sum()  # type: ignore[index, operator]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from eigenzoo import nursery

    root = tmp_path_factory.mktemp("state")
    write_start(root)
    write_stacks(root / "two", {f"layer.{n}.weight": random_stack(5, (6, 5), n) for n in range(2)})
    ez.fit(root / "two", 2, cache=False).save(root / "basis")
    nursery.make("digits-cnn", root / "digits", num_models=6)
    ez.fit(root / "digits", 2, cache=False).save(root / "digits-bundle")
    (root / "measures.py").write_text("def one(path):\n    return 1.0\n")
    return root


def _attached(root: Path, **options: Any) -> adapt.Adapted:
    with torch.random.fork_rng(devices=[]):  # a new network draws its weights
        module = Net()
    return adapt.attach(module, ez.load(root / "basis"), **options)


def _nursery(root: Path, out: Path, kind: str) -> None:
    from dataclasses import replace

    from eigenzoo import nursery
    from eigenzoo.nursery.making import make_zoo
    from eigenzoo.nursery.recipe import Schedule, plan_zoo

    plan = plan_zoo(kind, 2, 3, False, False, None)
    plan = replace(
        plan, schedule=replace(plan.schedule, steps=2), pretraining=plan.pretraining and Schedule(2, 8, 1e-3)
    )
    recipe = make_zoo(plan, out, False, None)
    name = next(iter(recipe.models))
    nursery.accuracy(out / name if (out / name).exists() else out / f"{name}.safetensors")


CALLS: dict[str, Callable[[Path, Path], object]] = {
    "nursery, digits-cnn": lambda root, out: _nursery(root, out, "digits-cnn"),
    "nursery, digits-vit": lambda root, out: _nursery(root, out, "digits-vit"),
    "nursery, digits-lora": lambda root, out: _nursery(root, out, "digits-lora"),
    "attach": lambda root, out: _attached(root, start="random", random_basis=True, seed=5),
    "train": lambda root, out: train(
        _attached(root), TensorData(torch.ones(6, 5)), _loss, steps=3, batch_size=2, checkpoint=out
    ),
    "search": lambda root, out: search(_attached(root), lambda module: 1.0, budget=30),
    "fit": lambda root, out: ez.fit(root / "zoo", 2, cache=False),
    "a sketch": lambda root, out: ez.fit(root / "zoo", {"outputs": 2}, solver="sketch", cache=False),
    "evidence": lambda root, out: ez.evidence(root / "zoo", cache=False),
    "evaluate": lambda root, out: ez.evaluate(ez.load(root / "bundle"), lambda path: 1.0, ranks=[1]),
    "command fit": lambda root, out: _quietly("fit", root / "zoo", "-o", out, "--rank", 2, "--no-cache"),
    "command report": lambda root, out: _quietly("report", root / "bundle", "-o", out, "--format", "html"),
    "command figures": lambda root, out: _quietly("report", root / "bundle", "-o", out, "--format", "png"),
    "command evaluate": lambda root, out: _quietly("evaluate", root / "bundle", "--metric", "measures:one"),
    "command adapt": lambda root, out: _quietly(
        "adapt", root / "digits-bundle", TASK, "--model", next((root / "digits").glob("*.safetensors")),
        "--steps", 2, "-o", out,
    ),
}  # fmt: skip
LONG = {"nursery, digits-cnn", "nursery, digits-vit", "command figures"}
"""What takes seconds and does as another call does."""


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)


@pytest.mark.parametrize("name", slow_but(CALLS, CALLS.keys() - LONG))
@pytest.mark.usefixtures("seeded")
def test_a_call_leaves_the_process_as_it_was(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once before, since what is imported at first use may say something about itself."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    torch.set_num_threads(2)
    try:
        CALLS[name](root, tmp_path / "first")
        sys.path[:] = [entry for entry in sys.path if entry]
        before = state()
        CALLS[name](root, tmp_path / "second")
        after = state()
    finally:
        torch.set_num_threads(1)
    assert [key for key in before if before[key] != after[key]] == []


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("command")])
def test_no_call_seeds_the_generators_of_gpus(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.manual_seed` does, and `fork_rng` of the CPU gives none of them back."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(1)
    assert seeds == [1], "this is how torch does it"
    CALLS[name](root, tmp_path / "out")
    assert seeds == [1]
