"""Training of coefficients that can be stopped at any moment: what it ends with does not depend on how often it was.

Every step is a function of the seed, the step's number and the state before it: its batch, its learning rate, and whatever the
loss draws. So a checkpoint of the state is all that is needed, and a run that was killed and taken up again gives the same
coefficients to the bit.
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
"""Between two checkpoints: steps of a large model are slow, and an early interruption must not lose minutes."""

Loss = Callable[[nn.Module, Any], Tensor]
"""Called with the module and a batch; returns a scalar."""


class Data(Protocol):
    """What is trained on: items that are taken by their numbers.

    A data set may say what it is by an attribute `fingerprint` (text); else a few of its items are looked at.
    """

    def __len__(self) -> int:
        """Return how many items there are."""

    def take(self, indices: Tensor) -> Any:
        """Return the batch of these items, as the loss takes it; the same for the same numbers."""


class TensorData:
    """Tensors whose first axis counts the items; a batch is a tuple of their rows.

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
    """What a training did.

    Attributes:
        losses: the loss of every step, those before an interruption included.
        taken_up_at: how many steps a checkpoint had done already; 0 for a run from the start.
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
    """Train what `adapted.parameters()` gives with Adam, in place.

    The learning rate rises over the first tenth of the steps and falls to zero by half a cosine. Batches are cut from whole
    epochs in shuffled order. The module runs in eval mode, since nothing but coefficients may change: no dropout, and no
    averages of a batch norm that move. What the loss draws from torch's generators, on the CPU and on the parameters' GPUs, is
    drawn from seed and step.

    Args:
        loss: called as loss(module, batch); its module is `adapted.module`.
        learning_rate: in units of how far apart the zoo's models lie (`trained`).
        seed: of the order of the items, and of what the loss draws.
        checkpoint: a file that is written every `every` steps and at least every 30 seconds, and taken up where it is there
            already. It stays when the training is done (`unfinished.remove`).
        device: where the module and every batch are moved to (`cpu`, `cuda`, `cuda:1`); None: they stay where they are.
        progress: called as progress("training", done, total).

    An interrupted training ends, when it is called again with the same arguments on the same kind of machine, with the same
    coefficients to the bit as one that was not, as far as the model's own operations give the same bits twice.

    Raises UsageError for options that cannot be meant, a device that is not there and a checkpoint of another run, FormatError for
    a damaged one, and DataError where the loss is not finite. Cost: a checkpoint has three times the bytes of what is trained.
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
            # At once: whoever stops before the first checkpoint and calls again with the same module begins there too.
            unfinished.write(checkpoint, run, parameters, optimizer, losses)
    written = time.monotonic()
    taken_up_at, order = len(losses), Order(len(data), batch_size, seed)
    gpus = {parameter.device.index or 0 for parameter in parameters if parameter.device.type == "cuda"}
    with _only_coefficients_change(adapted.module), preserve_generators(gpus), torch.enable_grad():
        for step in range(taken_up_at, steps):
            seed_generators(_seed(seed, "step", step), gpus)
            found = _scalar(loss(adapted.module, moved(data.take(order.batch(step)), device)), step)
            optimizer.zero_grad()
            found.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, learning_rate)
            optimizer.step()
            losses.append(found.item())
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
    """Which items each step takes: whole epochs in shuffled order, cut into batches.

    A batch follows from seed and step alone, so that nothing is to be kept between steps.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int) -> None:
        self._num_items, self._batch_size, self._seed = num_items, batch_size, seed
        self._known: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, step: int) -> Tensor:
        """Return the numbers of one step's items."""
        place, stop = step * self._batch_size, (step + 1) * self._batch_size
        parts = []
        while place < stop:
            epoch, offset = divmod(place, self._num_items)
            part = self._epoch(epoch)[offset : offset + stop - place]
            parts.append(part)
            place += len(part)
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        if self._known[0] != epoch:
            generator = torch.Generator().manual_seed(_seed(self._seed, "epoch", epoch))
            self._known = (epoch, torch.randperm(self._num_items, generator=generator))
        return self._known[1]


def _seed(seed: int, what: str, number: int) -> int:
    """Return a seed of its own for each use: sums of small numbers would give two uses the same draws."""
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
    """Put a module into eval mode, and each part of it back into its own."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def move(module: nn.Module, device: str | None) -> None:
    """Move a module to a device, in place; None leaves it where it is. Raises UsageError for one that is not there."""
    if device is not None:
        check_device(device)
        module.to(device)


def moved(batch: Any, device: str | None) -> Any:
    """Return a batch with its tensors on a device, however they are put together; None leaves it as it is."""
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
    """Say what decides how a run ends, but for the code: a checkpoint of anything else must not be taken up."""
    trained = {id(parameter) for parameter in parameters}
    # Buffers that no state dict holds are here too: the bases, random ones included, and the start.
    state = [*adapted.module.named_parameters(), *adapted.module.named_buffers()]
    frozen = of_tensors((name, values) for name, values in state if id(values) not in trained)
    start = [adapted.start.mean, of_tensors(sorted(adapted.start.values.items()))]
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    return of_values([adapted.space.manifest.basis_id, start, frozen, of_data(data), name, options])


def check_options(steps: int, batch_size: int, learning_rate: float, seed: int, every: int = 1) -> int:
    """Raise UsageError for options that cannot be meant; call it before long work starts. Returns the seed."""
    for name, value in (("steps", steps), ("batch_size", batch_size), ("every", every)):
        if value < 1:
            raise UsageError(f"{name} {value}", rule="a training has at least 1 step, of at least 1 item")
    if not 0 < learning_rate < math.inf:
        raise UsageError(f"learning rate {learning_rate}", rule="a learning rate is a number above 0")
    return check_seed(seed)
