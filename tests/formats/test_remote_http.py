"""Servers that answer otherwise than asked, secrets in URLs, and the hub: real servers on the loopback."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import tenacity
import torch
from fsspec.registry import known_implementations
from safetensors.torch import save

import eigenzoo as ez
from eigenzoo.errors import EigenzooError, FormatError, UnsupportedError
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote import remote_url, retrying
from eigenzoo.formats.remote.fetching import PIECE_BYTES, fetch, fetch_each
from eigenzoo.formats.remote.retrying import MAX_JOBS
from eigenzoo.formats.remote.source import RemoteFile
from eigenzoo.formats.safetensors.header import MAX_HEADER_BYTES
from guard import HANG
from remote_servers import FileServer, HubServer, Proxy, running

HEADER = 2**15  # bytes that are read of a file at first


def weights(seed: int, num_values: int = 40_000) -> bytes:
    draw = torch.Generator().manual_seed(seed)
    return save({"w": torch.randn(num_values, generator=draw), "x": torch.randn(num_values, generator=draw)})


@pytest.fixture
def server() -> Iterator[FileServer]:
    files = {f"zoo/m{place}/model.safetensors": weights(place) for place in range(3)}
    files |= {f"zoo/m{place}/config.json": b"{}" for place in range(3)}
    with running(FileServer(files)) as made:
        yield made


def test_a_listing_of_a_web_server_is_a_zoo(server: FileServer) -> None:
    zoo = ez.open_zoo(f"{server.url}/zoo")
    assert zoo.names == ("m0", "m1", "m2")
    for place, model in enumerate(zoo.models):
        assert remote_url(model.path) == f"{server.url}/zoo/m{place}"
        assert model.read("x").numpy().tobytes() == server.files[f"zoo/m{place}/model.safetensors"][-160_000:]
    one = open_model(f"{server.url}/zoo/m1/model.safetensors")
    assert one.name == "model"
    assert torch.equal(one.read("w"), zoo.models[1].read("w"))


def test_only_what_is_needed_is_asked_for(server: FileServer) -> None:
    model = open_model(f"{server.url}/zoo/m0")
    del server.ranges[:]
    model.read_flat("x", 100, 200)
    end = len(server.files["zoo/m0/model.safetensors"])
    assert server.ranges == [("zoo/m0/model.safetensors", end - 160_000 + 400, end - 160_000 + 800)]


def test_a_header_beyond_reason_is_not_asked_for(server: FileServer) -> None:
    length = MAX_HEADER_BYTES + 1
    server.files["zoo/big/model.safetensors"] = length.to_bytes(8, "little") + b"{" + bytes(length)
    with pytest.raises(FormatError, match=rf"{server.url}/zoo/big, .*the header has {length} bytes"):
        open_model(f"{server.url}/zoo/big")
    assert [(start, stop) for _, start, stop in server.ranges] == [(0, HEADER)]


@pytest.mark.parametrize("fault", ["short", "drop"])
def test_answers_that_are_cut_are_taken_up_where_they_broke(server: FileServer, fault: str) -> None:
    model = open_model(f"{server.url}/zoo/m0")
    del server.ranges[:]
    server.fault = lambda path, start, number: fault if number <= 2 else None
    assert model.read("w").numpy().tobytes() == server.files["zoo/m0/model.safetensors"][-320_000:-160_000]
    starts = [start for _, start, _ in server.ranges]
    assert len(starts) == 3
    assert starts == sorted(starts)
    stops = {stop for _, _, stop in server.ranges}
    assert len(stops) == 1, "what had arrived was not asked for again"
    assert starts[1] - starts[0] == 80_000


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("long", "with more bytes than were requested"),
        ("other", r"with the range 'bytes \d+-\d+/\d+' and not with bytes \d+-\d+"),
        ("whole", "with the whole file instead of a range.*download the file first"),
    ],
)
def test_answers_to_another_question_are_errors_at_once(server: FileServer, fault: str, message: str) -> None:
    model = open_model(f"{server.url}/zoo/m0")
    del server.ranges[:]
    server.fault = lambda path, start, number: fault
    with pytest.raises(FormatError, match=rf"{server.url}/zoo/m0/model\.safetensors: the store answered ({message})"):
        model.read("w")
    assert len(server.ranges) == 1


def test_a_server_that_always_breaks_is_given_up_after_eight_attempts(server: FileServer, slept: list[float]) -> None:
    server.files["small.bin"] = bytes(1000)
    server.fault = lambda path, start, number: "short"
    with pytest.raises(FormatError, match=r"small\.bin: cannot be read .answers are cut short., in 8 attempts"):
        fetch([(remote(server, "small.bin"), 0, memoryview(bytearray(1000)))])
    assert len(server.ranges) == 8
    assert len(slept) == 7
    assert all(0.05 * 2**number <= delay <= 0.1 * 2**number for number, delay in enumerate(slept))


def read_all(server: FileServer, names: Sequence[str]) -> list[EigenzooError | None]:
    outs = [bytearray(len(server.files[name])) for name in names]
    errors = fetch_each([(remote(server, name), 0, memoryview(out)) for name, out in zip(names, outs, strict=True)])
    for name, out, error in zip(names, outs, errors, strict=True):
        assert error is not None or out == server.files[name]
    return errors


def test_a_slow_file_holds_up_no_retry_of_another(server: FileServer) -> None:
    server.files |= {"slow.bin": bytes(1000), "broken.bin": bytes(range(200))}
    retried, in_time = threading.Event(), []

    def fault(path: str, start: int, number: int) -> str | None:
        if path == "slow.bin":
            in_time.append(retried.wait(HANG))  # answers once the other file was asked for again
            return None
        if start == 0:
            return "drop"
        retried.set()
        return None

    server.fault = fault
    assert read_all(server, ["slow.bin", "broken.bin"]) == [None, None]
    assert in_time == [True]


def test_files_that_wait_for_their_next_attempt_hold_up_no_other(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, good = [f"{number}.bin" for number in range(MAX_JOBS + 8)], "good.bin"
    server.files |= {name: bytes(100) for name in (*broken, good)}
    served, in_time = threading.Event(), []
    monkeypatch.setattr(retrying, "pause", lambda seconds, stopped: in_time.append(served.wait(HANG)))

    def fault(path: str, start: int, number: int) -> str | None:
        if path == good:
            served.set()
        return None if path == good else "drop"

    server.fault = fault
    *errors, none = read_all(server, [*broken, good])
    assert none is None
    assert len(errors) == sum("in 8 attempts" in str(error) for error in errors)
    assert all(in_time)


def test_a_store_that_says_how_long_to_wait_is_asked_again_then(server: FileServer, slept: list[float]) -> None:
    server.files["busy.bin"] = bytes(1000)
    server.wait, server.fault = "7", lambda path, start, number: 503 if number <= 2 else None
    assert read_all(server, ["busy.bin"]) == [None]
    assert slept == [7, 7]
    server.wait, server.fault = "4000", lambda path, start, number: 429
    with pytest.raises(FormatError, match=r"busy\.bin: cannot be read \(.*429.*\), in 1 attempt\. .*in 4000 s"):
        raise next(filter(None, read_all(server, ["busy.bin"])))
    assert slept == [7, 7]


@pytest.mark.parametrize(("wait", "times"), [("300", 1), ("120", 2)])
def test_a_server_that_asks_to_wait_again_and_again_is_waited_for_five_minutes_in_all(
    server: FileServer, slept: list[float], wait: str, times: int
) -> None:
    server.files["busy.bin"] = bytes(1000)
    server.wait, server.fault = wait, lambda path, start, number: 503
    attempts, waited = times + 1, times * int(wait)
    message = rf"in {attempts} attempts, and {waited} s of waiting as its store asked\. Run it again in {wait} s"
    with pytest.raises(FormatError, match=message):
        raise next(filter(None, read_all(server, ["busy.bin"])))
    assert slept == [int(wait)] * times


@pytest.mark.parametrize(("queued", "expected"), [(0.0, 2), (50.0, 3), (100.0, 8)])
def test_time_in_the_queue_is_no_time_without_progress(
    slept: list[float], monkeypatch: pytest.MonkeyPatch, queued: float, expected: int
) -> None:
    now = 0.0
    for module in (retrying, tenacity):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    attempts = 0

    def call() -> None:
        nonlocal now, attempts
        now, attempts = now + 100, attempts + 1
        raise ConnectionError

    stop = tenacity.stop_after_attempt(8) | tenacity.stop_after_delay(60)
    with pytest.raises(tenacity.RetryError, match="ConnectionError"):
        retrying.repeat(call, lasts=lambda error: False, stop=stop, queued=lambda: queued)
    assert attempts == expected


def test_progress_makes_attempts_count_anew(server: FileServer, slept: list[float]) -> None:
    data = bytes(range(256)) * 8192  # 2 MB, each answer half of what is left until less than 64 kB come at once
    server.files["big.bin"] = data
    server.fault = lambda path, start, number: "short"
    file = remote(server, "big.bin")
    out = bytearray(len(data))
    with pytest.raises(FormatError, match="in 8 attempts"):
        fetch([(file, 0, memoryview(out))])
    assert len(server.ranges) == 4 + 8
    assert bytes(out[: server.ranges[-1][1]]) == data[: server.ranges[-1][1]]


def remote(server: FileServer, name: str) -> RemoteFile:
    data = server.files[name]
    tag = f'ETag="{hashlib.md5(data).hexdigest()}"'
    return RemoteFile(server.url, f"{server.url}/{name}", f"{server.url}/{name}", len(data), tag)


def test_long_ranges_are_split_and_several_are_under_way_at_once(server: FileServer) -> None:
    server.files["long.bin"] = bytes(range(256)) * (3 * PIECE_BYTES // 256)
    for number in range(8):
        server.files[f"{number}.bin"] = bytes([number]) * 100
    gathered = threading.Barrier(8, timeout=HANG)

    def wait(path: str, start: int, number: int) -> None:
        if path != "long.bin":
            gathered.wait()  # breaks, and with it the test, unless eight requests are here at once

    server.fault = wait
    outs = [bytearray(100) for _ in range(8)]
    fetch([(remote(server, f"{number}.bin"), 0, memoryview(out)) for number, out in enumerate(outs)])
    assert [bytes(out) for out in outs] == [bytes([number]) * 100 for number in range(8)]
    del server.ranges[:]
    out = bytearray(3 * PIECE_BYTES - 7)
    fetch([(remote(server, "long.bin"), 7, memoryview(out))])
    assert bytes(out) == server.files["long.bin"][7:]
    assert sorted(stop - start for _, start, stop in server.ranges) == [PIECE_BYTES - 7, PIECE_BYTES, PIECE_BYTES]


def test_a_file_that_changes_or_goes_is_noticed(server: FileServer) -> None:
    zoo = ez.open_zoo(f"{server.url}/zoo")
    name = "zoo/m0/model.safetensors"
    for data in (weights(9), weights(0)[:-4]):
        server.files[name] = data
        with pytest.raises(FormatError, match=rf"{server.url}/{name}: the file changed since its header was read"):
            zoo.models[0].read("w")
    server.files[name] = weights(0)[: 2**15]
    with pytest.raises(FormatError, match="the file changed since it was listed"):
        zoo.models[0].read("x")
    del server.files[name]
    with pytest.raises(FormatError, match=rf"{server.url}/{name}: there is no such file"):
        zoo.models[0].read("w")


def test_a_busy_server_is_asked_again(server: FileServer) -> None:
    with running(Proxy(server.url, cut_every=7, refuse_every=5)) as proxy:
        zoo = ez.open_zoo([f"{proxy.url}/zoo/m{place}/model.safetensors" for place in range(3)])
        values = [model.read("w") for model in zoo.models]
        assert proxy.num_refused >= 2
    for value, model in zip(values, ez.open_zoo(f"{server.url}/zoo").models, strict=True):
        assert torch.equal(value, model.read("w"))


def test_secrets_of_a_url_are_nowhere_to_be_seen(server: FileServer, tmp_path: Path) -> None:
    host = server.url.removeprefix("http://")
    secret = f"hunter-{uuid.uuid4().hex}"
    signed = f"{server.url}/zoo/m0/model.safetensors?X-Amz-Signature={secret}"
    by_name = f"http://me:{secret}@{host}/zoo/m1/model.safetensors"
    zoo = ez.open_zoo([signed, by_name])
    texts = [repr(zoo), *zoo.names, *(remote_url(model.path) or "" for model in zoo.models)]
    texts += [str(path) for model in zoo.models for path in model.weight_files()]
    report = ez.inspect(zoo).to_dict()
    texts.append(json.dumps(report))
    server.files["zoo/m0/model.safetensors"] = weights(5)
    server.files.pop("zoo/m1/model.safetensors")
    for model in zoo.models:
        with pytest.raises(FormatError, match=r"changed|no such file") as caught:
            model.read("w")
        texts.append(str(caught.value))
    for source in (signed.replace("m0", "m7"), [by_name.replace("m1", "m7")], f"nothing://{secret}:{secret}@x/y"):
        with pytest.raises(FormatError, match=r"no such file|no driver") as caught:
            ez.open_zoo(source)
        texts.append(str(caught.value))
    server.fault = lambda path, start, number: "whole"
    with pytest.raises(FormatError, match="the whole file") as caught:
        open_model(signed.replace("m0", "m2"))
    texts.append(str(caught.value))
    for path in zoo.models[0].path.parents[2].rglob("*"):
        if path.is_file() and path.stat().st_size < 2**20:
            texts.append(path.read_bytes().decode(errors="replace"))
    assert texts
    assert not [text for text in texts if secret in text]


def test_a_mirror_by_secrets_is_not_read_without_them(server: FileServer) -> None:
    model = open_model(f"{server.url}/zoo/m0/model.safetensors?token=abc")
    code = "import sys; from eigenzoo.formats.opening import open_model; open_model(sys.argv[1]).read('w')"
    done = subprocess.run([sys.executable, "-c", code, str(model.path)], capture_output=True, text=True, check=False)
    assert "held credentials, which are not stored. Open the model by its URL" in done.stderr


def test_a_missing_driver_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    hints = {"gs": "Please install gcsfs to access Google Storage", "odd": "Install odd-fs to access odd"}
    for protocol, hint in hints.items():
        monkeypatch.setitem(known_implementations, protocol, {"class": "no_such_module.FileSystem", "err": hint})
    with pytest.raises(
        UnsupportedError, match=r"gs://bucket/zoo: the driver of gs:// is not installed. Pip install gcsfs"
    ):
        ez.open_zoo("gs://bucket/zoo")
    with pytest.raises(UnsupportedError, match=r"the driver of odd:// is not installed. Install odd-fs"):
        ez.open_zoo("odd://bucket/zoo")
    with pytest.raises(UnsupportedError, match=r"is a page of the hub, not a file\. Use the id org/name@v1"):
        ez.open_zoo("https://huggingface.co/org/name/tree/v1")
    with pytest.raises(UnsupportedError, match="fsspec has no driver called 'nonsense'"):
        ez.open_zoo("nonsense://bucket/zoo")


@pytest.fixture
def hub() -> Iterator[Any]:
    pytest.importorskip("huggingface_hub")
    first = {f"runs/m{place}/model.safetensors": weights(place) for place in range(2)}
    first |= {
        "runs/m0/config.json": b"{}",
        "README.md": b"text",
        "runs/m1/tokenizer.json": b'"' + b"x" * 200_000 + b'"',
    }
    changed = {**first, "runs/m0/model.safetensors": weights(7)}
    with running(HubServer("someone/zoo", {"a" * 40: first, "b" * 40: changed})) as made:
        del made.commits["b" * 40]
        made.changed = changed
        fsspec.config.conf["hf"] = {"endpoint": made.url, "token": False}
        yield made
        del fsspec.config.conf["hf"]


def test_a_repository_of_the_hub_is_read_at_the_commit_that_was_listed(hub: Any) -> None:
    zoo = ez.open_zoo("hf://someone/zoo/runs")
    assert zoo.names == ("m0", "m1")
    assert remote_url(zoo.models[0].path) == f"hf://someone/zoo@{'a' * 40}/runs/m0"
    old = zoo.models[0].read("w")
    assert len(zoo.models[1].read_side_file("tokenizer.json")) == 200_002
    hub.commits["b" * 40] = hub.changed
    assert torch.equal(zoo.models[0].read("w"), old), "a push to the branch changes nothing that is open"
    assert set(hub.resolved) == {"a" * 40}
    again = ez.open_zoo("hf://someone/zoo/runs/m*")
    assert remote_url(again.models[0].path) == f"hf://someone/zoo@{'b' * 40}/runs/m0"
    assert not torch.equal(again.models[0].read("w"), old)
    assert torch.equal(again.models[1].read("w"), zoo.models[1].read("w"))
    single = open_model(f"hf://someone/zoo@{'a' * 40}/runs/m0/model.safetensors")
    assert torch.equal(single.read("w"), old)


def test_an_adapter_and_its_base_are_verified_where_they_lie(tmp_path: Path) -> None:
    from builders import random_factors, write_adapter, write_model

    modules = {"block.q": (7, 6), "block.v": (5, 8)}
    adapter = write_adapter(tmp_path / "adapter", random_factors(modules, 2, 0))
    draw = torch.Generator().manual_seed(1)
    weights = {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in modules.items()}
    base = write_model(tmp_path / "base", {**weights, "other.weight": torch.ones(300, 300)})
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with running(FileServer(files)) as server:
        found = ez.verify_adapter(f"{server.url}/adapter", f"{server.url}/base")
        opened = ez.verify_adapter(f"{server.url}/adapter", open_model(f"{server.url}/base"))
        (changes,) = found.changes.values()
    assert list(found) == []
    assert found.path == opened.path == f"{server.url}/adapter"
    assert found.against == opened.against == f"{server.url}/base"
    (here,) = ez.verify_adapter(adapter, base).changes.values()
    assert changes == here
    assert len(changes) == 2
