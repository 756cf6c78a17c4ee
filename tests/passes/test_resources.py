"""Bounds of tasks, on the CPU and on a GPU that is made up here; memory that is short; what contradicts open workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo.errors import ResourceError, UsageError
from eigenzoo.passes.resources import (
    MAX_LAYER_BYTES,
    MOST_ON_A_GPU,
    SHARE_OF_GPU,
    SPAN_BYTES,
    Resources,
    enough_memory,
    resources_for,
)
from eigenzoo.passes.workers import Workers, local_workers, opened_workers

GIB = 2**30


def gpu(monkeypatch: pytest.MonkeyPatch, free: int, reserved: int = 0, allocated: int = 0) -> list[str]:
    """A GPU that is not there; returns the devices whose memory was asked for."""
    asked: list[str] = []

    def mem_get_info(device: str) -> tuple[int, int]:
        asked.append(device)
        return free, 80 * GIB

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", mem_get_info)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: reserved)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: allocated)
    return asked


@pytest.fixture(autouse=True)
def machine_of_64_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigenzoo.passes.resources.machine_memory", lambda: 64 * GIB)


def test_a_small_card_bounds_what_a_large_machine_would_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gpu(monkeypatch, 2 * GIB)
    found = resources_for(4, device="cuda:1")
    share = 2 * GIB // SHARE_OF_GPU // 2 // 4
    assert found == Resources(min(SPAN_BYTES, share), min(MAX_LAYER_BYTES, share), "cuda:1")
    assert asked == ["cuda:1"]
    assert resources_for(4, 64 * GIB, "cuda:1") == found, "the card has no more, whatever is asked for"
    assert resources_for(4) == Resources(SPAN_BYTES, MAX_LAYER_BYTES)


def test_threads_run_on_the_card_that_the_caller_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gpu(monkeypatch, 2 * GIB)
    assert resources_for(4, device="cuda").device == "cuda:1"
    assert asked == ["cuda:1"]


def test_the_machine_bounds_what_a_large_card_would_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 80 * GIB)
    monkeypatch.setattr("eigenzoo.passes.resources.machine_memory", lambda: GIB)
    assert resources_for(1, device="cuda").block_bytes == GIB // 4 // 2
    assert resources_for(1, 32 * 2**20, "cuda").block_bytes == 16 * 2**20


def test_bounds_stay_where_a_little_of_the_card_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted fit goes on only under the same bounds."""
    gpu(monkeypatch, int(0.7 * GIB))
    first = resources_for(4, device="cuda")
    gpu(monkeypatch, int(0.6 * GIB))
    assert resources_for(4, device="cuda") == first
    gpu(monkeypatch, int(0.1 * GIB), reserved=GIB, allocated=int(0.5 * GIB))
    assert resources_for(4, device="cuda") == first, "what torch holds and does not use is free"


def test_few_threads_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 80 * GIB)
    monkeypatch.setattr("eigenzoo.passes.workers.num_threads", lambda: 64)
    monkeypatch.setattr("eigenzoo.passes.workers.num_cores", lambda: 64)
    with local_workers(device="cuda") as workers:
        assert workers.num == MOST_ON_A_GPU
    with local_workers(device="cuda", num=2) as workers:
        assert workers.num == 2


def numpy_short() -> None:
    np.empty((2**50, 8))


def torch_short() -> None:
    torch.empty(2**50, 8, dtype=torch.float64)


def gpu_short() -> None:
    raise torch.cuda.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 10 GiB"
    )


def pinned_short() -> None:
    raise RuntimeError("CUDA error: out of memory")


SHORT: dict[str, tuple[Callable[[], None], str, str]] = {
    "numpy": (numpy_short, "cpu", r"layer 'w': out of memory on device 'cpu': 64\.0 PiB were requested.*--exclude"),
    "torch": (torch_short, "cpu", r"layer 'w': out of memory on device 'cpu': \d+ bytes were requested.*--max-memory"),
    "card": (gpu_short, "cuda", r"layer 'w': out of memory on device 'cuda': 20\.00 GiB were requested.*--device cpu"),
    "pinned": (pinned_short, "cuda:1", r"layer 'w': out of memory on device 'cuda:1'\. Blocks of weights"),
}


