"""Messages about the hub: each from a hub of the test's own on the loopback, and followed there."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from advice_bundles import write_bundle
from advice_case import Case
from advice_zoos import assert_rebuilt
from huggingface_hub import constants
from safetensors.torch import save

import eigenzoo as ez
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote import hub_push
from hub_server import Hub, Repository, never_slept, reached_hub

TOKEN = "hf_" + "secret" * 5
VALUES = torch.randn(50, generator=torch.Generator().manual_seed(0))
FILES = {"model.safetensors": save({"w": VALUES}, {"format": "pt"}), "config.json": b"{}"}


@dataclass
class Place:
    """A hub, the folder of a case, and what is changed of this process while it lasts."""

    hub: Hub
    root: Path
    patch: pytest.MonkeyPatch

    def login(self) -> None:
        """As `hf auth login` leaves it."""
        self.patch.setenv("HF_TOKEN", TOKEN)

    def new_cache(self) -> None:
        self.patch.setattr(constants, "HF_HUB_CACHE", str(self.root / "another-cache"))


@contextmanager
def hub_at(root: Path) -> Iterator[Place]:
    """A hub with `org/model`; the cache in `root` stays for the next one."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, reached_hub(root, patch) as hub:
        never_slept(patch)
        # huggingface_hub gives its HTTP library a file in the older one of two ways.
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        logger.setLevel(logging.CRITICAL)
        patch.chdir(root)
        hub.token = TOKEN
        hub.repos["org/model"] = Repository(FILES)
        try:
            yield Place(hub, root, patch)
        finally:
            logger.setLevel(level)


def at_the_hub(work: Callable[[Place], object]) -> Callable[[Path], object]:
    """Do something with a new hub."""

    def call(root: Path) -> object:
        with hub_at(root) as place:
            return work(place)

    call.__doc__ = work.__doc__
    return call


def opening(*, name: str = "org/model", **settings: Any) -> Callable[[Path], object]:
    """Open a model of a hub with these attributes."""

    def work(place: Place) -> None:
        for key, value in settings.items():
            setattr(place.hub, key, value)
        open_model(name)

    return at_the_hub(work)


def assert_model(name: str = "org/model") -> None:
    assert torch.equal(open_model(name).read("w"), VALUES)


def open_hidden(**settings: bool) -> Callable[[Path], object]:
    def work(place: Place) -> None:
        place.hub.repos["org/model"] = Repository(FILES, **settings)
        open_model("org/model")

    return at_the_hub(work)


def log_in(place: Place) -> None:
    """The test set a token that may read it, as the login does; the model holds the values that were uploaded."""
    place.hub.repos["org/model"] = Repository(FILES, private=True)
    place.login()
    assert_model()


def accept_and_log_in(place: Place) -> None:
    """The test set the token of an account that may read it, as the login does; the model holds the values that were uploaded."""
    place.hub.repos["org/model"] = Repository(FILES, gated=True)
    place.login()
    assert_model()


def check_the_name(place: Place) -> None:
    """The test checked the name, and logged in for one that is private; both hold the values that were uploaded."""
    assert_model()
    place.new_cache()
    log_in(place)


def take_main(place: Place) -> None:
    """The test took a revision that is there, `main`; the model holds the values that were uploaded."""
    assert_model("org/model@main")


def open_what_is_there(place: Place) -> None:
    """The test opened what is listed there now; the model holds the values that were uploaded."""
    assert_model()


def run_again(place: Place) -> None:
    """The test ran it again; the model holds the values that were uploaded."""
    assert_model()


def busy(place: Place) -> None:
    place.hub.wait, place.hub.fault = "40", lambda *_: 429
    open_model("org/model")


def open_with_full_cache(place: Place) -> None:
    (place.root / "file").write_text("")
    place.patch.setattr(constants, "HF_HUB_CACHE", str(place.root / "file"))
    open_model("org/model")


