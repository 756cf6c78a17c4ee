"""Files that stay open while a pass lasts: as many as there is room for, watched for changes, and closed at its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scale_zoos import planted

import eigenzoo as ez
from builders import write_stacks
from eigenzoo.errors import DataError, FormatError
from eigenzoo.formats import open_files
from eigenzoo.formats.open_files import keep_files_open
from eigenzoo.formats.safetensors.file import SafetensorsFile

NUM_MODELS, SHAPE = 6, (8, 7)


def open_now(root: Path) -> list[str]:
    """Names of the files below a folder that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return sorted(name for name in found if name.startswith(str(root)))


@pytest.fixture
def zoo(tmp_path: Path) -> ez.Zoo:
    return ez.open_zoo(write_stacks(tmp_path, {f"layer.{n}": planted(NUM_MODELS, SHAPE, n) for n in range(3)}))


@pytest.fixture(autouse=True)
def nothing_stays_open(tmp_path: Path) -> Iterator[None]:
    yield
    assert open_files._open == {}
    assert not open_files._inside
    assert open_now(tmp_path) == []


def read_all(zoo: ez.Zoo) -> None:
    for place in range(len(zoo)):
        zoo.stack("layer.0").matrix(place)  # type: ignore[union-attr]


def test_files_stay_open_for_as_long_as_the_outermost_pass(zoo: ez.Zoo, tmp_path: Path) -> None:
    read_all(zoo)
    assert open_now(tmp_path) == []
    with keep_files_open():
        with keep_files_open():
            read_all(zoo)
        assert len(open_now(tmp_path)) == NUM_MODELS
        read_all(zoo)
        assert len(open_now(tmp_path)) == NUM_MODELS, "each is open once"
    assert open_now(tmp_path) == []


def test_half_of_the_files_that_the_system_allows_stay_open(
    zoo: ez.Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (9, 4096))
    with keep_files_open():
        read_all(zoo)
        assert len(open_now(tmp_path)) == 4
        first = ez.fit(zoo, 2, cache=False).moments("layer.2").gram_NN
    monkeypatch.undo()
    assert torch.equal(first, ez.fit(zoo, 2, cache=False).moments("layer.2").gram_NN)


def test_a_fit_opens_each_file_once(zoo: ez.Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    keep = open_files.keep

    def counted(path: Path, file: object, identity: object) -> bool:
        opened.append(str(path))
        return keep(path, file, identity)  # type: ignore[arg-type]

    monkeypatch.setattr(open_files, "keep", counted)
    ez.fit(zoo, 2)
    assert len(opened) == len(set(opened)) == NUM_MODELS


def test_what_is_written_itself_is_not_kept_open(zoo: ez.Zoo, tmp_path: Path) -> None:
    ez.fit(zoo, 2).save(tmp_path / "bundle")
    with keep_files_open():
        SafetensorsFile(tmp_path / "bundle" / "basis.safetensors").read("layer.0/mean")
        assert open_now(tmp_path) == []


def test_an_error_closes_them_too(zoo: ez.Zoo, tmp_path: Path) -> None:
    def fail() -> None:
        with keep_files_open():
            read_all(zoo)
            raise DataError("of its own")

    with pytest.raises(DataError, match="of its own"):
        fail()
    assert open_now(tmp_path) == []


@pytest.mark.parametrize("change", ["written to", "grown", "cut"])
def test_a_file_that_changes_in_mid_pass_is_an_error_at_its_end(zoo: ez.Zoo, tmp_path: Path, change: str) -> None:
    path = tmp_path / "m4" / "model.safetensors"

    def interfere(stage: str, done: int, total: int) -> None:
        if stage == "fitting layers" and done == total:
            data = path.read_bytes()
            path.write_bytes({"written to": data[:-1] + b"\0", "grown": data + b"\0", "cut": data[:-4]}[change])
            os.utime(path, ns=(1, 1))

    for _ in range(2):
        with pytest.raises(FormatError, match=r"m4/model\.safetensors: the file changed.*Open the zoo again"):
            ez.fit(zoo, 2, progress=interfere)


def test_a_file_that_is_replaced_in_mid_pass_is_read_as_it_was(zoo: ez.Zoo, tmp_path: Path) -> None:
    """What replaces files by a new one of the same name, as most programs do, disturbs no pass."""
    wanted = ez.fit(zoo, 2, cache=False).moments("layer.2").gram_NN
    path = tmp_path / "m4" / "model.safetensors"

    def replace(stage: str, done: int, total: int) -> None:
        if done == 1:
            path.with_name("new").write_bytes(bytes(path.stat().st_size))
            path.with_name("new").replace(path)

    assert torch.equal(ez.fit(zoo, 2, cache=False, progress=replace).moments("layer.2").gram_NN, wanted)
    with pytest.raises(FormatError, match="the file changed since its header was read"):
        ez.fit(zoo, 2)


def test_threads_share_them(zoo: ez.Zoo, tmp_path: Path) -> None:
    wanted = [zoo.stack("layer.1").matrix(place) for place in range(NUM_MODELS)]  # type: ignore[union-attr]
    start = threading.Barrier(8)

    def read(number: int) -> bool:
        start.wait()
        return all(
            torch.equal(zoo.stack("layer.1").matrix(place), wanted[place])  # type: ignore[union-attr]
            for _ in range(20)
            for place in range(NUM_MODELS)
        )

    with keep_files_open(), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
        assert len(open_now(tmp_path)) == NUM_MODELS
