"""Mistyped paths: text that is nearly a path of this machine is an error here, and no name goes out to the hub."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo.cli.app import app
from eigenzoo.errors import EigenzooError, FormatError, ZooError
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.paths import nearest_path
from eigenzoo.formats.remote.hub_bundle import names_a_bundle
from hub_server import Hub, Repository


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a zoo, a bundle, and a hub that would answer for the mistyped names too."""
    monkeypatch.chdir(tmp_path)
    stacks = {"block.weight": random_stack(5, (7, 6)), "bias": random_stack(5, (5,), 1)}
    write_stacks(tmp_path / "adapters" / "zoo", stacks)
    paths = write_stacks(tmp_path / "elsewhere", stacks)
    ez.fit(paths[:4], 2).save(tmp_path / "out" / "bundle")
    files = {"model.safetensors": (paths[4] / "model.safetensors").read_bytes()}
    for name in ("adaptors/zoo", "adapters/zo", "out/bundel", "org/model", "adapters/other"):
        hub.repos[name] = Repository(files)
    hub.forget()
    return tmp_path


USES: dict[str, Callable[[str], object]] = {
    "zoo": ez.open_zoo,
    "one of several": lambda text: ez.open_zoo(["adapters/zoo/m0", text]),
    "base": lambda text: ez.open_zoo("adapters/zoo", base=text),
    "model": open_model,
    "bundle": ez.load,
    "base of a bundle": lambda text: ez.load("out/bundle", base=text),
    "zoo or bundle": names_a_bundle,
    "project": lambda text: ez.load("out/bundle").project(text),
    "add": lambda text: ez.load("out/bundle").add(text),
    "old": lambda text: ez.load("out/bundle").add("adapters/zoo/m4", old=text),
    "verify": lambda text: ez.load("out/bundle").verify(against=text),
    "verify_adapter": ez.verify_adapter,
    "evidence": ez.evidence,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("text", "meant"), [("adaptors/zoo", "adapters/zoo"), ("adapters/zo", "adapters/zoo"), ("out/bundel", "out/bundle")]
)
def test_what_is_nearly_a_path_is_not_looked_up_on_the_hub(
    hub: Hub, here: Path, use: str, text: str, meant: str
) -> None:
    with pytest.raises(
        FormatError,
        match=rf"^{text}: there is no such file or folder\. .*[Dd]id you mean '{meant}'\? .*{text}@main or hf://{text}",
    ):
        USES[use](text)
    assert hub.requests == []


@pytest.mark.parametrize("use", USES)
def test_a_path_object_is_no_id(hub: Hub, here: Path, use: str) -> None:
    found = None
    with contextlib.suppress(EigenzooError):
        found = USES[use](Path("org/model"))  # type: ignore[arg-type]
    assert not found
    assert hub.requests == []


def test_a_base_and_a_view_are_looked_at_before_a_zoo_is_downloaded(hub: Hub, here: Path) -> None:
    for options, message in (
        ({"base": "adapters/nothing"}, "adapters/nothing: there is no such file or folder"),
        ({"base": "./nothing"}, "there is no model here: nothing of this name exists"),
        ({"base": "memory://nothing"}, "memory://nothing: there is no model here"),
        ({"view": "wieght"}, "wieght"),
        ({"view": "delta"}, "view 'delta' needs a base"),
        (
            {"view": "weight", "base": "adapters/zoo/m0"},
            "a base does not work with view 'weight'. Only view 'delta' subtracts a base: leave --base out",
        ),
    ):
        with pytest.raises(EigenzooError, match=message):
            ez.open_zoo("org/model", **options)  # type: ignore[arg-type]
        assert hub.requests == [], options


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "adaptors/zoo"],
        ["fit", "adaptors/zoo", "-o", "new"],
        ["fit", "adapters/zoo", "--base", "adaptors/zoo", "-o", "new"],
        ["evidence", "adaptors/zoo"],
        ["report", "adaptors/zoo", "-o", "new.html"],
        ["plan", "adaptors/zoo"],
        ["project", "out/bundel", "adapters/zoo/m4"],
        ["project", "out/bundle", "adaptors/zoo"],
        ["rebuild", "out/bundel", "m0", "-o", "new"],
        ["add", "out/bundel", "adapters/zoo/m4"],
        ["add", "out/bundle", "adaptors/zoo"],
        ["add", "out/bundle", "adapters/zoo/m4", "--old", "adaptors/zoo"],
        ["verify", "out/bundel"],
        ["verify", "out/bundle", "--against", "adaptors/zoo"],
        ["push", "out/bundel", "org/new"],
        ["evaluate", "out/bundel", "--metric", "math:sqrt"],
        ["adapt", "out/bundel", "data.csv", "--model", "adapters/zoo/m0", "-o", "new.safetensors"],
        ["rebuild", "out/bundle", "adaptors/zoo", "-o", "new"],
    ],
)
def test_no_command_asks_the_hub_for_a_mistyped_path(hub: Hub, here: Path, words: list[str]) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert isinstance(done.exception, EigenzooError)
    assert hub.requests == []
    assert not (here / "new").exists()