def take_another_cache(place: Place) -> None:
    """The test set another folder; the model holds the values that were uploaded."""
    place.new_cache()
    assert_model()


def open_what_is_no_hub(place: Place) -> None:
    template = place.hub.url + "/objects/{repo_id}{revision}{filename}"
    place.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    place.hub.fault = lambda method, path, number: 200 if path.startswith("/objects") else None
    open_model("org/model")


def set_the_endpoint(place: Place) -> None:
    """The test set the address of a hub; the model holds the values that were uploaded."""
    assert_model()


def open_unreached(place: Place) -> None:
    place.patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    open_model("org/model")


def connect(place: Place) -> None:
    """The test ran it again with the hub there, then without it, out of the cache; both hold the values that were uploaded."""
    assert_model()
    place.patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_model()


def push_unreached(place: Place) -> None:
    place.login()
    space = ez.load(write_bundle(place.root))
    place.patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    space.push("me/space")


def open_offline(place: Place) -> None:
    place.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    open_model("org/model")


def run_once_online(place: Place) -> None:
    """The test ran it once without the variable, then with it; both hold the values that were uploaded."""
    assert_model()
    place.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    place.hub.forget()
    assert_model()
    assert place.hub.requests == []


def open_pickled(place: Place) -> None:
    stream = io.BytesIO()
    torch.save({"w": VALUES}, stream)
    place.hub.repos["org/pickle"] = Repository({"pytorch_model.bin": stream.getvalue()})
    (place.root / "pickle").write_bytes(stream.getvalue())
    ez.open_zoo("org/pickle")


def allow_the_pickle(place: Place) -> None:
    """The test passed `allow_pickle=True`; the model holds the values that were uploaded."""
    place.hub.repos["org/pickle"] = Repository({"pytorch_model.bin": (place.root / "pickle").read_bytes()})
    (model,) = ez.open_zoo("org/pickle", allow_pickle=True).models
    assert torch.equal(model.read("w"), VALUES)


def load_a_model(place: Place) -> None:
    ez.load("org/model")


def open_a_model(place: Place) -> None:
    """The test opened it as a zoo and as a model; both hold the values that were uploaded."""
    (model,) = ez.open_zoo("org/model").models
    assert torch.equal(model.read("w"), VALUES)
    assert_model()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load_part_of_a_bundle(place: Place) -> None:
    files = files_of(write_bundle(place.root))
    del files["coefficients/m1.safetensors"]
    place.hub.repos["me/space"] = Repository(files)
    ez.load("me/space")


def load_damaged_bundle(place: Place) -> None:
    files = files_of(write_bundle(place.root))
    name = "coefficients/m1.safetensors"
    place.hub.repos["me/space"] = Repository({**files, name: files[name][:-1] + b"\x7f"})
    ez.load("me/space")


def push_again(place: Place) -> None:
    """The test pushed it again with `force=True`; the models of the hub's bundle hold the files' values."""
    place.login()
    files = files_of(place.root / "bundle")
    del files["coefficients/m1.safetensors"]
    place.hub.repos["me/space"] = Repository(files)
    ez.load(place.root / "bundle").push("me/space", force=True)
    assert_rebuilt(ez.load("me/space"), place.root / "originals")


PIPELINE = {
    "model_index.json": b'{"unet": ["diffusers", "UNet2DModel"]}',
    **{f"unet/{name}": FILES[name] for name in FILES},
}


def open_pipeline(place: Place) -> None:
    place.hub.repos["org/pipe"] = Repository(PIPELINE)
    ez.open_zoo("org/pipe")


def open_the_component(place: Place) -> None:
    """The test did both; the component, and the pipeline that was downloaded, hold the values that were uploaded."""
    place.hub.repos["org/pipe"] = Repository(PIPELINE)
    assert_model("org/pipe/unet")
    for name, data in PIPELINE.items():
        path = place.root / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert torch.equal(open_model(place.root / "downloaded").read("unet.w"), VALUES)


