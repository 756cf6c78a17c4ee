"""Small zoos of every view on disk, and how a grown subspace is compared with one that was fitted at once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks

MODULES = {"block.0.q": (9, 8), "block.1.q": (7, 10)}


@dataclass(frozen=True)
class Case:
    """A zoo's view with the options it is fitted with; the zoo itself is written by `write`."""

    view: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.view, *(str(value) for value in self.options.values())]).replace(" ", "")


RANKS: dict[str, dict[str, int]] = {
    "models": {"models": 3},
    "sides": {"outputs": 4, "inputs": 3},
    "all": {"models": 3, "outputs": 5, "inputs": 4},
}
DENSE_CENTERS = ("models", "columns", "none", "global")
CASES = [
    *(Case("weight", {"rank": rank}) for rank in RANKS.values()),
    *(Case("delta", {"rank": rank}) for rank in RANKS.values()),
    *(Case("update", {"rank": rank}) for rank in RANKS.values()),
    *(Case("factors", {"rank": rank}) for rank in RANKS.values()),
    *(Case("weight", {"rank": RANKS["models"], "center": center}) for center in DENSE_CENTERS[1:]),
    *(Case("weight", {"rank": RANKS["all"], "center": center}) for center in ("columns", "none")),
    Case("update", {"rank": RANKS["models"], "center": "none"}),
    Case("update", {"rank": RANKS["all"], "center": "none"}),
]


def write(root: Path, view: str, num_models: int = 8) -> list[Path]:
    """Write m0, m1, … of a view below `root`; view delta has its base in `_base`. Ranks of updates are mixed."""
    if view in ("update", "factors"):
        ranks = [2, 3, 1] if view == "update" else [2]
        return [
            write_adapter(
                root / f"m{place}",
                random_factors(MODULES, ranks[place % len(ranks)], seed=place),
                lora_alpha=3 + place if view == "update" else 4,
            )
            for place in range(num_models)
        ]
    stacks = {
        "block.weight": random_stack(num_models, (9, 8), 1),
        "block.kernel": random_stack(num_models, (6, 2, 2, 2), 2),
    }
    stacks["block.bias"] = random_stack(num_models, (5,), 3)
    if view == "delta":
        write_stacks(root / "_base", {name: stack[:1] * 0.5 for name, stack in stacks.items()})
    return write_stacks(root, stacks)


def base_of(root: Path, view: str) -> Path | None:
    return root / "_base" / "m0" if view == "delta" else None


def open_case(root: Path, case: Case, paths: Sequence[Path]) -> ez.Zoo:
    return ez.open_zoo(list(paths), view=case.view, base=base_of(root, case.view))


def saved(space: ez.Subspace, folder: Path) -> ez.Subspace:
    """Save and load again: no step of growth may rest on what is only in memory."""
    space.save(folder)
    return ez.load(folder)


def rebuilt(space: ez.Subspace) -> dict[str, dict[str, Tensor]]:
    """Every layer of every model."""
    return {name: {layer: space.rebuild(name).layer(layer) for layer in space.layers} for name in space.names}


def truth(zoo: ez.Zoo) -> dict[str, dict[str, Tensor]]:
    """Every layer of every model as the files have it, dense, float64."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in zoo.names}
    for layer, spec in zoo.layers.items():
        stack = zoo.stack(layer)
        for place, name in enumerate(zoo.names):
            if spec.kind == "update":
                b_OR, a_RI = stack.factors(place)  # type: ignore[union-attr]
                found[name][layer] = b_OR @ a_RI
            else:
                found[name][layer] = stack.matrix(place).double().reshape(spec.tensor_shape)  # type: ignore[union-attr]
    return found


def lost(space: ez.Subspace, originals: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Σ‖X − X̂‖² per layer, by brute force."""
    now = rebuilt(space)
    return {
        layer: sum(float((originals[name][layer] - now[name][layer]).square().sum()) for name in space.names)
        for layer in space.layers
    }


def energy(models: dict[str, dict[str, Tensor]]) -> float:
    return sum(float(value.square().sum()) for layers in models.values() for value in layers.values())


def relative_gap(first: dict[str, dict[str, Tensor]], second: dict[str, dict[str, Tensor]]) -> float:
    """Largest ‖difference‖ / ‖layer‖ over all models and layers."""
    assert first.keys() == second.keys()
    return max(
        float((first[name][layer] - second[name][layer]).norm() / first[name][layer].norm())
        for name in first
        for layer in first[name]
    )


def delete(paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path)
