"""What `python -m bench` runs at each size."""

from __future__ import annotations

from dataclasses import dataclass

from bench.collection import AdapterRecipe, CheckpointRecipe, Recipe
from bench.peers import PEERS

NOT_ASKED: tuple[str, ...] = ()
"""Peers that run only where they are named by `--only`."""


@dataclass(frozen=True)
class Case:
    """One collection and who fits it (all that can, by default), with as many directions as are planted.

    Those of `cold` also with the files out of memory.
    """

    name: str
    recipe: Recipe
    num_models: int
    cold: tuple[str, ...] = ("eigenzoo", "eigenzoo-unwritten")
    only: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return self.recipe.planted

    @property
    def peers(self) -> tuple[str, ...]:
        return self.only or tuple(
            name for name, peer in PEERS.items() if self.recipe.kind in peer.kinds and name not in NOT_ASKED
        )


@dataclass(frozen=True)
class GrowthPlan:
    """Fits of LoRA factors over numbers of models, of layers, and of directions.

    The others stay at the most models, the most layers, and as many directions as are planted.
    """

    recipe: AdapterRecipe
    models: tuple[int, ...]
    layers: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class AddingPlan:
    """Models that are fitted, models that are added, and in which ways (see `adding`)."""

    recipe: AdapterRecipe
    old: int
    new: int
    steps: tuple[str, ...] = ("refit", "add", "add-refresh", "alone", "alone-refresh")


@dataclass(frozen=True)
class CommandsPlan:
    """The zoo's models, models that come later, and which commands run beside a neighbour too (all, where none is named)."""

    recipe: AdapterRecipe
    old: int
    new: int
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class BytesPlan:
    """One zoo of the nursery: its kind and view, how many models are fitted, the ranks of axis `models`, of sides, and of cuts.

    `by_family`: measure the accuracy of the best ways of each kind, else only of the best of all.
    """

    title: str
    kind: str
    view: str | None
    fitted: tuple[int, ...]
    models: tuple[int, ...]
    sides: tuple[int, ...]
    cuts: tuple[int, ...]
    by_family: bool = True


@dataclass(frozen=True)
class Size:
    """A run of everything.

    Attributes:
        repeats: times that a measurement of less than `LONG` seconds is taken; the fastest counts.
        seconds: after which a peer is stopped.
    """

    cases: tuple[Case, ...]
    growth: GrowthPlan
    adding: AddingPlan
    commands: CommandsPlan
    repeats: int
    seconds: float
    bytes: tuple[BytesPlan, ...] = ()


LONG = 30.0

TINY = AdapterRecipe(num_layers=2, hidden=256, kv=64, rank=4, planted=4)
TINY_VIT = CheckpointRecipe(hidden=32, depth=1, mlp=64, image=32, num_labels=10, planted=4)
FOUR, EIGHT = AdapterRecipe(num_layers=4), AdapterRecipe(num_layers=8)

BYTES = (
    BytesPlan("LoRA of a small ViT", "digits-lora", None, (10, 30, 60), (4, 16), (8, 16), (1, 2, 3)),
    BytesPlan(
        "Fine-tunes of a small ViT, as differences",
        "digits-vit",
        "delta",
        (10, 30, 60),
        (4, 16),
        (8, 16),
        (1, 2, 3, 4, 6, 8),
    ),
    BytesPlan(
        "LoRA of an encoder of texts",
        "docstrings-lora",
        None,
        (10, 30, 60),
        (4, 16),
        (16, 32, 64),
        (1, 2, 3, 4, 6),
        by_family=False,
    ),
)

SIZES = {
    "ci": Size(
        (
            Case("lora-12", TINY, 12, cold=()),
            Case("vit-10", TINY_VIT, 10, cold=(), only=("eigenzoo", "eigenzoo-delta", "numpy")),
        ),
        GrowthPlan(TINY, (6, 12), (2,), (4,)),
        AddingPlan(TINY, 12, 2, ("refit", "add", "alone")),
        CommandsPlan(TINY, 12, 4, ("inspect",)),
        repeats=1,
        seconds=60,
    ),
    "small": Size(
        (
            Case("lora-40", FOUR, 40),
            Case("vit-24", CheckpointRecipe(hidden=256, depth=3, mlp=1024), 24),
        ),
        GrowthPlan(FOUR, (20, 40), (1, 4), (4, 16)),
        AddingPlan(FOUR, 40, 4),
        CommandsPlan(FOUR, 40, 4),
        repeats=1,
        seconds=60,
        bytes=BYTES[:1],
    ),
    "full": Size(
        (
            Case("lora-100", EIGHT, 100),
            Case("lora-500", EIGHT, 500),
            Case("vit-40", CheckpointRecipe(), 40),
        ),
        GrowthPlan(EIGHT, (25, 50, 100, 200), (1, 2, 4, 8), (1, 4, 16, 64)),
        AddingPlan(EIGHT, 500, 10),
        CommandsPlan(EIGHT, 100, 10),
        repeats=3,
        seconds=900,
        bytes=BYTES,
    ),
}
