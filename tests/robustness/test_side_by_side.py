"""Several processes at one output: one wins whole, nothing that another has added is lost, and a reader never sees parts of two."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from killed import Answer, answer_of, digest, hidden, run, side_by_side
from operations import write_start

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo.errors import BundleError, EigenzooError, OutputError
from eigenzoo.formats.output.held_folder import TemporaryFolder
from eigenzoo.formats.output.whole import new_file

ROUNDS, MOST_TURNS = 6, 400

REPLACED = "another process has replaced the bundle|is replaced again and again while|the file changed since its header was read"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    write_start(root)
    return root


@pytest.fixture
def root(start: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(start, tmp_path / "root"))


def everything(space: ez.Subspace) -> tuple[object, ...]:
    """All that a reader can ask a bundle for, as plain values."""
    layers = [space.rebuild(name).layer(layer) for name in space.names for layer in space.layers]
    moments = [space.moments(layer).gram_NN for layer in space.layers]
    return (*space.names, *(tuple(values.flatten().tolist()) for values in (*layers, *moments)))


def test_a_reader_sees_the_old_bundle_or_the_new_one_or_an_error(root: Path) -> None:
    # Two bundles of the same names and shapes, so that nothing but the values would tell a mixture.
    for seed in (10, 20):
        stacks = {f"layer.{n}.weight": random_stack(5, (6, 5), seed + n) for n in range(4)}
        ez.fit(write_stacks(root / f"zoo{seed}", stacks), 2, cache=False).save(root / f"bundle{seed}")
    first, second = (ez.load(root / f"bundle{seed}") for seed in (10, 20))
    expected = {everything(first): "first", everything(second): "second"}
    target = first.save(root / "shared")
    enough = root / "enough"

    def write() -> None:
        for turn in range(MOST_TURNS):
            for space in (second, first):
                space.save(target, force=True)
                # At once in the beginning, later and later in the end: however slow the machine, a reader gets one whole.
                time.sleep(0.001 * turn)
            if enough.exists():
                return

    seen: Counter[str] = Counter()
    try:
        for number in side_by_side(write):
            if number >= 100 and min(seen["first"], seen["second"]) >= 5:
                enough.touch()
            try:
                seen[expected[everything(ez.load(target))]] += 1
            except EigenzooError as error:
                seen["replaced" if re.search(REPLACED, str(error)) else str(error)] += 1
    finally:
        enough.touch()
    assert set(seen) <= {"first", "second", "replaced"}
    assert min(seen["first"], seen["second"]) >= 5, seen


def test_a_copy_of_a_bundle_that_is_replaced_is_of_one_of_the_two(root: Path) -> None:
    old = ez.load(root / "bundle")
    ez.fit(root / "zoo", 3, cache=False).save(root / "bundle", force=True)
    with pytest.raises(BundleError, match="another process has replaced the bundle since it was opened"):
        old.save(root / "copy")
    with pytest.raises(EigenzooError, match=REPLACED):
        old.add(root / "more" / "new")
    with pytest.raises(BundleError, match="another process has replaced the bundle"):
        list(old.verify())
    assert not (root / "copy").exists()
    assert hidden(root) == []


@pytest.mark.parametrize("refresh", [False, True])
def test_what_another_process_has_added_is_not_lost(root: Path, refresh: bool) -> None:
    shutil.copytree(root / "more" / "new", root / "more" / "other")
    mine = ez.load(root / "bundle").add(root / "more" / "new", refresh=refresh)
    ez.load(root / "bundle").add(root / "more" / "other").save(root / "bundle", force=True)
    with pytest.raises(BundleError, match="another process has replaced the bundle"):
        mine.save(root / "bundle", force=True)
    assert ez.load(root / "bundle").names[-1] == "other"
    mine.save(root / "mine")
    assert ez.load(root / "mine").names[-1] == "new"


def test_one_process_may_add_again_and_again(root: Path) -> None:
    shutil.copytree(root / "more" / "new", root / "more" / "other")
    space = ez.load(root / "bundle").add(root / "more" / "new")
    space.save(root / "bundle", force=True)
    space = space.add(root / "more" / "other")
    space.save(root / "bundle", force=True)
    loaded = ez.load(root / "bundle")
    loaded.save(root / "bundle", force=True)
    loaded.save(root / "bundle", force=True)
    assert loaded.names[-2:] == ("new", "other")
    assert list(ez.load(root / "bundle").verify()) == []


@pytest.mark.parametrize("round", [0, *(pytest.param(round, marks=pytest.mark.slow) for round in range(1, ROUNDS))])
def test_of_two_that_add_at_once_each_is_in_the_bundle_or_is_told(root: Path, round: int) -> None:
    shutil.copytree(root / "more" / "new", root / "more" / "other")
    answers = answer_of(*(["add", root / "bundle", root / "more" / name, "--quiet"] for name in ("new", "other")))
    names = ez.load(root / "bundle").names
    for name, answer in zip(("new", "other"), answers, strict=True):
        assert (answer.code == 0) is (name in names), answer
        assert answer.code == 0 or _refused(answer, REPLACED), answer
    assert len(names) > 5
    assert list(ez.load(root / "bundle").verify()) == []
    assert hidden(root) == []


def _refused(answer: Answer, reason: str) -> bool:
    return answer.code == 2 and re.search(reason, answer.said) is not None


def test_of_two_that_fit_at_once_one_wins_whole(root: Path) -> None:
    single = {}
    for rank in (2, 3):
        answer_of(["fit", root / "zoo", "-o", root / "alone", "--rank", rank, "--no-cache", "--quiet", "--force"])
        single[rank] = digest((root / "alone").rename(root / "fitted"))
        shutil.rmtree(root / "fitted")
    for force in ([], ["--force"]):
        words = [
            ["fit", root / "zoo", "-o", root / "fitted", "--rank", rank, "--no-cache", "--quiet", *force]
            for rank in (2, 3)
        ]
        answers = answer_of(*words)
        assert digest(root / "fitted") in single.values()
        assert sum(answer.code == 0 for answer in answers) == (2 if force else 1)
        assert force or any(_refused(answer, "exists already") for answer in answers)
        shutil.rmtree(root / "fitted")
        assert hidden(root) == []


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "page.html"

    def late(path: Path) -> None:
        with new_file(target) as staging:
            staging.write_text("mine")
            path.write_text("theirs")

    with pytest.raises(OutputError, match="exists already"):
        late(target)
    assert target.read_text() == "theirs"
    assert hidden(tmp_path) == []


def test_where_names_cannot_be_exchanged_the_old_output_comes_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without the exchange: a kill between two renames leaves the old folder beside its name."""
    from eigenzoo.formats.output import renaming

    def work() -> None:
        calls = 0

        def second(source: str, target: str, **options: object) -> None:
            nonlocal calls
            calls += ".bundle." in str(source) or ".bundle." in str(target)
            if calls == 2:
                os.kill(os.getpid(), 9)
            rename(source, target)

        rename, os.rename = os.rename, second
        ez.fit(root / "zoo", 3, cache=False).save(root / "bundle", force=True)

    def nothing(source: Path, target: Path, flags: int) -> bool:
        return False

    before = digest(root / "bundle")
    monkeypatch.setattr(renaming, "_renameat2", nothing)
    assert run(work).killed
    assert not (root / "bundle").exists()
    with pytest.raises(OutputError, match="exists already"):
        ez.fit(root / "zoo", 3, cache=False).save(root / "bundle")
    assert digest(root / "bundle") == before
    ez.fit(root / "zoo", 3, cache=False).save(root / "bundle", force=True)
    assert ez.load(root / "bundle").layers["layer.0.weight"].ranks == {"models": 3}
    assert hidden(root) == []


def test_a_folder_that_a_living_process_fills_is_not_swept(tmp_path: Path) -> None:
    from eigenzoo.formats.output.whole import new_folder

    with new_folder(tmp_path / "out") as first:
        (first / "file").write_text("first")
        with new_folder(tmp_path / "out") as second:
            (second / "file").write_text("second")
            assert first.exists()
        assert (tmp_path / "out" / "file").read_text() == "second"
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_what_a_killed_process_left_in_the_temporary_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def killed() -> None:
        kept = TemporaryFolder()
        assert Path(kept.name).parent == tmp_path
        os.kill(os.getpid(), 9)

    assert run(killed).killed
    (left,) = hidden(tmp_path)
    other = TemporaryFolder()
    assert hidden(tmp_path) == [Path(other.name).name] != [left]
    other.cleanup()
    assert hidden(tmp_path) == []
