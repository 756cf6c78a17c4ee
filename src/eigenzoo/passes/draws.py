"""Torch's global random generators: libraries draw from them, and their state belongs to the user.

`torch.manual_seed` sets the generators of all devices, but `fork_rng` restores only those that it is given. A seed for the CPU
would thus change the user's GPU generators. All code that seeds a global generator therefore calls `seed_generators` inside
`preserve_generators`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def preserve_generators(gpus: Collection[int] = ()) -> Iterator[None]:
    """Restore the generators of the CPU and of these GPUs at the end."""
    with torch.random.fork_rng(devices=sorted(gpus)):
        yield


def seed_generators(seed: int, gpus: Collection[int] = ()) -> None:
    """Seed the generators of the CPU and of these GPUs, as `torch.manual_seed` does for all. The GPUs must be in use already."""
    torch.default_generator.manual_seed(seed)
    for gpu in gpus:
        torch.cuda.default_generators[gpu].manual_seed(seed)
