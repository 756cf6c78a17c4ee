"""What several tests of zoos on disk need."""

from __future__ import annotations

from pathlib import Path

import pytest

from eigenzoo.nursery import KINDS

ONE_KIND = [pytest.param(kind, marks=[] if kind == "digits-cnn" else pytest.mark.slow) for kind in KINDS]
"""All kinds of zoos, of which training them once more is slow but for the smallest."""


def weight_file(path: Path) -> Path:
    """The file with the weights of a model, which may be that file itself."""
    return path if path.is_file() else next(path.glob("*.safetensors"))
