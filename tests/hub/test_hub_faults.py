"""What a hub refuses and gets wrong: the right model in the end, or an error that says what to do; never a spoilt cache."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import eigenzoo as ez
from eigenzoo.errors import FormatError
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote import retrying
from guard import HANG
from hub_server import Hub, Repository

VALUES = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
WEIGHTS = save({"w": VALUES}, {"format": "pt"})


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """huggingface_hub tells of every attempt."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.fixture
def repo(hub: Hub) -> Repository:
    hub.repos["org/model"] = Repository({"model.safetensors": WEIGHTS, "config.json": b"{}"})
    return hub.repos["org/model"]


def check_cache() -> None:
    """Every blob of the cache is what its name says, and every name leads to one."""
    files = [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_symlink()]
    for path in files:
        data, name = path.read_bytes(), Path(os.readlink(path)).name
        assert name in (hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
    for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*"):
        assert not path.name.endswith(".incomplete"), "nothing half is left"


Fault = Callable[[str, str, int], Any]


def on(method: str, part: str, fault: Any, times: int = 1) -> Fault:
    """A fault of so many of the requests whose path holds a part."""
    seen = 0

    def decide(asked: str, path: str, _: int) -> Any:
        nonlocal seen
        if asked != method or part not in path:
            return None
        seen += 1
        return fault if seen <= times else None

    return decide


PLACES = [("GET", "/api/models/org/model"), ("GET", "/tree/"), ("HEAD", "model.safetensors"), ("GET", "/objects/")]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 408])
@pytest.mark.parametrize("place", PLACES)
def test_what_passes_is_asked_again(
    hub: Hub, repo: Repository, slept: list[float], status: int, place: tuple[str, str]
) -> None:
    hub.wait, hub.fault = "7", on(*place, status, times=2)
    assert torch.equal(open_model("org/model").read("w"), VALUES)
    if status == 429:
        assert [seconds for seconds in slept if seconds >= 7], "as long as the hub asks for"
    check_cache()


@pytest.mark.parametrize("fault", ["drop", "short", "long", "other"])
def test_a_body_that_is_wrong_is_asked_for_again(hub: Hub, repo: Repository, slept: list[float], fault: str) -> None:
    hub.fault = on("GET", "/objects/", fault)
    assert torch.equal(open_model("org/model").read("w"), VALUES)
    check_cache()


def test_a_broken_body_is_taken_up_where_it_broke(
    hub: Hub, repo: Repository, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**12)  # what arrives of the last chunk is lost
    hub.fault = on("GET", "/objects/", "drop", times=3)
    assert torch.equal(open_model("org/model").read("w"), VALUES)
    small = sum(len(data) for name, data in repo.files.items() if name != "model.safetensors")
    # Bodies of which a half arrives each time: what the server meant to send is all, a half, a quarter and an eighth.
    assert hub.body_bytes - small < 2 * len(WEIGHTS)


@pytest.mark.parametrize("fault", ["short", "long", "other"])
def test_a_body_that_stays_wrong_is_an_error_and_not_in_the_cache(
    hub: Hub, repo: Repository, slept: list[float], fault: str
) -> None:
    hub.fault = on("GET", "/objects/", fault, times=10**6)
    with pytest.raises(
        FormatError,
        match=r"org/model@[0-9a-f]{40}: the hub's answer does not match its own listing.*The answer was discarded",
    ):
        open_model("org/model")
    check_cache()
    hub.fault = lambda *_: None
    assert torch.equal(open_model("org/model").read("w"), VALUES)


@pytest.mark.parametrize("sizes", ["listed_sizes", "head_sizes"])
@pytest.mark.parametrize("by", [-8, 8])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_hub_that_lies_about_sizes(
    hub: Hub, repo: Repository, slept: list[float], sizes: str, by: int, name: str
) -> None:
    repo.files["config.json"] = b'{"a": 1234567890}'
    getattr(hub, sizes)[name] = len(repo.files[name]) + by
    with pytest.raises(FormatError, match=r"the hub's answer does not match its own listing"):
        open_model("org/model")
    check_cache()
    assert not list(Path(constants.HF_HUB_CACHE).rglob(name))


