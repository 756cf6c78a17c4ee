"""What adaptation leaves as it found it, whatever happens: threads, generators, modes, flags; and the device that it runs on."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attach import FLOAT32, IMAGES, SHAPES, net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo import adapt
from eigenzoo.adapt import maps
from eigenzoo.adapt.calibrate import calibrate, descend
from eigenzoo.adapt.fingerprints import of_data
from eigenzoo.adapt.search import search
from eigenzoo.adapt.training import TensorData, moved, train
from eigenzoo.errors import DataError

LABELS = torch.tensor([0, 1, 1, 0, 1])
DATA = TensorData(IMAGES, LABELS)
OPTIONS: dict[str, Any] = {"steps": 6, "batch_size": 4}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and a torch build that knows it")


@pytest.fixture
def space(tmp_path: Path) -> ez.Subspace:
    stacks = {name: random_stack(6, shape, seed=place) for place, (name, shape) in enumerate(SHAPES.items())}
    return ez.fit(write_stacks(tmp_path, stacks), 3)


def noisy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that draws, and is of the kind that the module's own mode decides about."""
    images, labels = batch
    return cross_entropy(module(images + 0.1 * torch.randn_like(images)), labels)


def stopping(error: type[BaseException], after: int = 3) -> Callable[..., Tensor]:
    """A loss, or a metric, that raises when it is called for the so-manyth time."""
    calls = []

    def called(module: nn.Module, batch: Any = None) -> Tensor:
        calls.append(module)
        if len(calls) == after:
            raise error("stop")
        return noisy(module, (IMAGES, LABELS))

    return called


def surroundings(module: nn.Module) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "draws": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "modes": [part.training for part in module.modules()],
        "trainable": [parameter.requires_grad for _, parameter in sorted(module.named_parameters())],
    }


