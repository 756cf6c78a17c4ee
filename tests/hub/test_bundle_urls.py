"""Bundles at URLs: none is read from there, and every command says so before it works; `hf://` is the hub's id or names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo.cli.app import app
from eigenzoo.errors import BundleError, EigenzooError, FormatError, UsageError, ZooError
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote import address
from hub_server import Hub, Repository


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A zoo and a bundle of its first models, as `org/space` of the hub and as `memory://space` too, with moments and without."""
    monkeypatch.chdir(tmp_path)
    write_stacks(tmp_path / "zoo", {"block.weight": random_stack(5, (7, 6)), "bias": random_stack(5, (5,), 1)})
    space = ez.fit([f"zoo/m{place}" for place in range(4)], 2)
    hub.repos["org/space"] = Repository(files_of(space.save("bundle")))
    memory = fsspec.filesystem("memory")
    for name, moments in (("space", True), ("small", False)):
        for file, data in files_of(space.save(name, moments=moments)).items():
            memory.pipe_file(f"/{name}/{file}", data)
        shutil.rmtree(name)
    monkeypatch.setattr(address, "_connected", {})  # another test's hub has gone
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": False})
    (tmp_path / "metric.py").write_text("open('imported', 'w').close()\nsize = len\n")
    (tmp_path / "data.csv").write_text("text,label\na,b\n")
    hub.forget()
    yield tmp_path
    memory.store.clear()


def invoke(words: list[str]) -> Any:
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, EigenzooError):
        raise done.exception
    return done.exception


def commands(bundle: str) -> list[list[str]]:
    """Every command that takes a bundle and nothing else in its place."""
    return [
        ["project", bundle, "zoo/m4"],
        ["rebuild", bundle, "m0", "-o", "new"],
        ["add", bundle, "zoo/m4"],
        ["add", bundle, "zoo/m4", "-o", "new"],
        ["evaluate", bundle, "--metric", "metric:size"],
        ["adapt", bundle, "data.csv", "--model", "zoo/m0", "-o", "new/task.safetensors"],
        ["push", bundle, "org/new"],
    ]


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize(
    "url", ["s3://bucket/space", "https://host/space", "memory://space", "hf://datasets/org/space"]
)
def test_a_bundle_at_a_url_is_refused_before_any_work(hub: Hub, here: Path, url: str, place: int) -> None:
    before = sorted(here.iterdir())
    error = invoke(commands(url)[place])
    assert isinstance(error, BundleError)
    assert str(error).startswith(
        f"{url}: the bundle is at a URL. Bundles are read only from this machine and from model"
    )
    assert sorted(here.iterdir()) == before
    assert hub.requests == []


def test_add_does_not_write_a_bundle_of_the_hub_into_a_folder_called_by_its_url(hub: Hub, here: Path) -> None:
    for name in ("org/space", "org/space@main", "hf://org/space"):
        error = invoke(["add", name, "zoo/m4"])
        assert isinstance(error, UsageError)
        assert f"{name}: add cannot replace a bundle on the hub. Write the grown bundle to a folder with -o" in str(
            error
        )
    assert hub.requests == []
    assert not (here / "hf:").exists()


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_bundle_of_the_hub_may_be_named_by_its_url(hub: Hub, here: Path, place: int) -> None:
    assert invoke(commands("hf://org/space")[place]) is None
    assert hub.requests


TAKERS: dict[str, Callable[[str], object]] = {
    "evidence": lambda url: invoke(["evidence", url]),
    "report": lambda url: invoke(["report", url, "-o", "new.html"]),
    "verify": lambda url: invoke(["verify", url]),
    "ez.evidence": ez.evidence,
    "project": lambda url: ez.load("bundle").project(url),
    "add": lambda url: ez.load("bundle").add(url),
    "add, cli": lambda url: invoke(["add", "bundle", "zoo/m4", url]),
    "old": lambda url: ez.load("bundle").add("zoo/m4", old=url),
    "open_zoo": ez.open_zoo,
    "fit": lambda url: ez.fit(url, 2),
    "base": lambda url: ez.open_zoo("zoo", base=url),
    "open_model": open_model,
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
    ("url", "way"),
    [
        ("memory://space", "Download it"),
        ("memory://small", "Download it"),
        ("hf://org/space", "Name it by its id, org/space"),
    ],
)
def test_a_bundle_in_the_place_of_a_model_is_told_with_its_way_out(
    hub: Hub, here: Path, taker: str, url: str, way: str
) -> None:
    with pytest.raises((FormatError, ZooError), match=rf"^{url}.*: this is a bundle, not a zoo or a model.*{way}"):  # noqa: PT012
        if (error := TAKERS[taker](url)) is not None:
            raise error
    assert not [path for _, path in hub.requests if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("target", "message"),
    [("org", "is no repository of the hub"), ("org/new", "no token is set, and pushing requires a login")],
)
def test_a_push_that_cannot_be_is_refused_before_its_bundle_is_downloaded(
    hub: Hub, here: Path, target: str, message: str
) -> None:
    assert message in str(invoke(["push", "org/space", target]))
    assert hub.requests == []


def test_a_base_of_this_machine_is_opened_before_a_bundle_is_downloaded(hub: Hub, here: Path) -> None:
    with pytest.raises(FormatError, match="nothing: there is no model here"):
        ez.load("org/space", base="./nothing")
    assert hub.requests == []


def test_urls_are_listed_before_models_of_the_hub_are_downloaded(hub: Hub, here: Path) -> None:
    hub.repos["org/m4"] = Repository(files_of(here / "zoo" / "m4"))
    with pytest.raises(ZooError, match="memory://space: this is a bundle"):
        ez.open_zoo(["org/m4", "memory://space"])
    assert hub.requests == []


def test_a_bundle_of_this_machine_is_no_model_either(here: Path) -> None:
    for use in (ez.open_zoo, ez.load("bundle").add, lambda path: ez.open_zoo("zoo", base=path), open_model):
        with pytest.raises((FormatError, ZooError), match=r"^bundle: this is a bundle, not a zoo or a model"):
            use("bundle")