def open_near_a_folder(place: Place) -> None:
    (place.root / "org").mkdir()
    open_model("org/model")


def say_the_revision(place: Place) -> None:
    """The test named it in both ways; the models hold the values that were uploaded."""
    assert_model("org/model@main")
    place.patch.setitem(__import__("fsspec").config.conf, "hf", {"endpoint": place.hub.url, "token": False})
    assert ez.open_zoo("hf://org/model").names == ("model",)


def open_id_as_path(place: Place) -> None:
    ez.open_zoo(Path("org/model"))


def give_text(place: Place) -> None:
    """The test gave it as text; the model holds the values that were uploaded."""
    (model,) = ez.open_zoo("org/model").models
    assert torch.equal(model.read("w"), VALUES)


def open_page(place: Place) -> None:
    ez.open_zoo("https://huggingface.co/org/model/tree/main")


def give_the_id(place: Place) -> None:
    """The test gave that id; the model holds the values that were uploaded."""
    assert_model("org/model@main")


def pushing(prepare: Callable[[Place], object] = lambda place: None, **choices: Any) -> Callable[[Path], object]:
    """Push a bundle after something was prepared."""

    def work(place: Place) -> None:
        write_bundle(place.root)
        place.login()
        prepare(place)
        ez.load(place.root / "bundle").push("me/space", **choices)

    return at_the_hub(work)


def assert_pushed(name: str = "me/space", **choices: Any) -> None:
    ez.load("bundle").push(name, **choices)
    assert_rebuilt(ez.load(name), Path("originals"))


def offline(place: Place) -> None:
    place.patch.setattr(constants, "HF_HUB_OFFLINE", True)


def logged_out(place: Place) -> None:
    place.patch.delenv("HF_TOKEN")


def conflicting(place: Place) -> None:
    place.hub.fault = lambda method, path, number: 409 if "/commit/" in path else None


def may_not_write(place: Place) -> None:
    place.patch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)


def public(place: Place) -> None:
    place.hub.repos["me/space"] = Repository({})


def other_content(place: Place) -> None:
    place.hub.repos["me/space"] = Repository({"README.md": b"mine"})


def other_files(place: Place) -> None:
    place.hub.repos["me/space"] = Repository(FILES)


def losing(place: Place) -> None:
    """The hub answers that it holds a bundle, and has lost one of its files."""
    real = hub_push._list

    def without_one(api: Any, where: Any) -> dict[str, str]:
        found = real(api, where)
        found.pop("coefficients/m1.safetensors", None)
        return found

    place.patch.setattr(hub_push, "_list", without_one)


def push_it(place: Place) -> None:
    """The test pushed it so; the models of the hub's bundle hold the files' values."""
    place.login()
    assert_pushed()


def push_by_force(place: Place) -> None:
    """The test pushed it so; the models of the hub's bundle hold the files' values."""
    place.login()
    assert_pushed()
    assert_pushed(force=True)


def push_elsewhere(place: Place) -> None:
    """The test did all three; the models of each bundle hold the files' values."""
    place.login()
    other_content(place)
    assert_pushed("me/another")
    place.hub.repos["me/space"].branches["v2"] = place.hub.repos["me/space"].commit({}, "v2")
    ez.load("bundle").push("me/space", revision="v2")
    assert_rebuilt(ez.load("me/space@v2"), Path("originals"))
    assert_pushed(force=True)


def push_under_another_name(place: Place) -> None:
    """The test chose another name; the models of the hub's bundle hold the files' values, and the other repository is as it was."""
    place.login()
    other_files(place)
    assert_pushed("me/another")
    assert place.hub.repos["me/space"].messages == ["first"]


def make_it_private(place: Place) -> None:
    """The test made it private; the models of the hub's bundle hold the files' values."""
    place.login()
    place.hub.repos["me/space"] = Repository({}, private=True)
    assert_pushed(private=True)


