"""Report files beside the models of a zoo that are not carried: each name once, with the number of models that have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from eigenzoo.formats.model import Model

WEIGHTS, MODELS = "weights", "models"


@dataclass(frozen=True)
class LeftFile:
    """A file or folder that a rebuilt model lacks.

    Attributes:
        file: its name from the model's folder.
        kind: `weights` where it holds weights that the model's own files do not, `models` for a folder that is a model
            of its own, else empty.
        num_models: how many models have it.
    """

    file: str
    kind: str
    num_models: int


def left_files(models: Iterable[Model]) -> tuple[LeftFile, ...]:
    """Count what is not carried over all models; weights first, then what most models have."""
    counts: Counter[tuple[str, str]] = Counter()
    for model in models:
        kinds = dict.fromkeys(model.ignored_files, "")
        kinds |= dict.fromkeys(model.beside.models, MODELS) | dict.fromkeys(model.beside.weights, WEIGHTS)
        counts.update(kinds.items())
    order = {WEIGHTS: 0, MODELS: 1, "": 2}
    return tuple(
        LeftFile(file, kind, count)
        for (file, kind), count in sorted(counts.items(), key=lambda item: (order[item[0][1]], -item[1], item[0][0]))
    )
