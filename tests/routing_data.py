"""Features of inputs of a few tasks, drawn from Gaussians of one covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from builders import seeded


class Tasks:
    """Tasks whose inputs are Gaussian around centers `apart` standard deviations from the origin."""

    def __init__(self, names: tuple[str, ...], width: int = 6, apart: float = 3.0, seed: int = 0) -> None:
        self.names, self.width = names, width
        draw = seeded(seed)
        self.mixing = torch.randn(width, width, generator=draw, dtype=torch.float64)
        self.centers = apart * torch.randn(len(names), width, generator=draw, dtype=torch.float64)

    def draw(self, count: int, seed: int) -> dict[str, Tensor]:
        """Features (count, D) of inputs of each task."""
        draw = seeded(seed)
        return {
            name: (center + torch.randn(count, self.width, generator=draw, dtype=torch.float64)) @ self.mixing
            for name, center in zip(self.names, self.centers, strict=True)
        }
