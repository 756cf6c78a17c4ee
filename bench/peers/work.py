"""What a peer is given."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from bench.collection import Collection
from bench.machine import Watch


@dataclass(frozen=True)
class Work:
    """A job: which layers of which models, how many directions, and where to put what is too large for memory.

    Attributes:
        collection: the models.
        names: the layers to do.
        sample: those whose directions are compared with the truth.
        rank: directions per layer.
        threads: how many threads may be used; the environment and the processors are set to them already.
        scratch: an empty folder on the collection's disk.
        options: what else the peer is told.
        watch: the clock of the phases; what is outside of them is not timed.
    """

    collection: Collection
    names: list[str]
    sample: list[str]
    rank: int
    threads: int
    scratch: Path
    options: dict[str, str]
    watch: Watch = field(default_factory=Watch)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a phase: reading and computing may be told apart where a peer does one after the other."""
        return self.watch.phase(name)
