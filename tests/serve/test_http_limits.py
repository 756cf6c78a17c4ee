"""The HTTP application in this process: what a client or a fault can do to the others."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
from served_zoos import Zoo as Folders

import eigenzoo as ez
from eigenzoo.integrations.continuous_batching import ZooBatching
from eigenzoo.integrations.server import running
from eigenzoo.integrations.server.app import Limits, make_app
from eigenzoo.integrations.server.generating import Zoo
from eigenzoo.integrations.server.running import prepare, read_language_model
from eigenzoo.serve import BASE
from guard import HANG, wait_until

HERE = frozenset({"localhost"})
Answer = tuple[int, dict[str, Any]]


class Site:
    """An application over a batching that runs."""

    def __init__(
        self,
        folders: Folders,
        *,
        template: str | None = None,
        name: str = "base",
        key: str | None = None,
        **options: Any,
    ) -> None:
        model, tokenizer = read_language_model(folders.base, "auto", "cpu")
        if template is not None:
            tokenizer.chat_template = template
        self.batching = ZooBatching(ez.serve.attach(model, ez.load(folders.bundle)), max_new_tokens=50, **options)
        self.zoo = Zoo(self.batching, tokenizer, name)
        self.app = make_app(self.zoo, Limits(max_tokens=50, api_key=key, hosts=HERE))

    async def ask(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> Answer:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            sent = {
                "content-type": "application/json",
                **{name.replace("_", "-"): text for name, text in headers.items()},
            }
            found = await client.request(
                "GET" if body is None else "POST", path, content=json.dumps(body or {}), headers=sent
            )
        return found.status_code, found.json()

    def post(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> Answer:
        return asyncio.run(self.ask(path, body, **headers))


@pytest.fixture(scope="module")
def site(zoo: Folders) -> Iterator[Site]:
    site = Site(zoo, template="{{ raise_exception('roles must alternate') }}", name="a3")
    with site.batching:
        yield site


def message(**fields: Any) -> dict[str, Any]:
    return {"model": "a0", "messages": [{"role": "user", "content": "w3", **fields}]}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "template": (message(), "roles must alternate"),
    "calls": (message(tool_calls="run"), "each with a role and text"),
    "call": (message(tool_calls=[{"function": {"name": 3}}]), "each with a role and text"),
    "arguments": (message(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "each with a role and text"),
    "tools": ({**message(), "tools": [3]}, "tools must be"),
    "null": ({**message(), "chat_template_kwargs": None}, "roles must alternate"),
    "surrogate": (message(content="\ud800"), "is not JSON"),
    "stream": ({**message(), "stream": "no"}, "stream must be"),
    "count": ({**message(), "max_tokens": True}, "must be a whole number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_chats_that_the_template_or_the_handler_cannot_read(site: Site, case: str) -> None:
    body, said = WRONG[case]
    status, found = site.post("/v1/chat/completions", body)
    assert (status, said in found["error"]["message"]) == (400, True), found


def test_a_web_page_of_another_site_cannot_use_the_server(site: Site) -> None:
    """A page in a browser can send a form without asking, and can give its own name the address of this machine."""
    body = {"model": "a0", "prompt": "w3", "max_tokens": 3}
    assert site.post("/v1/completions", body)[0] == 200
    status, found = site.post("/v1/completions", body, content_type="text/plain")
    assert (status, "application/json" in found["error"]["message"]) == (415, True)
    status, found = site.post("/v1/completions", body, host="evil.example")
    assert (status, "evil.example" in found["error"]["message"]) == (403, True)
    assert site.post("/v1/completions", {**body, "stream": None})[0] == 200
    status, found = site.post("/v1/nowhere", {})
    assert (status, found["error"]["code"]) == (404, "invalid_request_error")


def test_without_the_key_nothing_is_answered(zoo: Folders) -> None:
    site = Site(zoo, key="secret")
    body = {"model": "a0", "prompt": "w3", "max_tokens": 3}
    with site.batching:
        for given in (
            {},
            {"authorization": "Bearer secre"},
            {"authorization": "Bearer secret2"},
            {"authorization": "Bearer "},
        ):
            status, found = site.post("/v1/completions", body, **given)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
            assert site.post("/v1/models", **given)[0] == 401
        assert site.post("/v1/completions", body, authorization="Bearer secret")[0] == 200
        assert site.post("/health")[0] == 200


def test_a_model_that_is_called_like_the_base_is_not_the_base(site: Site) -> None:
    assert site.zoo.resolve("a3") == "a3"
    assert site.zoo.resolve(BASE) == BASE
    assert [model["id"] for model in site.zoo.listed()] == [BASE, *site.batching.served.names]
    status, found = site.post("/v1/completions", {"model": "a" * 100_000, "prompt": "w3"})
    assert (status, len(found["error"]["message"]) < 1000) == (404, True)


def test_requests_that_end_leave_nothing_behind(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that a client leaves before they begin, and requests that are refused for their length."""
    router, cancel = site.batching.manager.output_router, site.batching.cancel

    async def leave_early() -> None:
        body = json.dumps({"model": "a0", "prompt": "w3", "max_tokens": 50, "stream": True}).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "asgi": {"version": "3.0"},
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        received = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(received, {"type": "http.disconnect"})

        async def send(sent: Any) -> None:
            await asyncio.Event().wait()

        cancelled = []
        monkeypatch.setattr(
            site.batching, "cancel", lambda request_id: (cancelled.append(request_id), cancel(request_id))
        )
        await site.app(scope, receive, send)
        assert len(cancelled) == 1
        await asyncio.to_thread(wait_until, lambda: not site.batching.num_requests)

    asyncio.run(leave_early())
    status, _ = site.post("/v1/completions", {"model": "a0", "prompt": "w3 " * 3000, "max_tokens": 5})
    assert status == 400
    assert not router.result_handlers


