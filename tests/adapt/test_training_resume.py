"""Training that is stopped: the same coefficients to the bit, and checkpoints of nothing else are taken up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eigenzoo as ez
from builders import random_stack, seeded, write_stacks
from eigenzoo import adapt
from eigenzoo.adapt import training, unfinished
from eigenzoo.adapt.training import Order, TensorData, Trained, rate, train
from eigenzoo.errors import DataError, EigenzooError, FormatError, UsageError
from eigenzoo.formats.output.held_folder import system_mark
from guard import HANG

STEPS, EVERY = 60, 7

PROGRAM = """
import sys, time
from pathlib import Path
import torch
import eigenzoo as ez
from eigenzoo import adapt
from eigenzoo.adapt.training import TensorData, train

torch.set_num_threads(1)
bundle, checkpoint, output = map(Path, sys.argv[1:4])
stop, seconds = int(sys.argv[4]), float(sys.argv[5])

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)
    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs)))

def noisy(net, batch):
    inputs, labels = batch
    # What the loss draws must be drawn again after an interruption.
    return torch.nn.functional.cross_entropy(net(inputs + 0.1 * torch.randn_like(inputs)), labels)

def progress(stage, done, total):
    print(done, flush=True)
    if done == stop:
        time.sleep(seconds)

torch.manual_seed(0)
draw = torch.Generator().manual_seed(1)
data = TensorData(torch.randn(50, 6, generator=draw), torch.randint(3, (50,), generator=draw))
adapted = adapt.attach(Net(), ez.load(bundle), besides=["head.*"])
# As long a way as can be: where draws of this process decided anything, two processes would differ.
torch.seed()
done = train(adapted, data, noisy, steps=60, batch_size=16, checkpoint=checkpoint, every=7, progress=progress)
print("taken up at", done.taken_up_at)
adapt.save(adapted, output)
"""


class Net(nn.Module):
    """Two layers of a zoo, a batch norm and a dropout between them, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.body(inputs)))))


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def data(num_items: int = 50, seed: int = 1) -> TensorData:
    draw = seeded(seed)
    return TensorData(torch.randn(num_items, 6, generator=draw), torch.randint(3, (num_items,), generator=draw))


@pytest.fixture
def zoo(tmp_path: Path) -> list[Path]:
    return write_stacks(
        tmp_path / "zoo", {"body.weight": random_stack(6, (5, 6), 0), "body.bias": random_stack(6, (5,), 1)}
    )


@pytest.fixture
def bundle(zoo: list[Path], tmp_path: Path) -> Path:
    return ez.fit(zoo, 3).save(tmp_path / "bundle")


@pytest.fixture
def space(bundle: Path) -> ez.Subspace:
    return ez.load(bundle)


def attached(space: ez.Subspace, **options: Any) -> adapt.Adapted:
    torch.manual_seed(options.pop("net", 0))
    return adapt.attach(Net(), space, **{"besides": ["head.*"], **options})


def trained(adapted: adapt.Adapted, **options: Any) -> Trained:
    return train(adapted, **{"data": data(), "loss": cross_entropy, "steps": STEPS, "batch_size": 16, **options})


