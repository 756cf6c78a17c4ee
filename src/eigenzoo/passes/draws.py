"""Torch's global random generators: libraries draw from them, and their state belongs to the user.

`torch.manual_seed` sets the generators of all devices, and `fork_rng` gives back those that it is told of: a seed for the CPU would
move the draws of the user's GPUs. So whatever seeds a global generator does it by `seed_generators`, inside `preserve_generators`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def preserve_generators(gpus: Collection[int] = ()) -> Iterator[None]:
    """Leave the generators of the CPU and of these GPUs as they were."""
    with torch.random.fork_rng(devices=sorted(gpus)):
        yield


def seed_generators(seed: int, gpus: Collection[int] = ()) -> None:
    """Seed the generators of the CPU and of these GPUs, which are in use already; as `torch.manual_seed` does for all."""
    torch.default_generator.manual_seed(seed)
    for gpu in gpus:
        torch.cuda.default_generators[gpu].manual_seed(seed)