def test_a_hub_that_stays_busy_says_when(hub: Hub, repo: Repository, slept: list[float]) -> None:
    hub.wait, hub.fault = "40", lambda *_: 429
    with pytest.raises(
        FormatError, match=r"org/model: the hub refuses further requests for now .*Run it again in 40 s"
    ):
        open_model("org/model")
    assert len(hub.requests) == 4
    hub.wait = "4000"
    hub.forget()
    with pytest.raises(FormatError, match="Run it again in 4000 s"):
        open_model("org/model")
    assert len(hub.requests) == 1, "who has to wait for an hour is told so at once"
    hub.fault = lambda *_: 500
    with pytest.raises(FormatError, match=r"org/model: the hub fails \(status 500\). Run it again later"):
        open_model("org/model")


def test_a_wrong_name_is_told_with_both_readings(hub: Hub, repo: Repository) -> None:
    for source in ("org/modell", "runs/m0", "org/modell@main"):
        with pytest.raises(
            FormatError,
            match=rf"{source}: there is no file or folder of this name here, and the hub shows no such repository.*"
            "An id is org/name or org/name@revision.*`hf auth login`",
        ):
            ez.open_zoo(source)
        with pytest.raises(
            FormatError, match=rf"{source}: there is no file or folder of this name here, and the hub shows no"
        ):
            ez.load(source)
    with pytest.raises(
        FormatError, match=r"org/model@v9: .*no revision 'v9'. A revision is a branch, a tag or a commit"
    ):
        open_model("org/model@v9")
    with pytest.raises(FormatError, match=r"org/model@0{40}: .*no (revision|such file)"):
        open_model("org/model@" + "0" * 40)
    with pytest.raises(ez.BundleError, match=r"org/model: is not a bundle\. A bundle has manifest\.json and basis"):
        ez.load("org/model")


def test_private_and_gated_repositories(hub: Hub, logged_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"model.safetensors": WEIGHTS}
    hub.repos["org/private"], hub.repos["org/gated"] = Repository(files, private=True), Repository(files, gated=True)
    for name in ("private", "gated"):
        assert torch.equal(open_model(f"org/{name}").read("w"), VALUES)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-other")
    monkeypatch.setenv("HF_TOKEN", wrong := "hf_" + "wrong" * 6)
    texts = []
    for name, message in (
        (
            "private",
            r"org/private: .*the hub shows no such repository.*for a private repository run `hf auth login` first",
        ),
        ("gated", rf"org/gated.*is gated.*Accept the terms at {hub.url}/org/gated, then run `hf auth login`"),
    ):
        with pytest.raises(FormatError, match=message) as caught:
            open_model(f"org/{name}")
        texts.append(f"{caught.value} {caught.value.__cause__} {caught.value.args}")
    hub.fault = lambda *_: 403
    with pytest.raises(FormatError, match=r"the hub refuses the request \(status 403\)") as caught:
        open_model("org/private")
    texts.append(str(caught.value))
    assert hub.tokens == {logged_in, wrong}
    assert not [text for text in texts if logged_in in text or wrong in text]