def values(adapted: adapt.Adapted) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in adapted.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def run(bundle: Path, folder: Path, stop: tuple[int, signal.Signals] | None) -> int:
    """Run the program, and send a signal when it has done so many steps and waits; returns at which step it had begun."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    words = [str(bundle), str(folder / "checkpoint"), str(folder / "task.safetensors")]
    words += [str(stop[0] if stop else 0), str(HANG)]
    process = subprocess.Popen(
        [sys.executable, str(program), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    begun_at = 0
    for line in process.stdout:
        if line.startswith("taken up at"):
            begun_at = int(line.split()[-1])
        elif stop is not None and int(line) == stop[0]:
            process.send_signal(stop[1])
    _, err = process.communicate(timeout=HANG)
    assert (process.returncode == 0) is (stop is None), err
    if stop is not None:
        assert process.returncode == -stop[1] or "KeyboardInterrupt" in err, err
    return begun_at


@pytest.mark.slow
def test_a_stopped_process_ends_with_the_file_of_one_that_was_not(bundle: Path, tmp_path: Path) -> None:
    for name in ("clean", "stopped"):
        (tmp_path / name).mkdir()
    assert run(bundle, tmp_path / "clean", None) == 0
    # At random, but not the same twice: the second time later than the first one had come.
    first = random.randrange(1, STEPS // 2)
    second = random.randrange(first + EVERY, STEPS - 5)
    for step, number in ((first, signal.SIGKILL), (second, signal.SIGINT)):
        run(bundle, tmp_path / "stopped", (step, number))
        assert not (tmp_path / "stopped" / "task.safetensors").exists()
    assert run(bundle, tmp_path / "stopped", None) == second // EVERY * EVERY
    for name in ("task.safetensors", "checkpoint"):
        files = [(tmp_path / folder / name).read_bytes() for folder in ("clean", "stopped")]
        assert files[0] == files[1], (name, first, second)


def test_training_is_adam_with_the_said_rates_and_batches(space: ez.Subspace) -> None:
    adapted, plain = attached(space), attached(space)
    found = trained(adapted, learning_rate=0.05, seed=3)
    order, losses = Order(50, 16, 3), []
    plain.module.eval()
    optimizer = torch.optim.Adam(plain.parameters())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(step, STEPS, 0.05)
        loss = cross_entropy(plain.module, data().take(order.batch(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert equal(values(adapted), values(plain))
    assert found == Trained(tuple(losses), 0)
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.5, "a training that does not train"


def test_every_epoch_has_every_item_once_and_batches_follow_from_the_step_alone() -> None:
    order = Order(50, 16, 0)
    batches = [order.batch(step) for step in range(50)]
    epochs = torch.cat(batches).view(16, 50)
    assert torch.equal(epochs.sort(1).values, torch.arange(50).expand(16, 50))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 16
    assert all(torch.equal(Order(50, 16, 0).batch(step), batches[step]) for step in (49, 3, 20))
    assert not torch.equal(Order(50, 16, 1).batch(0), batches[0])
    assert torch.cat([Order(3, 8, 0).batch(step) for step in range(3)]).bincount().tolist() == [8, 8, 8]


def test_nothing_but_coefficients_changes(space: ez.Subspace) -> None:
    adapted = attached(space)
    adapted.module.train()
    adapted.module.drop.eval()  # type: ignore[union-attr, operator]
    modes = [part.training for part in adapted.module.modules()]
    trained_ids = set(map(id, adapted.parameters()))
    state = [*adapted.module.named_parameters(), *adapted.module.named_buffers()]
    before = {name: tensor.clone() for name, tensor in state if id(tensor) not in trained_ids}
    drawn = torch.get_rng_state()
    trained(adapted)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [part.training for part in adapted.module.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in state if name in before)


def stop_at(step: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        assert (stage, total) == ("training", STEPS)
        if done == step:
            raise KeyboardInterrupt

    return progress


def test_slow_steps_are_kept_before_so_many_are_done(
    space: ez.Subspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MOST_SECONDS", 0.0)
    adapted, clean, checkpoint = attached(space), attached(space), tmp_path / "checkpoint"
    undisturbed = trained(clean)
    with pytest.raises(KeyboardInterrupt):
        trained(adapted, checkpoint=checkpoint, every=1000, progress=stop_at(3))
    assert len(load_file(checkpoint)["losses"]) == 3
    assert trained(adapted, checkpoint=checkpoint, every=1000) == Trained(undisturbed.losses, 3)
    assert equal(values(adapted), values(clean))


@pytest.fixture(autouse=True)
def never_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine steps may take seconds."""
    monkeypatch.setattr(training, "MOST_SECONDS", float("inf"))


def test_a_run_that_is_called_again_in_the_same_process_goes_on(space: ez.Subspace, tmp_path: Path) -> None:
    clean = attached(space)
    undisturbed = trained(clean)
    adapted, checkpoint = attached(space), tmp_path / "checkpoint"
    for step, taken_up_at in ((3, 0), (20, 0), (40, 14)):
        with pytest.raises(KeyboardInterrupt):
            trained(adapted, checkpoint=checkpoint, every=EVERY, progress=stop_at(step))
        done = len(load_file(checkpoint)["losses"])
        assert done == step // EVERY * EVERY >= taken_up_at
    found = trained(adapted, checkpoint=checkpoint, every=EVERY)
    assert found == Trained(undisturbed.losses, 35)
    assert equal(values(adapted), values(clean))
    again = attached(space)
    assert trained(again, checkpoint=checkpoint).taken_up_at == STEPS
    assert equal(values(again), values(clean))


