"""Folders that many of the tests here open."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_builders import add_adapter, make_llama, save_adapter, save_model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A plain adapter of rank 4 on two kinds of modules."""
    return save_adapter(add_adapter(make_llama(), r=4, target_modules=["q_proj", "up_proj"]), tmp_path / "adapter")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_model(make_llama(), tmp_path / "sharded", max_shard_size="10KB")
