"""Zoos with a planted spectrum, how they are read in float32 and in spans, and how bundles are compared to the byte.

Legend: N models, D values of one flattened layer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import eigenzoo as ez
from builders import seeded, write_stacks
from eigenzoo.subspace.moments.layer_moments import LayerMoments

SHAPE = (120, 96)
"""Layers of this shape take two symmetric products, the second of them short."""


def planted(
    num_models: int,
    shape: Sequence[int] = SHAPE,
    seed: int = 0,
    *,
    parent: float = 0.0,
    falling: float = 0.9,
    noise: float = 0.3,
) -> Tensor:
    """Sixteen directions of norms 1, `falling`, … in noise; about a parent of `parent` times the models' norm."""
    draw, num_values = seeded(seed), math.prod(shape)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    weights = normal(num_models, 16) * falling ** torch.arange(16)
    changes = weights @ normal(16, num_values) + noise * normal(num_models, num_values)
    common = normal(num_values)
    return (changes + parent * changes.norm(dim=1).mean() * common / common.norm()).view(num_models, *shape)


def write_planted(root: Path, num_models: int = 12, layers: int = 3, **options: float) -> list[Path]:
    """Write a zoo of some layers, all planted."""
    return write_stacks(root, {f"layer.{n}": planted(num_models, seed=n, **options) for n in range(layers)})


def as_stored(stack: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows (N, D) in float64 as files of a dtype hold them."""
    return stack.to(dtype).double().flatten(1)


def variances(rows_ND: Tensor) -> np.ndarray:
    """Dense reference: squared singular values of the rows about their mean, descending, the zero one left out."""
    return np.linalg.svd((rows_ND - rows_ND.mean(0)).numpy(), compute_uv=False)[:-1] ** 2


def spectrum(moments: LayerMoments) -> np.ndarray:
    """Eigenvalues of moments about the mean, descending, the zero one left out."""
    return np.linalg.eigvalsh(moments.centered_NN.numpy())[:0:-1]


def read_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read small stacks as large ones are."""
    monkeypatch.setattr("eigenzoo.zoo.stack.EXACT_VALUES", 0)


def read_in_spans(monkeypatch: pytest.MonkeyPatch, num_bytes: int | None = None, *, kept: bool = False) -> None:
    """Cut layers into spans of so many bytes, and read them twice, as layers are that are too large to be `kept`."""
    if num_bytes is not None:
        monkeypatch.setattr("eigenzoo.zoo.stack.SPAN_BYTES", num_bytes)
        monkeypatch.setattr("eigenzoo.passes.resources.SPAN_BYTES", num_bytes)
    if not kept:
        monkeypatch.setattr("eigenzoo.passes.resources.MAX_LAYER_BYTES", 0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved(space: ez.Subspace, folder: Path) -> dict[str, bytes]:
    """Every file of the bundle that a subspace is saved as."""
    space.save(folder)
    return contents(folder)


def hidden(folders: Iterable[Path]) -> list[str]:
    """Names of what a fit should not have left."""
    return [path.name for folder in folders for path in folder.iterdir() if path.name.startswith(".")]


def rewrite(path: Path) -> None:
    """Change the first value of a file and nothing else that a look at it tells: neither its size nor its time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