def test_a_checkpoint_of_another_run_is_refused(space: ez.Subspace, zoo: list[Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    trained(attached(space), checkpoint=checkpoint)
    other = ez.fit(zoo[:5], 3)
    for adapted, options in (
        (attached(space), {"steps": STEPS + 1}),
        (attached(space), {"batch_size": 15}),
        (attached(space), {"learning_rate": 0.031}),
        (attached(space), {"seed": 1}),
        (attached(space), {"data": data(49)}),
        (attached(space), {"data": data(seed=2)}),
        (attached(space), {"loss": lambda net, batch: cross_entropy(net, batch)}),
        (attached(space, start="zero"), {}),
        (attached(space, start="m2"), {}),
        (attached(space, random_basis=True), {}),
        (attached(space, net=1), {}),
        (attached(space, besides=["head.bias"]), {}),
        (attached(other), {}),
    ):
        before, content = values(adapted), checkpoint.read_bytes()
        with pytest.raises(UsageError, match=r"checkpoint of another run.*delete it to begin anew"):
            trained(adapted, checkpoint=checkpoint, **options)
        assert equal(values(adapted), before)
        assert checkpoint.read_bytes() == content
    assert trained(attached(space), checkpoint=checkpoint).taken_up_at == STEPS


def test_a_damaged_checkpoint_is_refused(space: ez.Subspace, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    trained(attached(space), checkpoint=checkpoint)
    good = checkpoint.read_bytes()
    for content, message in (
        (good[:-5], "is no checkpoint of a training"),
        (b"", "is no checkpoint of a training"),
        (good.replace(b"eigenzoo-training", b"eigenzoo-trainers"), "is no checkpoint of a training"),
        (good.replace(b'"step":"60"', b'"step":"59"'), "is damaged"),
        (good.replace(b'"step":"60"', b'"step":"6x"'), "is damaged"),
        (good.replace(b'"value.0"', b'"value.9"'), "is damaged"),
    ):
        assert content != good
        checkpoint.write_bytes(content)
        adapted = attached(space)
        before = values(adapted)
        with pytest.raises(FormatError, match=message):
            trained(adapted, checkpoint=checkpoint)
        assert equal(values(adapted), before)
    save_file({"x": torch.ones(3)}, checkpoint)
    with pytest.raises(FormatError, match="is no checkpoint of a training"):
        trained(attached(space), checkpoint=checkpoint)


def test_what_is_left_of_a_killed_write_goes_with_the_checkpoint(tmp_path: Path) -> None:
    mark = system_mark()
    for name in (
        "task.checkpoint",
        f".task.checkpoint.tmp-{mark}01234567",
        f".task.checkpoint2.tmp-{mark}01234567",
        "task",
    ):
        (tmp_path / name).mkdir() if ".tmp-" in name else (tmp_path / name).touch()
    unfinished.remove(tmp_path / "task.checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".task.checkpoint2.tmp-{mark}01234567", "task"]
    unfinished.remove(tmp_path / "task.checkpoint")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"every": 0}, "every 0"),
        ({"learning_rate": 0.0}, "learning rate 0.0"),
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"seed": -1}, "seed -1"),
        ({"data": TensorData(torch.empty(0, 6), torch.empty(0))}, "nothing to train on"),
        ({"loss": lambda net, batch: net(batch[0])}, "not a scalar"),
        ({"loss": lambda net, batch: torch.tensor(1.0)}, "not a scalar"),
        ({"loss": lambda net, batch: cross_entropy(net, batch) * float("inf")}, "the loss is inf at step 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(space: ez.Subspace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EigenzooError, match=message) as caught:
        trained(attached(space), **options)
    assert isinstance(caught.value, DataError if "loss is" in message else UsageError)


def test_a_bundle_without_directions_has_nothing_to_train(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "same", {"body.weight": random_stack(1, (5, 6)).expand(4, 5, 6)})
    space = ez.fit(paths, "auto")
    with pytest.raises(UsageError, match="nothing to train"):
        trained(attached(space, besides=[]))


def test_tensors_of_other_lengths_are_no_data() -> None:
    with pytest.raises(UsageError, match=r"tensors of \[3, 2\] items"):
        TensorData(torch.ones(3), torch.ones(2))
