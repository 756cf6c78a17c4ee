"""A fit that is interrupted goes on where it was, gives the same bundle to the byte, and leaves nothing beside it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from scale_zoos import contents, hidden, planted, read_in_float32, read_in_spans, rewrite, saved

import eigenzoo as ez
from builders import edit_model, random_factors, write_adapter, write_stacks
from eigenzoo.cli.app import main
from eigenzoo.errors import DataError, OutputError
from eigenzoo.formats.output.held_folder import running_system
from eigenzoo.subspace.fitting import fit_layers
from eigenzoo.subspace.fitting.work import PREFIX, STALE_SECONDS
from guard import HANG

NUM_LAYERS, NUM_MODELS, SHAPE = 8, 5, (6, 5)
STOPS_AFTER = 5
"""Layers that are finished when a fit of this file is interrupted."""


@dataclass(frozen=True)
class Case:
    """A zoo's view, the options of its fit, and how its layers are read."""

    view: str = "weight"
    options: dict[str, Any] = field(default_factory=lambda: {"rank": 3})
    spans: bool = False

    def __str__(self) -> str:
        return "-".join([self.view, *map(str, self.options.values()), *["spans"] * self.spans]).replace(" ", "")


CASES = [
    Case(),
    Case(spans=True),
    Case(options={"rank": 3, "dtype": "bfloat16"}),
    Case(options={"rank": 3, "center": "columns"}),
    Case(options={"rank": {"models": 2, "outputs": 3, "inputs": 3}}),
    Case(options={"max_error": 0.05}),
    Case(options={"budget": 60_000}),
    Case("delta"),
    Case("update"),
    Case("update", {"rank": {"models": 2, "outputs": 3}}),
]


def write_zoo(root: Path, view: str = "weight", num_layers: int = NUM_LAYERS) -> list[Path]:
    if view == "update":
        modules = {f"layer.{n}": SHAPE for n in range(num_layers)}
        return [write_adapter(root / f"m{n}", random_factors(modules, 2, n)) for n in range(NUM_MODELS)]
    stacks = {f"layer.{n}": planted(NUM_MODELS, SHAPE, n) for n in range(num_layers)}
    if view == "delta":
        write_stacks(root / "_base", {name: stack[:1] / 2 for name, stack in stacks.items()})
    return write_stacks(root, stacks)


def open_zoo(root: Path, view: str = "weight") -> ez.Zoo:
    return ez.open_zoo(root, view=view, base=root / "_base" / "m0" if view == "delta" else None)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each layer is fitted, whole or span by span."""
    found: Counter[str] = Counter()

    def counted(task: Callable[..., Any]) -> Callable[..., Any]:
        def call(zoo: ez.Zoo, name: str, *rest: Any) -> Any:
            found[name] += 1
            return task(zoo, name, *rest)

        return call

    for task in ("fit_task", "span_task", "basis_task"):
        monkeypatch.setattr(fit_layers, task, counted(getattr(fit_layers, task)))
    return found


def interrupt(stage: str, done: int, total: int) -> None:
    if stage == "fitting layers" and done == STOPS_AFTER:
        raise KeyboardInterrupt


def fit_until_interrupted(zoo: ez.Zoo, workspace: Path, **options: Any) -> Path:
    """Leave the work of a fit; returns its folder."""
    workspace.mkdir(exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        ez.fit(zoo, **{"rank": 3, **options}, workspace=workspace, progress=interrupt)
    (left,) = workspace.iterdir()
    assert left.name.startswith(PREFIX)
    return left


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_interrupted_fit_goes_on_and_gives_the_same_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: Counter[str], case: Case
) -> None:
    if case.spans:
        read_in_float32(monkeypatch)
        read_in_spans(monkeypatch, 4 * NUM_MODELS * SHAPE[1] * 4)
    write_zoo(tmp_path / "zoo", case.view)
    zoo = open_zoo(tmp_path / "zoo", case.view)
    (tmp_path / "clean").mkdir()
    clean = saved(ez.fit(zoo, **case.options, workspace=tmp_path / "clean"), tmp_path / "clean" / "bundle")
    whole = Counter(tasks)
    # Moments that are kept would hide whether layers are taken up.
    monkeypatch.setenv("EIGENZOO_CACHE", "off")
    fit_until_interrupted(zoo, tmp_path / "work", **{"rank": None, **case.options})
    tasks.clear()
    space = ez.fit(zoo, **case.options, workspace=tmp_path / "work")
    assert tasks == {f"layer.{n}": whole[f"layer.{n}"] for n in range(STOPS_AFTER, NUM_LAYERS)}
    assert saved(space, tmp_path / "work" / "bundle") == clean
    del space
    assert hidden([tmp_path / "work", tmp_path / "clean"]) == []


def test_two_fits_of_one_zoo_are_equal_to_the_byte(tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    first, second = (saved(ez.fit(tmp_path / "zoo", cache=cache), tmp_path / str(cache)) for cache in (False, True))
    assert first == second
    assert {"manifest.json", "basis.safetensors", "moments.safetensors"} <= first.keys()


HOLDING = """
import sys, time
from eigenzoo.cli.app import main
from eigenzoo.subspace.fitting.work import Work
keep, layers, seconds = Work.keep, int(sys.argv.pop(1)), float(sys.argv.pop(1))
def holding(*args):
    global layers
    keep(*args)
    layers -= 1
    if layers == 0:
        print("now", file=sys.stderr, flush=True)
        time.sleep(seconds)
