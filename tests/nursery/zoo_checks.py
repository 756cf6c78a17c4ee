"""What several tests of zoos on disk need."""

from __future__ import annotations

from pathlib import Path

import pytest

from eigenzoo.nursery import KINDS

DIGITS = tuple(kind for kind in KINDS if kind.startswith("digits") and kind != "digits-tasks")
"""The kinds that split ten digits; `test_nursery_docstrings.py` and `test_nursery_tasks.py` are about the others."""

ONE_KIND = [pytest.param(kind, marks=[] if kind == "digits-cnn" else pytest.mark.slow) for kind in DIGITS]
"""All kinds of zoos, of which training them once more is slow but for the smallest."""


def weight_file(path: Path) -> Path:
    """The file with the weights of a model, which may be that file itself."""
    return path if path.is_file() else next(path.glob("*.safetensors"))
