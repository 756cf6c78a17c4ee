"""Train coefficients so that training can be interrupted at any time without changing its result.

A step's batch, learning rate and random draws depend only on the seed and the step's number. So a checkpoint of the state is
enough, and a run that was killed and resumed gives the same coefficients bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eigenzoo.adapt import unfinished
from eigenzoo.adapt.attach import Adapted
from eigenzoo.adapt.fingerprints import of_data, of_tensors, of_values
from eigenzoo.adapt.trained import LEARNING_RATE
from eigenzoo.errors import DataError, UsageError
from eigenzoo.passes.draws import preserve_generators, seed_generators
from eigenzoo.passes.resources import check_device
from eigenzoo.records import Progress, no_progress
from eigenzoo.seeds import check_seed

WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""

MOST_SECONDS = 30.0
"""Longest time between two checkpoints. Steps of a large model are slow, and an interruption must not lose minutes."""

Loss = Callable[[nn.Module, Any], Tensor]
"""Called with the module and a batch. Returns a scalar."""


class Data(Protocol):
    """Training data: items that are taken by their numbers.

    A data set can have a text attribute `fingerprint` that identifies it. Otherwise a few of its items are hashed.
    """

    def __len__(self) -> int:
        """Return the number of items."""

    def take(self, indices: Tensor) -> Any:
        """Return the batch of these items for the loss. The same numbers give the same batch."""


class TensorData:
    """Tensors with items along the first axis. A batch is a tuple of their rows.

    >>> TensorData(torch.arange(4), torch.arange(4) % 2).take(torch.tensor([3, 0]))
    (tensor([3, 0]), tensor([1, 0]))
    """

    def __init__(self, *tensors: Tensor) -> None:
        if not tensors or len({len(tensor) for tensor in tensors}) != 1:
            raise UsageError(
                f"tensors of {[len(tensor) for tensor in tensors]} items", rule="all have the same number of items"
            )
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def take(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return these rows of every tensor."""
        return tuple(tensor[indices.to(tensor.device)] for tensor in self.tensors)


@dataclass(frozen=True)
class Trained:
    """Record of a training.

    Attributes:
        losses: the loss of every step, including those before an interruption.
        taken_up_at: number of steps in the resumed checkpoint; 0 for a run from the start.
    """

    losses: tuple[float, ...]
    taken_up_at: int


def train(
    adapted: Adapted,
    data: Data,
    loss: Loss,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 50,
    device: str | None = None,
    progress: Progress = no_progress,
) -> Trained:
    """Train `adapted.parameters()` with Adam, in place.

    The learning rate rises over the first tenth of the steps and falls to zero by half a cosine. Batches are taken from whole
    epochs in shuffled order. The module runs in eval mode, so that only coefficients change: without dropout, and with fixed
    averages of a batch norm. Torch's generators, on the CPU and on the parameters' GPUs, are seeded by seed and step before each
    call of the loss.

    Args:
        loss: called as loss(module, batch) with `adapted.module`.
        learning_rate: learning rate in units of the zoo's spread (`trained`).
        seed: seed of the order of the items, and of the loss's random draws.
        checkpoint: a file that is written every `every` steps and at least every 30 seconds. If it exists, training resumes from
            it. It is not removed at the end (`unfinished.remove`).
        device: the device to which the module and every batch are moved (`cpu`, `cuda`, `cuda:1`). None does not move them.
        progress: called as progress("training", done, total).

    An interrupted training that is called again with the same arguments on the same kind of machine gives the same coefficients bit
    for bit as an uninterrupted one, if the model's own operations are deterministic.

    Raises UsageError for invalid options, a missing device and a checkpoint of another run, FormatError for a damaged checkpoint,
    and DataError if the loss is not finite. Cost: a checkpoint has three times the bytes of the trained parameters.
    """
    seed = check_options(steps, batch_size, learning_rate, seed, every)
    if len(data) < 1:
        raise UsageError("there is nothing to train on", rule="data have at least 1 item")
    parameters = [parameter for parameter in adapted.parameters() if parameter.numel()]
    if not parameters:
        raise UsageError("there is nothing to train", rule="no layer of the bundle has a direction (rank 0)")
    move(adapted.module, device)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    run = _fingerprint(adapted, parameters, data, loss, [steps, batch_size, learning_rate, seed])
    losses: list[float] = []
    if checkpoint is not None:
        if checkpoint.exists():
            losses = unfinished.read(checkpoint, run, parameters, optimizer, steps)
        else:
            # Written at once, so that a call after an early interruption starts from the same coefficients.
            unfinished.write(checkpoint, run, parameters, optimizer, losses)
    written = time.monotonic()
    taken_up_at, order = len(losses), Order(len(data), batch_size, seed)
    gpus = {parameter.device.index or 0 for parameter in parameters if parameter.device.type == "cuda"}
    with _only_coefficients_change(adapted.module), preserve_generators(gpus), torch.enable_grad():
        for step in range(taken_up_at, steps):
            seed_generators(_seed(seed, "step", step), gpus)
            scalar_loss = _scalar(loss(adapted.module, moved(data.take(order.batch(step)), device)), step)
            optimizer.zero_grad()
            scalar_loss.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, learning_rate)
            optimizer.step()
            losses.append(scalar_loss.item())
            late = time.monotonic() - written > MOST_SECONDS
            if checkpoint is not None and (late or len(losses) % every == 0 or len(losses) == steps):
                unfinished.write(checkpoint, run, parameters, optimizer, losses)
                written = time.monotonic()
            progress("training", len(losses), steps)
    return Trained(tuple(losses), taken_up_at)