Work.keep = holding
main()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_goes_on_after_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: Counter[str], number: signal.Signals
) -> None:
    num_layers = 20
    write_zoo(tmp_path / "zoo", num_layers=num_layers)
    output = tmp_path / "work" / "bundle"
    output.parent.mkdir()
    words = ["fit", str(tmp_path / "zoo"), "-o", str(output), "--rank", "3", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The command waits for its signal, however late that comes.
    program = [sys.executable, "-c", HOLDING, "12", str(HANG)]
    child = subprocess.Popen([*program, *words], env=environment, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert child.stderr.readline() == "now\n"
    child.send_signal(number)
    _, said = child.communicate(timeout=HANG)
    assert child.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 143)
    assert ("resume after the finished layers" in said) is (number == signal.SIGTERM)
    assert [name[: len(PREFIX)] for name in hidden([output.parent])] == [PREFIX]
    monkeypatch.setattr("sys.argv", ["eigenzoo", *words])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert sum(tasks.values()) == num_layers - 12
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]
    (tmp_path / "clean").mkdir()
    clean = saved(ez.fit(tmp_path / "zoo", 3, cache=False), tmp_path / "clean" / "bundle")
    assert {name: clean[name] == text for name, text in contents(output).items()} == dict.fromkeys(clean, True)


def reference(root: Path) -> dict[str, bytes]:
    """The bundle of an undisturbed fit."""
    (root / "clean").mkdir()
    return saved(ez.fit(root / "zoo", 3, cache=False), root / "clean" / "bundle")


def test_a_changed_file_begins_anew(tmp_path: Path, tasks: Counter[str]) -> None:
    write_zoo(tmp_path / "zoo")
    fit_until_interrupted(open_zoo(tmp_path / "zoo"), tmp_path / "work")
    rewrite(tmp_path / "zoo" / "m3" / "model.safetensors")
    tasks.clear()
    found = saved(ez.fit(tmp_path / "zoo", 3, workspace=tmp_path / "work"), tmp_path / "work" / "bundle")
    assert len(tasks) == NUM_LAYERS
    assert found == reference(tmp_path)


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"seed": 1}, {"dtype": "float64"}, {"precision": "high"}, {"center": "none"}], ids=str
)
def test_other_options_begin_anew(tmp_path: Path, tasks: Counter[str], options: dict[str, Any]) -> None:
    write_zoo(tmp_path / "zoo")
    left = fit_until_interrupted(open_zoo(tmp_path / "zoo"), tmp_path / "work")
    tasks.clear()
    ez.fit(tmp_path / "zoo", **{"rank": 3, **options}, workspace=tmp_path / "work")
    assert len(tasks) == NUM_LAYERS
    assert left.exists(), "the other fit's work is its own"


