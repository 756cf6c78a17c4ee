"""Zoos, a recording metric and the dense reference that tests of `evaluate` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from builders import (
    random_factors,
    random_stack,
    read_update,
    seeded,
    write_adapter,
    write_model,
    write_stacks,
)
from tolerance import tolerance

NUM_FITTED, NUM_HELD = 8, 7
SHAPES = {"block.0.q": (9, 8), "block.1.q": (6, 10)}
RANKS: dict[str, dict[str, int]] = {
    "models": {"models": 4},
    "sides": {"outputs": 3, "inputs": 4},
    "all": {"models": 4, "outputs": 4, "inputs": 5},
    "outputs": {"outputs": 4},
}
CASES = [(view, axes) for view in ("weight", "delta", "update") for axes in RANKS]


class Recorder:
    """A metric that keeps every model it is given, and returns its number: so every figure leads to its tensors."""

    __name__ = "number of the call"

    def __init__(self) -> None:
        self.models: list[dict[str, Tensor]] = []
        self.paths: list[Path] = []

    def __call__(self, path: Path) -> float:
        kept = [known for known in self.paths if known.exists() and known.parent.name.startswith("eigenzoo-")]
        assert kept == [], "more than one temporary model at a time"
        self.paths.append(path)
        file = path if path.is_file() else next(path.glob("*.safetensors"))
        tensors = load_file(file)
        if (path / "adapter_config.json").exists():
            tensors |= {module: read_update(path, module) for module in SHAPES}
        self.models.append(tensors)
        return float(len(self.models) - 1)

    def of(self, figure: float | None) -> dict[str, Tensor]:
        assert figure is not None
        return self.models[int(figure)]


def write_zoo(root: Path, view: str) -> tuple[list[Path], Path | None]:
    """Write the models to fit and to hold out, and view delta's base; float64, so that files round nothing."""
    number = NUM_FITTED + NUM_HELD
    if view == "update":
        every = [random_factors(SHAPES, 2, seed, torch.float64) for seed in range(number)]
        return [write_adapter(root / f"m{place}", factors, lora_alpha=3) for place, factors in enumerate(every)], None
    stacks = {name: random_stack(number, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    base = write_model(root / "_base", {name: stack[0] / 3 for name, stack in stacks.items()})
    return write_stacks(root, stacks, torch.float64), base if view == "delta" else None


def dense(paths: list[Path], layer: str, view: str) -> Tensor:
    """The stack (N, O, I) of a layer."""
    if view == "update":
        return torch.stack([read_update(path, layer) for path in paths])
    return torch.stack([load_file(path / "model.safetensors")[layer] for path in paths])


def reference(fitted_NOI: Tensor, held_OI: Tensor, ranks: Mapping[str, int], is_update: bool) -> Callable[..., Tensor]:
    """What one held-out model is from coefficients first:last, by the book: every matrix formed, every basis an SVD's."""
    mean_OI = fitted_NOI.mean(0)
    if set(ranks) == {"models"}:
        basis_KD = torch.linalg.svd((fitted_NOI - mean_OI).flatten(1), full_matrices=False)[2][: ranks["models"]]
        numbers_K = basis_KD @ (held_OI - mean_OI).flatten()
        return lambda first, last: mean_OI + (numbers_K[first:last] @ basis_KD[first:last]).view_as(mean_OI)
    # Bases of updates come from moments about zero, and hold the mean too.
    source_NOI = fitted_NOI if is_update else fitted_NOI - mean_OI
    sides = [
        torch.linalg.svd(source_NOI.movedim(mode, 0).flatten(1))[0][:, : ranks[axis]]
        if axis in ranks
        else torch.eye(source_NOI.shape[mode], dtype=torch.float64)
        for mode, axis in ((1, "outputs"), (2, "inputs"))
    ]
    left_OP, right_IQ = sides
    center_OI = left_OP @ left_OP.T @ mean_OI @ right_IQ @ right_IQ.T if is_update else mean_OI
    core_PQ = left_OP.T @ (held_OI - mean_OI) @ right_IQ
    if "models" in ranks:
        cores_NPQ = left_OP.T @ (fitted_NOI - mean_OI) @ right_IQ
        shared_KD = torch.linalg.svd(cores_NPQ.flatten(1), full_matrices=False)[2][: ranks["models"]]
        numbers_K = shared_KD @ core_PQ.flatten()

        def from_shared(first: int, last: int) -> Tensor:
            part_PQ = (numbers_K[first:last] @ shared_KD[first:last]).view_as(core_PQ)
            return center_OI + left_OP @ part_PQ @ right_IQ.T

        return from_shared

    def corner(size: int) -> Tensor:
        kept = torch.zeros_like(core_PQ)
        rows, columns = (size if axis in ranks else None for axis in ("outputs", "inputs"))
        kept[:rows, :columns] = core_PQ[:rows, :columns]
        return kept

    return lambda first, last: (
        center_OI + left_OP @ (corner(last) - (corner(first) if first else 0)) @ right_IQ.T
        if last
        else center_OI.clone()
    )


def assert_close(found: Tensor, expected: Tensor, size: int = 10) -> None:
    """To the rounding of float32 coefficients."""
    bound = tolerance(size, dtype=torch.float32, scale=float(expected.norm()) + 1)
    assert float((found.double() - expected).abs().max()) < bound


def zoo_with_heads(
    root: Path, same_head: bool = False, num_classes: Callable[[int], int] = lambda place: 3
) -> list[Path]:
    bodies = random_stack(7, (6, 5), 1)
    heads = [torch.randn(num_classes(place), 6, generator=seeded(place), dtype=torch.float64) for place in range(7)]
    return [
        write_model(root / f"m{place}", {"body.weight": bodies[place], "head.weight": heads[0 if same_head else place]})
        for place in range(7)
    ]
