"""What several tests of zoos on disk need."""

from __future__ import annotations

from pathlib import Path

# Of 500 images one may lie so near the border that the batched and the plain product decide it differently.
ONE_IMAGE = 1 / 500 + 1e-9


def weight_file(path: Path) -> Path:
    """The file with the weights of a model, which may be that file itself."""
    return path if path.is_file() else next(path.glob("*.safetensors"))