def test_the_token_goes_into_nothing_that_is_written(
    hub: Hub, logged_in: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place in range(3):
        data = save({"w": torch.randn(6, 5, generator=torch.Generator().manual_seed(place))}, {"format": "pt"})
        hub.repos[f"org/m{place}"] = Repository({"model.safetensors": data}, private=True)
    with caplog.at_level(logging.DEBUG):
        bundle = ez.fit([f"org/m{place}" for place in range(3)], 1).save(tmp_path / "bundle")
    assert hub.tokens == {logged_in}
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert logged_in.encode() not in path.read_bytes(), path
    assert (bundle / "README.md").is_file()
    assert logged_in not in caplog.text


def test_without_a_network(hub: Hub, repo: Repository, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model("org/model")
    assert torch.equal(model.read("w"), VALUES)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(open_model("org/model").read("w"), VALUES)
    with pytest.raises(
        FormatError,
        match=r"org/other: there is no file or folder .*the hub at http://127.0.0.1:9 cannot be reached .*Check the",
    ):
        open_model("org/other")


def test_offline_without_all_of_it(
    hub: Hub, repo: Repository, slept: list[float], offline: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fault = on("GET", "/objects/", 404, times=10**6)
    with pytest.raises(FormatError, match="the repository has no such file"):
        open_model("org/model")
    offline()
    hub.forget()
    with pytest.raises(
        FormatError, match=r"org/model@[0-9a-f]{40}: HF_HUB_OFFLINE is set, and the hub's cache does not have all"
    ):
        open_model("org/model")
    with pytest.raises(FormatError, match=r"org/other: there is no file .* HF_HUB_OFFLINE is set.*Run it once without"):
        open_model("org/other")
    assert hub.requests == []


def test_what_is_no_hub(hub: Hub, repo: Repository, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/objects/{repo_id}{revision}{filename}")
    hub.fault = lambda method, path, number: 200 if path.startswith("/objects") else None
    with pytest.raises(FormatError, match=rf"the server at {hub.url} is not a hub. Check HF_ENDPOINT"):
        open_model("org/model")


def test_an_interrupt_ends_downloads_at_their_next_piece(
    hub: Hub, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**12)
    told: list[int] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        told.append(done)
        raise KeyboardInterrupt

    for place in range(3):
        hub.repos[f"org/m{place}"] = Repository(repo.files)
    with pytest.raises(KeyboardInterrupt):
        ez.open_zoo([f"org/m{place}" for place in range(3)], progress=interrupt)
    assert max(told) < len(WEIGHTS) / 2
    check_cache()
    assert len(ez.open_zoo([f"org/m{place}" for place in range(3)])) == 3


@pytest.mark.slow
def test_what_fails_for_good_does_not_wait_for_what_may_pass(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    waits = threading.Event()

    def pause(seconds: float, stopped: threading.Event) -> None:
        waits.set()
        ended.append(stopped.wait(HANG))

    monkeypatch.setattr(retrying, "pause", pause)

    def fault(method: str, path: str, number: int) -> int | None:
        if "/resolve/" in path and path.endswith("other.safetensors"):
            return 503  # huggingface_hub gives it up after some attempts of its own
        if "/objects/" in path and method == "GET":
            hub.lock.release()
            waits.wait(HANG)
            hub.lock.acquire()
            return 404
        return None

    hub.repos["org/zoo"] = Repository(
        {"a/other.safetensors": WEIGHTS, "b/model.safetensors": save({"w": VALUES + 1}, {"format": "pt"})}
    )
    hub.fault = fault
    with pytest.raises(FormatError, match="the repository has no such file"):
        ez.open_zoo("org/zoo")
    assert ended
    assert all(ended)


def test_a_file_that_cannot_be_had_takes_its_own_model_only(hub: Hub, slept: list[float]) -> None:
    files = {f"m{place}/model.safetensors": save({"w": VALUES + place}, {"format": "pt"}) for place in range(3)}
    hub.repos["org/zoo"] = Repository(files)
    broken = hashlib.sha256(files["m1/model.safetensors"]).hexdigest()
    for fault in ("other", 404, 500):
        hub.fault = on("GET", broken, fault, times=10**6)
        found = ez.open_zoo("org/zoo", allow_missing=True)
        assert found.names == ("m0", "m2"), fault
        assert [model.path for model in found.skipped] == ["m1"]
        assert "org/zoo" in found.skipped[0].reason
        with pytest.raises(FormatError, match="org/zoo"):
            ez.open_zoo("org/zoo")


def test_names_that_lead_elsewhere(hub: Hub, tmp_path: Path) -> None:
    for name in (
        "../../evil.safetensors",
        "/etc/evil.safetensors",
        "a/../../evil.safetensors",
        "x\\..\\evil.safetensors",
    ):
        hub.repos["org/evil"] = Repository({name: WEIGHTS, "model.safetensors": WEIGHTS})
        with pytest.raises(ez.UnsafePathError, match="the file name"):
            open_model("org/evil")
    assert not list(tmp_path.rglob("evil*"))


def test_a_config_beyond_reason_is_not_downloaded(hub: Hub, repo: Repository) -> None:
    hub.listed_sizes["config.json"] = 2**40
    with pytest.raises(FormatError, match=r"'config\.json' has 1099511627776 bytes"):
        open_model("org/model")
    assert not [path for _, path in hub.requests if path.endswith("config.json")]
