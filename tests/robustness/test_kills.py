"""A process that is killed leaves the old output or the new one, to the byte, and nothing that the next run does not remove.

Each kind of work is killed before calls that change the disk, around the renames and spread over all of them, and after random
times, over the time that it takes undisturbed. EIGENZOO_KILLS is how many times in all (220); a few of them are not slow.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from killed import Run, digest, hidden, run
from operations import OPERATIONS, Operation, write_start

import eigenzoo as ez
from sampling import slow_but

KILLS = int(os.environ.get("EIGENZOO_KILLS", "220"))
EACH = -(-KILLS // len(OPERATIONS))
FEW = 4


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    write_start(root)
    return root


@pytest.mark.parametrize("num", [pytest.param(FEW, id="few"), pytest.param(EACH, marks=pytest.mark.slow, id="all")])
@pytest.mark.parametrize("name", slow_but(OPERATIONS, ["fit --force", "add"]))
def test_a_kill_leaves_the_old_output_or_the_new_one(
    name: str, num: int, start: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    operation = OPERATIONS[name]
    prepared = tmp_path / "prepared"
    shutil.copytree(start, prepared)
    if operation.prepare is not None:
        operation.prepare(prepared)

    def fresh() -> Path:
        # The same name each time: paths stand in what is written.
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        return Path(shutil.copytree(prepared, tmp_path / "root"))

    root = fresh()
    old = digest(root / operation.output)
    undisturbed = run(partial(operation.work, root))
    new = digest(root / operation.output)
    assert new is not None
    assert hidden(root) == []
    seconds = min(_seconds(operation, fresh) for _ in range(2))
    chosen = _chosen(undisturbed, num // 2)
    places = [*chosen, *[None] * max(num - len(chosen), 0)]
    tally: Counter[str] = Counter()
    draw = random.Random(f"{name} {num}")
    for place in places:
        killed = False
        for attempt in range(1, 11):
            root, work = fresh(), partial(operation.work, root)
            # What was slow when it was measured is over before a late kill: each attempt comes sooner.
            after = draw.uniform(0, seconds / attempt) if place is None else None
            killed = run(work, kill_at=place, kill_after=after).killed
            if killed:
                break
        tally["kills"] += killed
        found = digest(root / operation.output)
        tally["new" if found == new else "old" if found == old else "lost" if found is None else "broken"] += 1
        assert found in (old, new), f"killed at {place}"
        _check_the_rest(root, prepared, operation.output)
        if found == new and operation.again is not None:
            operation.again(root)
        else:
            operation.work(root)
        assert digest(root / operation.output) == new, f"the run after a kill at {place}"
        if not (found == new and operation.again is not None):
            assert hidden(root) == [], f"what a kill at {place} left is still there"
    if (root / operation.output / "manifest.json").exists():
        assert list(ez.load(root / operation.output).verify()) == []
    record_property("kills", dict(tally))
    # Where the machine gets faster meanwhile, work ends before a late kill.
    assert tally["kills"] >= 0.75 * len(places)


def _seconds(operation: Operation, fresh: Callable[[], Path]) -> float:
    root = fresh()
    return run(partial(operation.work, root)).seconds


def _chosen(undisturbed: Run, count: int) -> list[int]:
    """Numbers of calls: those around the last changes of names, and others from the first to the last."""
    total = undisturbed.num_calls
    if not total:
        return []
    around = {number + step for number in undisturbed.renames[-2:] for step in (0, 1)}
    spread = {1 + round(step * (total - 1) / max(count - 1, 1)) for step in range(count)}
    return sorted(number for number in around | spread if number <= total)


def _check_the_rest(root: Path, prepared: Path, output: str) -> None:
    """What was there besides is as it was, and what is new is hidden."""
    for path in prepared.iterdir():
        if path.name != output:
            assert digest(path) == digest(root / path.name), path.name
    known = {path.name for path in prepared.iterdir()} | {output}
    assert all(path.name in known or path.name.startswith(".") for path in root.iterdir())
