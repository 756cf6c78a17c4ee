"""A bundle appears whole or not at all, also when the process dies."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

import pytest
from bundle_files import fit_form, write_bundle, write_zoo

import eigenzoo as ez
from eigenzoo.errors import DataError, OutputError

STEPS = {"write_card": "card", "write_manifest": "card", "record_files": "saving", "link_or_copy": "storage"}


def save_and_die(space: ez.Subspace, target: Path, step: str, call: int) -> None:
    """Save in a process that is killed before the given call of a step."""
    child = os.fork()
    if child == 0:
        try:
            room = importlib.import_module(f"eigenzoo.subspace.bundles.{STEPS[step]}")
            real, calls = getattr(room, step), 0

            def dying(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(room, step, dying)
            space.save(target, force=True)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(("step", "call"), [("write_card", 1), ("record_files", 1), ("link_or_copy", 3)])
def test_a_killed_save_leaves_no_half_bundle(tmp_path: Path, step: str, call: int) -> None:
    bundle = write_bundle(tmp_path)
    for name in ("new", "bundle"):
        target = tmp_path / name
        save_and_die(ez.load(bundle), target, step, call)
        assert target.exists() is (name == "bundle")
    assert list(ez.load(bundle).verify()) == [], "the bundle that was to be replaced is harmed"
    # What is left is hidden, and names its kind: a later save is not in its way.
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("bundle", "zoo")]
    assert all(name.startswith((".new.tmp-", ".bundle.tmp-")) for name in left)
    ez.load(bundle).save(tmp_path / "new")
    assert list(ez.load(tmp_path / "new").verify()) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    space = fit_form(write_zoo(tmp_path / "zoo", "flat"), "flat")

    def failing(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"eigenzoo.subspace.bundles.{STEPS[step]}.{step}", failing)
    with pytest.raises(OutputError, match="bundle: cannot be written \\(No space left"):
        space.save(tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]
    monkeypatch.undo()
    space.save(tmp_path / "bundle")
    assert list(ez.load(tmp_path / "bundle").verify()) == []


def test_a_fit_that_is_interrupted_leaves_its_work_and_the_next_one_takes_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_zoo(tmp_path / "zoo", "flat")
    (tmp_path / "work").mkdir()

    def failing(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eigenzoo.subspace.fitting.writing.write_moments", failing)
    with pytest.raises(KeyboardInterrupt):
        ez.fit(paths, 2, workspace=tmp_path / "work")
    (left,) = (tmp_path / "work").iterdir()
    assert left.name.startswith(".eigenzoo-fit-")
    monkeypatch.undo()
    space = ez.fit(paths, 2, workspace=tmp_path / "work")
    assert not left.exists()
    del space
    assert list((tmp_path / "work").iterdir()) == []


def test_a_fit_that_is_refused_leaves_no_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_zoo(tmp_path / "zoo", "flat")
    (tmp_path / "work").mkdir()

    def failing(*args: object, **kwargs: object) -> None:
        raise DataError("the values cannot be meant")

    monkeypatch.setattr("eigenzoo.subspace.fitting.writing.write_moments", failing)
    with pytest.raises(DataError, match="cannot be meant"):
        ez.fit(paths, 2, workspace=tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_temporary_folders_go_with_their_subspace(tmp_path: Path) -> None:
    paths = write_zoo(tmp_path / "zoo", "flat")
    (tmp_path / "work").mkdir()
    space = ez.fit(paths, 2, workspace=tmp_path / "work")
    assert len(list((tmp_path / "work").iterdir())) == 1
    space.save(tmp_path / "bundle")
    del space
    assert list((tmp_path / "work").iterdir()) == []
    assert list(ez.load(tmp_path / "bundle").verify()) == []
