"""What cannot be done is refused before a weight is read, and what words alone tell before a zoo is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.passes.workers import check_workers
from eigenzoo.zoo.stack import DenseStack, UpdateStack

NOWHERE = "there/is/no/such/zoo"
WORDS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int3"}, "dtype 'int3'"),
    ({"center": "median"}, "center 'median'"),
    ({"precision": "low"}, "precision 'low'"),
    ({"solver": "random"}, "solver 'random'"),
    ({"axes": ["depth"]}, "axis 'depth'"),
    ({"rank": -1}, "rank -1 is negative"),
    ({"rank": 2, "max_error": 0.1}, "a rank is given beside"),
    ({"seed": 2**64}, r"seed 18446744073709551616\. A seed is a whole number"),
    ({"seed": -1}, r"seed -1\. A seed"),
    ({"device": "tpu"}, "device 'tpu'"),
    ({"max_memory": 7}, "7 bytes of memory"),
    ({"budget": True}, "budget of True"),
    ({"budget": "1e9"}, "budget of 1e9"),
    ({"budget": float("nan")}, "budget of nan"),
    ({"budget": float("inf")}, "budget of inf"),
    ({"budget": 0}, "budget of 0 bytes"),
    ({"workspace": "no/such/folder"}, r"no/such/folder: is not a folder\. A workspace"),
]


@pytest.mark.parametrize(("options", "text"), WORDS, ids=str)
def test_a_fit_refuses_by_words_alone(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ez.EigenzooError, match=text):
        ez.fit(NOWHERE, **options)


@pytest.mark.parametrize(
    ("options", "text"), [case for case in WORDS if set(case[0]) <= {"dtype", "center", "axes", "device", "max_memory"}]
)
def test_a_plan_refuses_by_words_alone(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ez.EigenzooError, match=text):
        ez.plan(NOWHERE, **options)


@pytest.mark.parametrize(
    ("options", "text"), [case for case in WORDS if set(case[0]) <= {"center", "axes", "seed", "device", "max_memory"}]
)
def test_evidence_refuses_by_words_alone(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ez.EigenzooError, match=text):
        ez.evidence(NOWHERE, **options)


def test_a_check_of_a_device_asks_nothing_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question about memory takes some on the GPU, for a context that stays."""

    def ask(device: str) -> tuple[int, int]:
        raise AssertionError("the memory of a GPU was asked for")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", ask)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    check_workers(None, 2**30, "cuda")
    with pytest.raises(ez.UsageError, match="device 'cuda:2', but torch sees 2 GPUs"):
        check_workers(None, None, "cuda:2")
    with pytest.raises(ez.UsageError, match="7 bytes of memory"):
        check_workers(None, 7, "cuda")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["fit", "-o", "out", "--dtype", "int3"], "dtype 'int3'"),
        (["fit", "-o", "out", "--axes", "depth"], "axis 'depth'"),
        (["fit", "-o", "out", "--budget", "many"], "'many'"),
        (["fit", "-o", "out", "--rank", "2", "--max-error", "0.1"], "a rank is given beside"),
        (["fit", "-o", "out", "--solver", "sketch"], "solver 'sketch' without axis"),
        (["plan", "--dtype", "int3"], "dtype 'int3'"),
        (["plan", "--axes", "depth"], "axis 'depth'"),
    ],
    ids=str,
)
def test_commands_refuse_by_words_alone(
    call: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = call(words[0], NOWHERE, *words[1:])
    assert code == 2
    assert text in error
    assert os.listdir(tmp_path) == []


@pytest.fixture(params=["weights", "updates"])
def paths(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    if request.param == "weights":
        return write_stacks(tmp_path / "zoo", {"w": random_stack(6, (8, 5))})
    return [write_adapter(tmp_path / "zoo" / f"a{seed}", random_factors({"w": (8, 5)}, 2, seed)) for seed in range(6)]


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and no weight can be read any more."""

    def refuse(*given: Any) -> Any:
        raise AssertionError("a weight was read")

    def close() -> None:
        for stack, names in ((DenseStack, ("read", "matrix")), (UpdateStack, ("tile", "stored_factors"))):
            for name in names:
                monkeypatch.setattr(stack, name, refuse)

    return close


def test_a_zoo_is_refused_before_a_weight_is_read(paths: list[Path], unread: Callable[[], None]) -> None:
    zoo = ez.open_zoo(paths)
    unread()
    with pytest.raises(ez.RankError, match=r"rank 1, but a zoo of one model.*at least two models.*Add models"):
        ez.fit(paths[:1], 1)
    with pytest.raises(ez.RankError, match="rank 6, but 6 models span at most 5"):
        ez.fit(zoo, 6)
    if zoo.view == "update":
        for run in (ez.fit, ez.plan):
            with pytest.raises(ez.UsageError, match="center 'columns' with view 'update'"):
                run(zoo, center="columns")


def test_a_bundle_is_refused_before_a_weight_is_read(paths: list[Path], unread: Callable[[], None]) -> None:
    space = ez.fit(paths[:4], 2)
    unread()
    with pytest.raises(ez.UsageError, match=r"2 models are named\. Project takes one"):
        space.project(paths[4:])
    with pytest.raises(ez.OutputError, match=r"no/such/folder: is not a folder"):
        space.add(paths[4:], workspace="no/such/folder")
    with pytest.raises(ez.UsageError, match=r"a model called '\w0' is in the subspace already"):
        space.add(paths[:1])
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ("accuracy", {}, r"the metric 'accuracy' is not callable"),
        (len, {"ranks": [0]}, r"rank 0 is not valid\. Ranks to rebuild at"),
        (len, {"seed": 2**64}, r"seed 18446744073709551616"),
        (len, {"device": "tpu"}, "device 'tpu'"),
    ]
    for metric, options, text in refused:
        with pytest.raises(ez.UsageError, match=text):
            ez.evaluate(space, metric, **options)
