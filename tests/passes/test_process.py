"""What a pass changes of the process is given back when the last of overlapping passes ends, in whatever order they end."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_info

from eigenzoo.passes.process import enter_worker, num_threads, single_threaded
from eigenzoo.passes.workers import local_workers
from guard import HANG


@pytest.fixture
def three_threads() -> Iterator[None]:
    """torch with another number of threads than the tests' one."""
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(usual)


def settings() -> dict[str, Any]:
    return {
        "switch interval": sys.getswitchinterval(),
        "garbage": gc.get_threshold(),
        "torch": torch.get_num_threads(),
        "blas": sorted(
            (pool["prefix"], pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"
        ),
    }


class Passing(threading.Thread):
    """A pass on a thread of its own, which begins and ends when it is told to."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.inside, self.leave, self.threads_before, self.threads_after = threading.Event(), threading.Event(), 0, 0
        self.start()
        assert self.inside.wait(HANG)

    def run(self) -> None:
        with local_workers(num=1):
            self.inside.set()
            assert self.leave.wait(HANG)
        self.threads_after = torch.get_num_threads()

    def end(self) -> None:
        self.leave.set()
        self.join(HANG)
        assert not self.is_alive()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_overlapping_passes_give_back_what_the_first_one_met(three_threads, order):
    before = settings()
    passes = [Passing(), Passing()]
    during = settings()
    assert during["switch interval"] < before["switch interval"]
    assert during["garbage"][0] > before["garbage"][0]
    passes[order[0]].end()
    between = settings()
    assert between["switch interval"] == during["switch interval"]
    assert between["garbage"] == during["garbage"]
    assert between["blas"] == during["blas"]
    passes[order[1]].end()
    assert settings() == before
    assert [one.threads_after for one in passes] == [3, 3]


@pytest.mark.parametrize("first", ["this thread", "the other"])
def test_a_thread_that_began_first_and_ended_first_has_its_threads_again(three_threads, first):
    before = settings()
    if first == "the other":
        other = Passing()
        with local_workers(num=1):
            other.end()
    else:
        with local_workers(num=1):
            other = Passing()
        other.end()
    assert settings() == before
    assert other.threads_after == 3
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [3], "a thread that is made later has the process's number too"


def test_passes_within_passes_change_nothing_on_their_way_out(three_threads):
    with single_threaded():
        with single_threaded():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        assert num_threads() == 3
    assert torch.get_num_threads() == 3


def test_tasks_that_pin_threads_themselves_stay_on_one(three_threads):
    def pin() -> tuple[int, int]:
        with single_threaded():
            inside = torch.get_num_threads()
        return inside, torch.get_num_threads()

    with local_workers(num=2) as workers:
        found = [results for _, results in workers.in_order((place, [pin]) for place in range(8))]
    assert found == [[(1, 1)]] * 8


def divide() -> float:
    return 1 / 0


def interrupt() -> None:
    raise KeyboardInterrupt("told to stop")


@pytest.mark.parametrize(("task", "error"), [(divide, ZeroDivisionError), (interrupt, KeyboardInterrupt)])
def test_a_pass_that_fails_gives_everything_back(three_threads, task: Callable[[], object], error):
    before = settings()
    with pytest.raises(error, match=r"division|told to stop"), local_workers(num=1) as workers:
        list(workers.in_order([("task", [task])]))
    assert settings() == before


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (64, 3)])
def test_there_are_no_more_workers_than_cores_of_the_container(three_threads, monkeypatch, cores, expected):
    monkeypatch.setattr("eigenzoo.passes.workers.num_cores", lambda: cores)
    with local_workers() as workers:
        assert workers.num == expected


def test_a_worker_keeps_its_one_thread_when_another_pass_gives_its_threads_back(three_threads):
    """torch sets up a thread at its first call there, with what any thread has set last."""
    entered, given_back, threads = threading.Event(), threading.Event(), []

    def work() -> None:
        enter_worker()
        entered.set()
        assert given_back.wait(HANG)
        threads.append(torch.get_num_threads())

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    assert entered.wait(HANG)
    torch.set_num_threads(3)
    given_back.set()
    worker.join(HANG)
    assert threads == [1]


SETTERS = [(sys, "setswitchinterval"), (gc, "set_threshold"), (torch, "set_num_threads")]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(("module", "setter"), SETTERS, ids=[setter for _, setter in SETTERS])
def test_an_interrupt_while_a_setting_changes_gives_everything_back(
    three_threads, monkeypatch, module, setter: str, call: int, when: str
):
    before = settings()
    function, calls = getattr(module, setter), []

    def interrupted(*values: Any) -> None:
        # Workers set their own threads; an interrupt reaches the main thread alone.
        calls.extend([values] * (threading.current_thread() is threading.main_thread()))
        if len(calls) == call and when == "before":
            calls.append(values)
            raise KeyboardInterrupt
        function(*values)
        if len(calls) == call:
            calls.append(values)
            raise KeyboardInterrupt

    monkeypatch.setattr(module, setter, interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"), local_workers(num=1):
        pass
    monkeypatch.undo()
    assert settings() == before
    with local_workers(num=1):
        assert sys.getswitchinterval() == 5e-4
        assert torch.get_num_threads() == 1
    assert settings() == before
