"""Checkpoints of timm and torchvision open as they are, with fused qkv weights cut by rule, and come back: same answers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eigenzoo as ez
from real_models import TOLERANCE

ROOT = Path(__file__).parents[2]
VISION = ROOT / ".venv" / "vision"
SCRIPT = Path(__file__).parent / "vision_models.py"
SPLIT = "blocks.*.attn.qkv.*=q,k,v"


def run_script(action: str, folder: Path) -> None:
    paths = [str(VISION), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), action, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoos of `vision_models`, and beside each model what eigenzoo makes of it at rank 1.0."""
    if not (VISION / "timm").is_dir() and importlib.util.find_spec("timm") is None:
        pytest.skip("timm and torchvision are not installed; `make test` puts them into .venv/vision")
    root = tmp_path_factory.mktemp("vision")
    run_script("make", root)
    for zoo, split in (("timm-hub", [SPLIT]), ("timm-training", [SPLIT]), ("torchvision", [])):
        opened = ez.open_zoo(root / zoo, split=split, allow_pickle=True)
        space = ez.load(ez.fit(opened, rank=1.0, cache=False).save(root / zoo / "bundle"))
        for name in opened.names:
            space.rebuild(name).save(root / zoo / f"rebuilt-{name}")
    run_script("answers", root)
    return root


def assert_same_answers(folder: Path) -> None:
    expected, found = (torch.load(folder.with_suffix(kind)) for kind in (".answers", ".rebuilt"))
    assert set(expected) == set(found) == {"m0", "m1", "m2"}
    assert (expected["m0"] - expected["m1"]).abs().max() > 1000 * TOLERANCE
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)


def test_timm_of_the_hub_answers_as_the_original(zoos: Path) -> None:
    """A folder with timm's own config.json, which is carried."""
    assert_same_answers(zoos / "timm-hub")
    assert (zoos / "timm-hub" / "rebuilt-m0" / "config.json").read_bytes() == (
        zoos / "timm-hub" / "m0" / "config.json"
    ).read_bytes()


@pytest.mark.slow
def test_the_average_of_timm_s_training_checkpoints_answers_as_the_original(zoos: Path) -> None:
    """What answers alike is `state_dict_ema`, not the `state_dict` beside it."""
    assert_same_answers(zoos / "timm-training")
    warnings = ez.load(zoos / "timm-training" / "bundle").report["warnings"]
    assert warnings[0] == (
        "m0 and 2 more: the checkpoint holds 'state_dict_ema' beside 'state_dict': 'state_dict_ema' is read"
    )


@pytest.mark.slow
def test_torchvision_s_resnet_answers_as_the_original(zoos: Path) -> None:
    assert_same_answers(zoos / "torchvision")


def test_qkv_of_timm_are_three_layers_by_rule_and_one_without(zoos: Path) -> None:
    cut, whole = ez.open_zoo(zoos / "timm-hub" / "m0", split=[SPLIT]), ez.open_zoo(zoos / "timm-hub" / "m0")
    name = "blocks.0.attn.qkv.weight"
    assert whole.layers[name].shape == (72, 24)
    assert [cut.layers[f"{name}.{part}"].shape for part in "qkv"] == [(24, 24)] * 3
    assert name not in cut.layers
    assert ez.load(zoos / "timm-hub" / "bundle").manifest.split == tuple(cut.selection.split)