def test_an_answer_without_a_length_fits_the_model(zoo: Folders) -> None:
    site = Site(zoo, cache_tokens=64)
    with site.batching:
        status, found = site.post("/v1/completions", {"model": "a0", "prompt": "w3 " * 40, "temperature": 0})
        assert status == 200, found
        assert found["usage"]["completion_tokens"] == 24
        assert found["choices"][0]["finish_reason"] == "length"


def test_a_fault_of_the_computation_is_told_to_everyone(zoo: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests get status 503 instead of waiting for ever. The health route gives 503 too."""
    site = Site(zoo)
    with site.batching:

        def fail(*unused: object) -> None:
            raise RuntimeError("the device is gone")

        hook = site.batching.served.model.register_forward_pre_hook(fail)
        told, status_of = threading.Event(), site.batching.manager.background_thread_status
        record = status_of.record_fatal_error
        monkeypatch.setattr(status_of, "record_fatal_error", lambda error: (told.wait(), record(error)))
        body = {"model": "a0", "prompt": "w3", "max_tokens": 5}
        for _ in range(2):
            status, found = site.post("/v1/completions", body)
            assert status == 503, found
            assert "the server cannot compute any more" in found["error"]["message"]
        status, found = site.post("/v1/completions", {**body, "stream": True})
        assert status == 503, found
        assert site.post("/health")[0] == 503
        told.set()
        wait_until(lambda: site.batching.fault is not None)
        assert site.post("/health")[1] == {"status": "unhealthy", "reason": "the device is gone"}
        status, found = site.post("/v1/completions", body)
        assert (status, "the device is gone" in found["error"]["message"]) == (503, True), found
        hook.remove()
    assert site.batching.num_requests == 0


def test_it_listens_when_all_is_loaded_and_warns_where_everybody_can_use_it(
    zoo: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[int] = []

    def connect(url: str) -> None:
        socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), timeout=HANG).close()

    def attach(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(ConnectionRefusedError, match="refused"):
            connect(bound[0])
        reached.append(1)
        return ez.serve.attach(*arguments, **options)

    bound: list[str] = []
    bind = running._bind

    def remember(host: str, port: int) -> Any:
        found = bind(host, port)
        bound.append(found[1])
        return found

    monkeypatch.setattr(running, "_bind", remember)
    monkeypatch.setattr(running, "attach", attach)
    for host, key, warned in (("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "secret", False)):
        bound.clear()
        server = prepare(str(zoo.bundle), zoo.base, host=host, port=0, api_key=key)
        connect(server.url)
        server.close()
        assert any("everybody who reaches 0.0.0.0" in warning for warning in server.warnings) is warned
    assert len(reached) == 3


def test_the_missing_extra_is_named(
    zoo: Folders, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setattr("eigenzoo.cli.serve.NEEDED", ("fastapi", "no_such_server"))
    code, _, error = call("serve", zoo.bundle, "--model", zoo.base)
    assert (code, "not installed: no_such_server" in error, "'.[serve]'" in error) == (2, True, True), error
