"""What several tests of zoos on disk need."""

from __future__ import annotations

from pathlib import Path


def weight_file(path: Path) -> Path:
    """The file with the weights of a model, which may be that file itself."""
    return path if path.is_file() else next(path.glob("*.safetensors"))