def test_other_names_and_layers_begin_anew(tmp_path: Path, tasks: Counter[str]) -> None:
    write_zoo(tmp_path / "zoo")
    zoo = open_zoo(tmp_path / "zoo")
    fit_until_interrupted(zoo, tmp_path / "work")
    for other in (zoo.renamed(["a", "b", "c", "d", "e"]), zoo.select(names=["m0", "m2", "m1", "m3", "m4"])):
        tasks.clear()
        ez.fit(other, 3, workspace=tmp_path / "work")
        assert len(tasks) == NUM_LAYERS
    tasks.clear()
    ez.fit(zoo.select(exclude=["layer.7"]), 3, workspace=tmp_path / "work")
    assert len(tasks) == NUM_LAYERS - 1


def test_another_run_of_the_system_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: Counter[str]
) -> None:
    """After a loss of power files may be there without what was written into them."""
    write_zoo(tmp_path / "zoo")
    fit_until_interrupted(open_zoo(tmp_path / "zoo"), tmp_path / "work")
    monkeypatch.setattr("eigenzoo.subspace.fitting.work.running_system", lambda: "another")
    tasks.clear()
    found = saved(ez.fit(tmp_path / "zoo", 3, workspace=tmp_path / "work"), tmp_path / "work" / "bundle")
    assert len(tasks) == NUM_LAYERS
    assert found == reference(tmp_path)


