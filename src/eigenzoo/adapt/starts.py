"""Starts of training: zero, the zoo's mean, one of its models, any model projected, or chance."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from eigenzoo.adapt.trained import Start, scales_of
from eigenzoo.errors import UsageError
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.subspace import Subspace

ZERO, MEAN, RANDOM = "zero", "mean", "random"


def find_start(space: Subspace, start: str | os.PathLike[str], seed: int = 0) -> Start:
    """Return where training begins.

    Args:
        start: `zero`: the model as it is (coefficients are a change of its weights); `mean`: the zoo's mean; `random`: about
            the mean, each coefficient drawn as the zoo's are spread; the name of a model in the bundle; or a path of any
            model of the same layers, which is projected.
        seed: of `random`.

    Raises UsageError for a name that is neither, and what `Subspace.project` raises.
    """
    seed = check_seed(seed)
    if start == ZERO:
        return Start(False, {})
    if start == MEAN:
        return Start(True, {})
    if start == RANDOM:
        generator = torch.Generator().manual_seed(seed)
        scales = {name: scales_of(rows_NK) for name, rows_NK in space.all_coefficients.items()}
        return Start(
            True, {name: scale * torch.randn(scale.shape, generator=generator) for name, scale in scales.items()}
        )
    if str(start) in space.names:
        return Start(True, dict(space.coefficients(str(start)).values))
    if Path(start).exists():
        return Start(True, dict(space.project(start).values))
    raise UsageError(
        f"the start {str(start)!r} is neither a model of the bundle nor a path",
        where=str(space.path),
        rule=f"choose {ZERO}, {MEAN}, {RANDOM}, a model's name, or a path",
    )