@contextmanager
def unchanged(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the process changes meanwhile, and no generator of a GPU is seeded: they cannot be asked without one."""
    seeded: list[int] = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeded.append)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = surroundings(module)
    try:
        yield
        assert surroundings(module) == before
        assert seeded == []
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_training_leaves_everything_else_as_it_was(
    space: ez.Subspace, error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapted = adapt.attach(net(), space, besides=["head.*"])
    adapted.module.body.eval()
    with unchanged(adapted.module, monkeypatch), torch.no_grad():
        if error is None:
            train(adapted, DATA, noisy, checkpoint=tmp_path / "c", **OPTIONS)
        else:
            with pytest.raises(error, match="stop"):
                train(adapted, DATA, stopping(error), checkpoint=tmp_path / "c", **OPTIONS)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_search_and_calibration_leave_everything_as_it_was(
    space: ez.Subspace, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cma")
    adapted = adapt.attach(net(), space)
    before = adapted.coefficients()
    torch.manual_seed(0)
    with unchanged(adapted.module, monkeypatch), torch.random.fork_rng(), torch.no_grad():
        with pytest.raises(error, match="stop"):
            search(adapted, stopping(error), budget=100)
        with pytest.raises(error, match="stop"):
            descend(adapted, stopping(error), 6)
    assert all(torch.equal(values, before[name]) for name, values in adapted.coefficients().items())
    module = net()
    with unchanged(module, monkeypatch), torch.random.fork_rng(), pytest.raises(error, match="stop"):
        calibrate(module, space, "m1", stopping(error))


def test_gradients_are_on_where_they_are_needed(space: ez.Subspace) -> None:
    with torch.no_grad():
        adapted = calibrate(net(), space, "m1", lambda module, step: noisy(module, (IMAGES, LABELS)), steps=3)
        assert len(train(adapted, DATA, noisy, **OPTIONS).losses) == 6
    assert all(parameter.requires_grad for parameter in adapted.parameters())


def test_data_are_looked_at_without_a_draw_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawing(TensorData):
        def take(self, indices: Tensor) -> tuple[Tensor, ...]:
            return (super().take(indices)[0] + torch.rand(()),)

    with unchanged(net(), monkeypatch):
        assert of_data(Drawing(IMAGES)) == of_data(Drawing(IMAGES))


def test_bases_are_read_by_workers_that_leave_the_threads_alone(
    space: ez.Subspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread each while they read, all of them afterwards, also where a basis cannot be read."""
    used: list[int] = []
    told: list[tuple[Any, ...]] = []

    def seen(*words: Any) -> maps.Map:
        used.append(torch.get_num_threads())
        if len(used) > 3:
            raise DataError("cannot be read")
        return maps.map_of(*words)

    monkeypatch.setattr(sys.modules["eigenzoo.adapt.attach"], "map_of", seen)
    module = net()
    with unchanged(module, monkeypatch):
        adapt.detach(adapt.attach(module, space, progress=lambda *words: told.append(words)))
        assert used == [1, 1, 1]
        assert told == [("reading bases", done, 3) for done in (1, 2, 3)]
        with pytest.raises(DataError, match="cannot be read"):
            adapt.attach(module, space)


Pair = namedtuple("Pair", "one other")


def test_batches_go_to_the_device_however_they_are_put_together() -> None:
    batch = {"x": torch.ones(2), "y": [torch.ones(1), (torch.zeros(3), "text", None)], "z": Pair(torch.ones(1), 3)}
    found = moved(batch, "meta")
    assert found["x"].is_meta
    assert found["y"][0].is_meta
    assert found["y"][1][0].is_meta
    assert found["y"][1][1:] == ("text", None)
    assert isinstance(found["z"], Pair)
    assert found["z"].one.is_meta
    assert found["z"].other == 3
    assert moved(batch, None) is batch


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "mps:0"])
def test_a_device_that_is_not_there_is_refused_before_anything_changes(space: ez.Subspace, device: str) -> None:
    adapted, module = adapt.attach(net(), space), net()
    before = adapted.coefficients()
    with pytest.raises(ez.UsageError, match=f"device '{device}'"):
        train(adapted, DATA, noisy, device=device, **OPTIONS)
    with pytest.raises(ez.UsageError, match=f"device '{device}'"):
        search(adapted, lambda module: 0.0, device=device)
    with pytest.raises(ez.UsageError, match=f"device '{device}'"):
        calibrate(module, space, "m1", lambda module, step: module(IMAGES).sum(), device=device)
    assert all(torch.equal(values, before[name]) for name, values in adapted.coefficients().items())
    assert set(module.state_dict()) == set(net().state_dict())


def test_naming_the_device_that_everything_is_on_changes_no_bit(space: ez.Subspace) -> None:
    found = []
    for device in (None, "cpu"):
        adapted = adapt.attach(net(), space)
        train(adapted, DATA, noisy, device=device, **OPTIONS)
        found.append(adapted.coefficients())
    assert all(torch.equal(found[0][name], found[1][name]) for name in SHAPES)


@pytest.mark.cuda
@needs_gpu
def test_training_and_search_on_a_gpu_end_where_they_do_here(space: ez.Subspace) -> None:
    def plain(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(module(batch[0]), batch[1])

    ended = []
    for device in ("cpu", "cuda"):
        adapted = adapt.attach(net(), space)
        state = torch.cuda.get_rng_state()
        train(adapted, DATA, plain, device=device, **OPTIONS)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert next(adapted.parameters()).device.type == device
        values = adapted.coefficients()
        images = IMAGES.to(device)
        search(adapted, lambda module, images=images: float(module(images).square().sum()), budget=40, device=device)
        moved_to = calibrate(net(), space, "m1", lambda module, step, x=images: module(x).sum(), steps=2, device=device)
        assert next(moved_to.module.parameters()).device.type == device
        ended.append(values)
    for name in SHAPES:
        # Adam divides by the root of a mean of squares: a gradient's rounding moves a step by as much of itself.
        torch.testing.assert_close(ended[0][name], ended[1][name], atol=64 * FLOAT32, rtol=64 * FLOAT32)