def case(name: str, provoke: Callable[[Path], object], says: tuple[str, ...], follow: Callable[[Place], None]) -> Case:
    return Case(name, provoke, says, at_the_hub(follow))


def gone(method: str, path: str, number: int) -> int | None:
    return 404 if "/objects/" in path and method == "GET" else None


CASES = [
    case("A gated repository", open_hidden(gated=True), ("ccept the terms at", "`hf auth login`"), accept_and_log_in),
    case("A repository that the hub does not show", opening(name="org/modell"), ("heck the name",), check_the_name),
    case("A revision that is not there", opening(name="org/model@v9"), ("for the revisions",), take_main),
    case("A file that has gone from the hub", opening(fault=gone), ("/tree/main",), open_what_is_there),
    case("A token that may not read", opening(fault=lambda *_: 403), ("`hf auth login` with such a token",), log_in),
    case("A hub that asks to wait", at_the_hub(busy), ("un it again in 40 s",), run_again),
    case(
        "A hub that answers no more", opening(fault=lambda *_: 429), ("un it again later; `hf auth login`",), run_again
    ),
    case("A hub that fails", opening(fault=lambda *_: 500), ("un it again later",), run_again),
    case(
        "Something else at the hub's address", at_the_hub(open_what_is_no_hub), ("heck HF_ENDPOINT",), set_the_endpoint
    ),
    case("A cache that cannot be written", at_the_hub(open_with_full_cache), ("set HF_HUB_CACHE",), take_another_cache),
    case(
        "A hub that cannot be reached",
        at_the_hub(open_unreached),
        ("heck the connection", "in the cache need no connection"),
        connect,
    ),
    case("The hub's cache without all of a model", at_the_hub(open_offline), ("un it once without",), run_once_online),
    case("A pickle on the hub", at_the_hub(open_pickled), ("--allow-pickle",), allow_the_pickle),
    case(
        "A model of the hub where a bundle is expected",
        at_the_hub(load_a_model),
        ("ame a model or a zoo",),
        open_a_model,
    ),
    case(
        "A bundle of the hub without a file",
        at_the_hub(load_part_of_a_bundle),
        ("ush the whole bundle again",),
        push_again,
    ),
    case("A damaged bundle of the hub", at_the_hub(load_damaged_bundle), ("the checksum differs",), push_again),
    case(
        "A pipeline on the hub",
        at_the_hub(open_pipeline),
        ("org/name/unet", "download the pipeline"),
        open_the_component,
    ),
    case("An id that is nearly a path", at_the_hub(open_near_a_folder), ("org/model@main or hf://",), say_the_revision),
    case("An id given as a path", at_the_hub(open_id_as_path), ("as text, not as a path object",), give_text),
    case("A page of the hub", at_the_hub(open_page), ("se the id org/model@main",), give_the_id),
    case("A push to a hub that cannot be reached", at_the_hub(push_unreached), ("heck the connection",), push_it),
    case("A push without a network", pushing(offline), ("un it without HF_HUB_OFFLINE",), push_it),
    case("A push without a token", pushing(logged_out), ("with a token that may write",), push_it),
    case(
        "A push with a token that may not write",
        pushing(may_not_write),
        ("`hf auth login` with such a token",),
        push_it,
    ),
    case("A push while another is made", pushing(conflicting), ("un it again",), push_it),
    case("A push that the hub lost", pushing(losing), ("ush it again, with --force",), push_by_force),
    case(
        "A push to a repository with content",
        pushing(other_content),
        ("hoose another name or --revision",),
        push_elsewhere,
    ),
    case(
        "A push to a repository of another kind", pushing(other_files), ("hoose another name",), push_under_another_name
    ),
    case("A private push to a public repository", pushing(public, private=True), ("ake it private",), make_it_private),
]
