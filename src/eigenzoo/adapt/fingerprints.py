"""Identify training runs by short hashes of weights, data and options.

They detect mistakes, but not forgeries: only `SAMPLED` evenly spaced values of each tensor are hashed. Two runs that differ in a
tensor differ almost everywhere in it, and a hash of all bases would take longer than a short training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eigenzoo.passes.draws import preserve_generators, seed_generators

SAMPLED = 1024
ITEMS = 16
"""Number of hashed items of the data."""


def of_values(value: Any) -> str:
    """Return the hash of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the hash of tensors in their order: names, dtypes, shapes, and a sample of the values."""
    digest = hashlib.sha256()
    for name, values in tensors:
        digest.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
        digest.update(_sample(values))
    return digest.hexdigest()[:32]


def of_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the hash of weights. It does not depend on the floating dtype if the dtype represents all values exactly."""
    return of_tensors((name, values.detach().float()) for name, values in tensors)


def of_data(data: Any) -> str:
    """Return a data set's own `fingerprint`, or the hash of its length and a few of its items."""
    identity = getattr(data, "fingerprint", None)
    if isinstance(identity, str):
        return identity
    chosen = torch.linspace(0, len(data) - 1, min(ITEMS, len(data)), dtype=torch.float64).round().long()
    with preserve_generators():
        seed_generators(0)
        return of_tensors([(f"{len(data)}", chosen), *_tensors_of(data.take(chosen), "")])


def _sample(values: Tensor) -> bytes:
    flat = values.detach().reshape(-1)
    sampled = flat[:: max(1, flat.numel() // SAMPLED)].cpu().contiguous()
    return sampled.view(torch.uint8).numpy().tobytes() if sampled.numel() else b""


def _tensors_of(batch: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a nested batch, and the printed form of anything else."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from _tensors_of(batch[key], f"{name}.{key}")
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for number, part in enumerate(batch):
            yield from _tensors_of(part, f"{name}.{number}")
    else:
        yield (f"{name}={batch!r}" if isinstance(batch, str | int | float) else name), torch.empty(0)