def change_json(path: Path) -> None:
    document = json.loads(path.read_text())
    document["record"]["fit"]["captured"] = 0.5
    path.write_text(json.dumps(document))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES: dict[str, tuple[str, Callable[[Path], object], int]] = {
    "record cut": ("layers/00002.json", cut_short, 2),
    "record empty": ("layers/00002.json", lambda path: path.write_bytes(b""), 2),
    "record of no kind": ("layers/00002.json", lambda path: path.write_text("[3]"), 2),
    "record without its parts": ("layers/00002.json", lambda path: path.write_text('{"record": {}}'), 2),
    "record changed": ("layers/00002.json", change_json, 2),
    "record gone": ("layers/00002.json", Path.unlink, 2),
    "values cut": ("layers/00002.safetensors", cut_short, 2),
    "values changed": ("layers/00002.safetensors", flip, 2),
    "values of no kind": ("layers/00002.safetensors", lambda path: path.write_bytes(b"\xff" * 99), 2),
    "values gone": ("layers/00002.safetensors", Path.unlink, 2),
    "first record gone": ("layers/00000.json", Path.unlink, 0),
    "basis cut": ("bundle/basis.safetensors", cut_short, STOPS_AFTER - 1),
    "basis gone": ("bundle/basis.safetensors", Path.unlink, 0),
}
"""What is done to which file, and which layer is then the first that is not finished."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_work_is_done_again(tmp_path: Path, tasks: Counter[str], damage: str) -> None:
    write_zoo(tmp_path / "zoo")
    left = fit_until_interrupted(open_zoo(tmp_path / "zoo"), tmp_path / "work")
    file, spoil, first = DAMAGES[damage]
    spoil(left / file)
    tasks.clear()
    found = saved(ez.fit(tmp_path / "zoo", 3, workspace=tmp_path / "work"), tmp_path / "work" / "bundle")
    assert sorted(tasks) == [f"layer.{n}" for n in range(first, NUM_LAYERS)]
    assert found == reference(tmp_path)


def test_a_fit_killed_before_its_first_layer_is_finished_is_no_obstacle(tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    left = fit_until_interrupted(open_zoo(tmp_path / "zoo"), tmp_path / "work")
    for path in (left / "layers").iterdir():
        path.unlink()
    assert saved(ez.fit(tmp_path / "zoo", 3, workspace=tmp_path / "work"), tmp_path / "work" / "bundle") == reference(
        tmp_path
    )


def test_two_fits_at_once_do_not_disturb_each_other(tmp_path: Path, tasks: Counter[str]) -> None:
    write_zoo(tmp_path / "zoo")
    (tmp_path / "work").mkdir()
    found = []

    def another(stage: str, done: int, total: int) -> None:
        if stage == "fitting layers" and done == 3:
            for rank in (3, 2):
                space = ez.fit(tmp_path / "zoo", rank, workspace=tmp_path / "work")
                found.append(saved(space, tmp_path / "work" / f"rank-{rank}"))
            assert len(list((tmp_path / "work").glob(f"{PREFIX}*"))) == 1, (
                "what the others did is gone, and this one's is not"
            )

    first = saved(
        ez.fit(tmp_path / "zoo", 3, workspace=tmp_path / "work", progress=another), tmp_path / "work" / "first"
    )
    assert set(tasks.values()) == {3}, "no fit took up what another was at"
    assert first == found[0] == reference(tmp_path)
    assert hidden([tmp_path / "work"]) == []


def test_an_error_that_would_come_again_leaves_no_work(tmp_path: Path) -> None:
    paths = write_zoo(tmp_path / "zoo")
    edit_model(paths[2], layer__6=torch.full(SHAPE, float("nan")))
    (tmp_path / "work").mkdir()
    with pytest.raises(DataError, match=r"layer 'layer\.6' of m2"):
        ez.fit(paths, 3, workspace=tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_full_disk_leaves_the_work(tmp_path: Path, tasks: Counter[str]) -> None:
    write_zoo(tmp_path / "zoo")
    (tmp_path / "work").mkdir()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    def fill(stage: str, done: int, total: int) -> None:
        if stage == "fitting layers" and done == STOPS_AFTER:
            disk.setattr("eigenzoo.formats.safetensors.writer.write_values", full)

    with pytest.MonkeyPatch.context() as disk, pytest.raises(OutputError, match="No space left on device"):
        ez.fit(tmp_path / "zoo", 3, workspace=tmp_path / "work", progress=fill)
    tasks.clear()
    found = saved(ez.fit(tmp_path / "zoo", 3, workspace=tmp_path / "work"), tmp_path / "work" / "bundle")
    assert len(tasks) == NUM_LAYERS - STOPS_AFTER
    assert found == reference(tmp_path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_week_old_work_is_swept_and_nothing_else(tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    work = tmp_path / "work"
    old = time.time() - STALE_SECONDS - 60
    for name in ("old", "held", "young"):
        (work / f"{PREFIX}{name}" / "layers").mkdir(parents=True)
        (work / f"{PREFIX}{name}" / "layers" / "00000.json").touch()
    for place in (
        work / f"{PREFIX}file",
        work / ".eigenzoo-other" / "layers" / "file",
        work / "bundle" / "layers" / "file",
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "layers").mkdir(parents=True)
    (work / f"{PREFIX}link").symlink_to(elsewhere)
    for path in [*work.rglob("*"), *elsewhere.rglob("*")]:
        if "young" not in str(path):
            os.utime(path, (old, old))
    with locked(work / f"{PREFIX}held"):
        ez.fit(tmp_path / "zoo", 3, workspace=work)
    left = {path.name for path in work.iterdir()}
    assert left == {*(f"{PREFIX}{name}" for name in ("held", "young", "file", "link")), ".eigenzoo-other", "bundle"}
    assert list(elsewhere.iterdir()) == [elsewhere / "layers"]


def test_without_a_workspace_nothing_is_kept(tmp_path: Path, tasks: Counter[str]) -> None:
    write_zoo(tmp_path / "zoo")
    for _ in range(2):
        tasks.clear()
        with pytest.raises(KeyboardInterrupt):
            ez.fit(tmp_path / "zoo", 3, progress=interrupt)
        assert len(tasks) >= STOPS_AFTER


def test_a_system_that_does_not_tell_when_it_began_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: Counter[str]
) -> None:
    monkeypatch.setattr("eigenzoo.subspace.fitting.work.running_system", lambda: "")
    write_zoo(tmp_path / "zoo")
    fit_until_interrupted(open_zoo(tmp_path / "zoo"), tmp_path / "work")
    tasks.clear()
    ez.fit(tmp_path / "zoo", 3, workspace=tmp_path / "work")
    assert len(tasks) == NUM_LAYERS


@pytest.fixture
def asked_anew() -> Iterator[None]:
    running_system.cache_clear()
    yield
    running_system.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_macos_names_its_start_by_sysctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        said.append(words)
        return subprocess.CompletedProcess(words, 0, "7D2F-11\n", "")

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("subprocess.run", run)
    assert running_system() == "7D2F-11"
    assert said == [["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]]


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("system", ["darwin", "linux"])
def test_where_the_start_is_not_told_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    def run(words: list[str], **options: Any) -> None:
        raise subprocess.CalledProcessError(1, words)

    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("eigenzoo.formats.output.held_folder.BOOT_ID", tmp_path / "none")
    assert running_system() == ""
