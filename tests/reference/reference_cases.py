"""The cases that every method must pass: one zoo of nine models whose layers are the cases, and one zoo of one model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from reference_algebra import Array
from torch import Tensor

from builders import random_stack, seeded, write_stacks
from eigenzoo.subspace.subspace import Subspace

NUM_MODELS = 9
SHAPES: dict[str, tuple[int, ...]] = {
    "random": (6, 5),
    "wide": (3, 22),
    "low_rank": (6, 5),
    "noisy": (6, 5),
    "thin_sides": (6, 5),
    "repeated": (6, 5),
    "tied": (6, 5),
    "zero": (6, 5),
    "bias": (7,),
    "kernel": (4, 3, 2, 2),
    "scalar": (),
    "few_values": (2, 1),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def stacks(num_models: int = NUM_MODELS) -> dict[str, Tensor]:
    """The cases, float64, by layer."""
    found = {name: random_stack(num_models, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    low = {name: random_stack(num_models, SHAPES[name], 40, rank=3) for name in ("low_rank", "noisy")}
    found["low_rank"] = low["low_rank"]
    found["noisy"] = low["noisy"] + 0.05 * found["noisy"]
    # Only two outputs and three inputs are ever used.
    draw = seeded(50)
    left, right = (
        torch.randn(6, 2, generator=draw, dtype=torch.float64),
        torch.randn(3, 5, generator=draw, dtype=torch.float64),
    )
    found["thin_sides"] = left @ random_stack(num_models, (2, 3), 52) @ right
    found["repeated"] = found["repeated"][torch.arange(num_models) % 3]
    found["tied"] = found["tied"][:1].expand(num_models, -1, -1).clone()
    found["zero"] = torch.zeros_like(found["zero"])
    return found


def stored(stack: Tensor, dtype: torch.dtype) -> Array:
    """The stack as the files hold it, unfolded to (N, O, I) float64: what references are computed from."""
    values = stack.to(dtype).double()
    num_models, *shape = values.shape
    outputs = shape[0] if shape else 1
    return values.reshape(num_models, outputs, -1).numpy()


def write_zoo(folder: Path, dtype: torch.dtype = torch.float32, num_models: int = NUM_MODELS) -> list[Path]:
    """Write the cases as a zoo on disk."""
    return write_stacks(folder, stacks(num_models), dtype)


def rebuilt_stack(space: Subspace, layer: str) -> Array:
    """A layer of every kept model as the public API rebuilds it, (N, O, I)."""
    shape = space.layers[layer].layer.shape
    return np.stack([space.rebuild(name).layer(layer).reshape(shape).numpy() for name in space.names])


def energy(stack_NOI: Array) -> float:
    """Sum of squares."""
    return float((stack_NOI**2).sum())
