"""The HTTP application: OpenAI's routes, limits, keys and errors around transformers' handlers."""

from __future__ import annotations

import asyncio
import hmac
import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eigenzoo.errors import EigenzooError, ResourceError
from eigenzoo.integrations.server.generating import RequestRefused, Requests, Zoo, ZooChat, ZooCompletion

MAX_BODY = 2**20
"""Most bytes of a request."""

DISCONNECTED = 0.5
"""Seconds between two looks whether a client that waits for a whole answer is still there."""


@dataclass(frozen=True)
class Limits:
    """Limits of the server.

    Attributes:
        max_tokens: most tokens of one answer.
        api_key: the key that clients must send, or None for no key.
        hosts: names by which the server may be called, without ports; None: any.
    """

    max_tokens: int = 1024
    api_key: str | None = None
    hosts: frozenset[str] | None = None


def make_app(zoo: Zoo, limits: Limits) -> FastAPI:
    """Return the application. Nothing is loaded from a request, and no route changes the server."""
    app = FastAPI(title="eigenzoo", docs_url=None, redoc_url=None, openapi_url=None)
    requests: Any = Requests(zoo)
    manager: Any = zoo
    chat, completion = ZooChat(manager, requests), ZooCompletion(manager, requests)
    chat.max_tokens = completion.max_tokens = limits.max_tokens

    @app.exception_handler(RequestRefused)
    async def _refused(request: Request, error: RequestRefused) -> Response:
        return _error(str(error), error.status, error.code)

    @app.exception_handler(EigenzooError)
    async def _failed(request: Request, error: EigenzooError) -> Response:
        if not zoo.batching.is_accepting:
            return _error(f"the server cannot compute any more: {error}", 503, "server_error")
        if isinstance(error, ResourceError):
            return _error(str(error), 429, "rate_limit_exceeded", {"Retry-After": "1"})
        return _error(str(error), 400, "invalid_request_error")

    @app.exception_handler(TemplateError)
    async def _unreadable(request: Request, error: TemplateError) -> Response:
        return _error(f"the chat template refuses the messages: {error}", 400, "invalid_request_error")

    @app.exception_handler(Exception)
    async def _unknown(request: Request, error: Exception) -> Response:
        return _error("an error of the server: see its output", 500, "server_error")

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        return _error(str(error.detail), error.status_code, "invalid_request_error")

    @app.post("/v1/chat/completions")
    async def _chat(request: Request) -> Response:
        return await _while_connected(request, lambda body: chat.handle_request(body, _new_id("chatcmpl")))

    @app.post("/v1/completions")
    async def _complete(request: Request) -> Response:
        return await _while_connected(request, lambda body: completion.handle_request(body, _new_id("cmpl")))

    @app.get("/v1/models")
    async def _models() -> Response:
        return JSONResponse({"object": "list", "data": zoo.listed()})

    @app.get("/v1/models/{name:path}")
    async def _model(name: str) -> Response:
        zoo.resolve(name)
        return JSONResponse({"id": name, "object": "model", "created": 0, "owned_by": "eigenzoo"})

    @app.get("/health")
    async def _health() -> Response:
        if not zoo.batching.is_accepting:
            reason = str(zoo.batching.fault or "it is stopping")
            return JSONResponse({"status": "unhealthy", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ok", "requests": zoo.batching.num_requests})

    app.add_middleware(_Guard, limits=limits)
    return app


class _Guard:
    """Refuse requests without the key, those of web pages, and bodies that are too large, before anything is parsed.

    A page in a browser on this machine reaches a server at loopback. It can send plain text without asking first, and it can give
    the name of its own site the address 127.0.0.1. So the type must be JSON, and the name one of this machine.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._key, self._hosts = app, limits.api_key, limits.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise RequestRefused(f"a request has at most {MAX_BODY} bytes", 413)
            return message

        await self._app(scope, counted, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            if (
                host.rpartition(":")[0 if host.rpartition(":")[2].isdigit() else 2].strip("[]").lower()
                not in self._hosts
            ):
                return _error(f"this server is not called {host[:100]!r}", 403, "forbidden_host")
        if self._key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self._key.encode()):
                return _error("the API key is missing or wrong", 401, "invalid_api_key")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            return _error("the Content-Type of a request must be application/json", 415, "invalid_request_error")
        return None


async def _while_connected(request: Request, answer: Callable[[dict[str, Any]], Awaitable[Response]]) -> Response:
    """Read the body and answer it. If the client goes away before, the generation ends."""
    body = await _body(request)
    task = asyncio.ensure_future(answer(body))
    try:
        while not task.done():
            await asyncio.wait([task], timeout=DISCONNECTED)
            if not task.done() and await request.is_disconnected():
                task.cancel()
        return task.result()
    except asyncio.CancelledError:
        task.cancel()
        return Response(status_code=499)


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
        json.dumps(body, ensure_ascii=False).encode()  # half surrogates, which are not text for tokenizers
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestRefused("the body must be a JSON object")
    return {field: value for field, value in body.items() if value is not None}  # as OpenAI's API reads null


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _error(message: str, status: int, code: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": code}}, status_code=status, headers=headers
    )