def rate(step: int, steps: int, learning_rate: float) -> float:
    """Return the learning rate of one step, counted from 0.

    >>> [round(rate(step, 20, 1.0), 2) for step in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    rising = max(1, round(WARMUP * steps))
    if step < rising:
        return learning_rate * (step + 1) / rising
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Order:
    """The items of each step: whole epochs in shuffled order, split into batches.

    A batch depends only on seed and step, so that no state is kept between steps.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int) -> None:
        self._num_items, self._batch_size, self._seed = num_items, batch_size, seed
        self._last_epoch: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, step: int) -> Tensor:
        """Return the numbers of one step's items."""
        first, stop = step * self._batch_size, (step + 1) * self._batch_size
        parts = []
        while first < stop:
            epoch, offset = divmod(first, self._num_items)
            part = self._epoch(epoch)[offset : offset + stop - first]
            parts.append(part)
            first += len(part)
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        if self._last_epoch[0] != epoch:
            generator = torch.Generator().manual_seed(_seed(self._seed, "epoch", epoch))
            self._last_epoch = (epoch, torch.randperm(self._num_items, generator=generator))
        return self._last_epoch[1]


def _seed(seed: int, what: str, number: int) -> int:
    """Return a different seed for each use. Sums of small numbers would give two uses the same draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what} {number}".encode()).digest()[:8], "big") >> 1


def _scalar(loss: Tensor, step: int) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise UsageError(
            "the loss is not a scalar that depends on the trained parameters",
            rule="loss(module, batch) returns one number",
        )
    if not bool(torch.isfinite(loss)):
        raise DataError(
            f"the loss is {loss.item()} at step {step + 1}",
            next_step="lower the learning rate, or look for NaN or Inf in the data",
        )
    return loss


@contextmanager
def _only_coefficients_change(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore the modes of its submodules afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def move(module: nn.Module, device: str | None) -> None:
    """Move a module to a device, in place. None does not move it. Raises UsageError for a missing device."""
    if device is not None:
        check_device(device)
        module.to(device)


def moved(batch: Any, device: str | None) -> Any:
    """Return a nested batch with its tensors on a device. None does not move them."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(part, device) for key, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(part, device) for part in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(moved(part, device) for part in batch)
    return batch


def _fingerprint(
    adapted: Adapted, parameters: Sequence[nn.Parameter], data: Data, loss: Loss, options: list[float]
) -> str:
    """Return all inputs of a run except the code. Only a checkpoint with the same inputs can be resumed."""
    trained = {id(parameter) for parameter in parameters}
    # Includes buffers outside the state dict: the bases, also random ones, and the start.
    state = [*adapted.module.named_parameters(), *adapted.module.named_buffers()]
    frozen = of_tensors((name, values) for name, values in state if id(values) not in trained)
    start = [adapted.start.mean, of_tensors(sorted(adapted.start.values.items()))]
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    return of_values([adapted.space.manifest.basis_id, start, frozen, of_data(data), name, options])


def check_options(steps: int, batch_size: int, learning_rate: float, seed: int, every: int = 1) -> int:
    """Raise UsageError for invalid options, before long work starts. Return the seed."""
    for name, value in (("steps", steps), ("batch_size", batch_size), ("every", every)):
        if value < 1:
            raise UsageError(f"{name} {value}", rule="a training has at least 1 step, of at least 1 item")
    if not 0 < learning_rate < math.inf:
        raise UsageError(f"learning rate {learning_rate}", rule="a learning rate is a number above 0")
    return check_seed(seed)