@pytest.mark.parametrize("kind", SHORT)
def test_short_memory_is_told_with_layer_device_bytes_and_next_step(kind: str) -> None:
    fail, device, message = SHORT[kind]
    with pytest.raises(ResourceError, match=message), enough_memory("layer 'w'", device):
        fail()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"), enough_memory("layer 'w'", "cpu"):
        torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("command", ["fit", "plan", "evidence", "project", "add"])
@pytest.mark.parametrize("fail", [torch_short, gpu_short], ids=["torch", "card"])
def test_every_pass_tells_which_layer_was_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, fail: Callable[[], None]
) -> None:
    paths = write_stacks(tmp_path / "zoo", {"h.w": random_stack(6, (6, 5))})
    space = ez.fit(paths[:5], 2, cache=False)

    def read(*arguments: Any) -> None:
        fail()

    monkeypatch.setattr("eigenzoo.zoo.stack.DenseStack.read", read)
    monkeypatch.setattr("eigenzoo.zoo.stack.DenseStack.matrix", read)
    calls: dict[str, Callable[[], object]] = {
        "fit": lambda: ez.fit(paths, 2, cache=False),
        "plan": lambda: ez.plan(paths),
        "evidence": lambda: ez.evidence(paths, cache=False),
        "project": lambda: space.project(paths[5]),
        "add": lambda: space.add(paths[5:]),
    }
    with pytest.raises(ResourceError, match=r"layer 'h\.w': out of memory on device 'cpu'"):
        calls[command]()


def test_a_layer_of_many_spans_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_stacks(tmp_path / "zoo", {"h.w": random_stack(6, (6, 5))})
    monkeypatch.setattr("eigenzoo.passes.resources.MAX_LAYER_BYTES", 0)
    monkeypatch.setattr("eigenzoo.subspace.fitting.fit_layers.span_basis", lambda *arguments: torch_short())
    with pytest.raises(ResourceError, match=r"layer 'h\.w': out of memory"):
        ez.fit(paths, 2, cache=False)


FUNCTIONS = {"fit": ez.fit, "plan": ez.plan, "evidence": ez.evidence}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nonsense"}, "device 'nonsense'. Devices are"),
        ({"device": "cuda"}, "device 'cuda' does not apply to workers on 'cpu'.*Pass the device to local_workers"),
        ({"max_memory": 1}, "max_memory 1 does not apply to open workers"),
        (
            {"max_memory": 2**30},
            "max_memory 1,073,741,824 does not apply to open workers.*Pass max_memory to local_workers",
        ),
    ],
)
def test_what_contradicts_open_workers_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(6, (6, 5))})
    with local_workers(num=1) as workers, pytest.raises(UsageError, match=message):
        FUNCTIONS[name](paths, workers=workers, **options)


def test_what_agrees_with_open_workers_is_taken() -> None:
    workers = Workers(None, 1, Resources(device="cuda:1"))  # type: ignore[arg-type]
    for device in ("cpu", "cuda", "cuda:1"):
        with opened_workers(workers, None, device) as opened:
            assert opened is workers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nonsense"}, "device 'nonsense'. Devices are"),
        ({"max_memory": 1}, "1 bytes of memory are too few. Blocks need"),
    ],
)
def test_evidence_of_a_bundle_refuses_nonsense_too(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    space = ez.fit(write_stacks(tmp_path / "zoo", {"w": random_stack(6, (6, 5))}), 2, cache=False)
    space.save(tmp_path / "bundle")
    for source in (space, tmp_path / "bundle"):
        with pytest.raises(UsageError, match=message):
            ez.evidence(source, **options)