def test_a_folder_of_this_machine_is_no_organisation(hub: Hub, here: Path) -> None:
    with pytest.raises(
        FormatError, match=r"adapters/other: there is no such file or folder\. 'adapters' is a folder here"
    ):
        ez.open_zoo("adapters/other")
    assert hub.requests == []
    assert len(ez.open_zoo(["adapters/other@main", "org/model"])) == 2
    assert {path.split("/")[3] for _, path in hub.requests if path.startswith("/api/models/")} == {"adapters", "org"}


def test_an_id_that_is_like_nothing_here_is_looked_up(hub: Hub, here: Path) -> None:
    for name in ("orgs.txt", "adapter", ".org"):
        (here / name).write_text("a file, and hidden ones, hold no models")
    assert torch.equal(open_model("org/model").read("bias"), open_model("adapters/zoo/m4").read("bias"))
    assert hub.requests


def test_a_line_of_a_list_is_compared_with_the_folder_of_the_list(hub: Hub, here: Path) -> None:
    (here / "lists").mkdir()
    (here / "lists" / "zoo.txt").write_text("adapters/zo\n")
    assert ez.open_zoo("lists/zoo.txt").names == ("zo",), "beside the list nothing is like it: it is an id"
    hub.forget()
    (here / "zoo.txt").write_text("org/model\nadaptors/zoo/m1\n")
    with pytest.raises(FormatError, match=r"adaptors/zoo/m1: there is no such .*'adapters/zoo/m1'"):
        ez.open_zoo("zoo.txt")
    assert hub.requests == []


def test_a_path_that_can_be_no_id_names_the_nearest_too(hub: Hub, here: Path) -> None:
    for text, meant in (("adaptors/", "adapters"), ("./adapters/zo/m0", "adapters/zoo/m0"), (here / "xyz", None)):
        hint = rf"Did you mean '{meant}'" if meant else r"no such file or folder\.$"
        with pytest.raises(ZooError, match=hint):
            ez.open_zoo(text)
    assert hub.requests == []


def test_nearest_path(tmp_path: Path) -> None:
    for name in ("data/zoo-a", "data/runs-b", ".hidden/x", "models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "notes").write_text("")
    for text, expected in {
        "data/zoo-c": "data/zoo-a",
        "dtaa/runs-b": "data/runs-b",
        "data/none": "data",
        "mdoels": "models",
        "note": "notes",
        "note/x": None,  # a file holds nothing
        "hidden/x": None,
        "org/name": None,
        "a\0b/c": None,
    }.items():
        assert nearest_path(text, tmp_path) == expected, text


def test_a_folder_of_names_that_are_all_alike_takes_no_minute(tmp_path: Path) -> None:
    for number in range(10_000):
        (tmp_path / f"{number:05d}{'ab' * 97}").touch()
    began = time.process_time()
    nearest_path("ba" * 97 + "zzzz", tmp_path)
    assert time.process_time() - began < 5
