"""Stand-ins for the parts of transformers' server that load models and generate, with a zoo instead of a cache of models.

The handlers of `transformers.cli.serving` parse a request, fill the chat template, and write OpenAI's answers and streams. They
ask a manager of models for the model, and a generation manager for tokens. Here the model is always the one base, and its tokens
come from `ZooBatching`, for the model that the request names.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import CBGenerateManager, Modality

from eigenzoo.errors import UsageError
from eigenzoo.integrations.continuous_batching import ZooBatching
from eigenzoo.serve import BASE

IGNORED = frozenset(
    {
        *("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention"),
        *("safety_identifier", "service_tier", "store", "stream_options", "user", "verbosity"),
    }
)
"""Fields of a request that do not change the answer."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
"""Values of fields that change nothing. Others are refused, because continuous batching cannot do what they ask."""

USED = frozenset(
    ["messages", "prompt", "model", "stream", "temperature", "top_p", "max_tokens", "max_completion_tokens", "tools"]
)
"""Fields that are used."""


LONGEST_NAME = 256
"""Characters of a model's name that a request may give."""


class RequestRefused(Exception):
    """A request that cannot be answered, with the status and the code of OpenAI's error."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Zoo:
    """The models that can be asked for: in place of transformers' manager of models, which loads what a request names.

    Attributes:
        name: the name of the base, besides `BASE`. A model of the same name comes first: the base is then `BASE` alone.
    """

    force_model = None

    def __init__(self, batching: ZooBatching, tokenizer: Any, name: str) -> None:
        self.batching, self.tokenizer = batching, tokenizer
        self.name = BASE if name in batching.served.names else name

    def resolve(self, asked: Any) -> str:
        """Return the name of an attached model, or `BASE`. Raises RequestRefused with status 404, and the nearest name."""
        if not isinstance(asked, str) or not asked:
            raise RequestRefused("the request names no model: see /v1/models")
        if len(asked) > LONGEST_NAME:
            raise RequestRefused(f"no model has a name of {len(asked)} characters", 404, "model_not_found")
        if asked == self.name:
            return BASE
        try:
            self.batching.served.acquire(asked).release()
        except UsageError as error:
            raise RequestRefused(str(error), 404, "model_not_found") from error
        return asked

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        """Return that it is a language model. Asked for by transformers' handlers."""
        return Modality.LLM

    def listed(self) -> list[dict[str, Any]]:
        """Return the models in the form of OpenAI's list."""
        names = [self.name, *self.batching.served.names]
        return [{"id": name, "object": "model", "created": 0, "owned_by": "eigenzoo"} for name in names]


class Request(CBGenerateManager):  # type: ignore[misc]
    """Generates the tokens of one request, with its own model and sampling.

    It is also what transformers' code takes for the manager of continuous batching, which it calls in one of two orders: it adds a
    request and then registers who gets its outputs, or the other way round. The request is added when both are known.
    """

    def __init__(self, batching: ZooBatching, model: str) -> None:
        super().__init__()
        self._cb = self
        self._batching, self._model = batching, model
        self._id = uuid.uuid4().hex
        self._options: dict[str, Any] | None = None
        self._receive: Callable[[Any], None] | None = None
        self._sampling: dict[str, Any] = {}

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        """See transformers."""
        self._prepare(gen_config, inputs)
        with _computing():
            return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """See transformers. A client that goes away ends the request."""
        self._prepare(gen_config, inputs)
        try:
            with _computing():
                return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _prepare(self, config: Any, inputs: Any) -> None:
        """Take the sampling of the request. If it names no length, the answer may take the room that the prompt leaves."""
        self._sampling, has_length = config.eigenzoo_request
        if not has_length:
            room = self._batching.longest - len(inputs["input_ids"])
            config.max_new_tokens = max(1, min(config.max_new_tokens, room))

    def add_request(self, input_ids: list[int], **options: Any) -> str:
        """Add the request, as soon as somebody gets its outputs."""
        self._options = {
            "tokens": input_ids,
            "max_new_tokens": options["max_new_tokens"],
            "streaming": options["streaming"],
            "end": options["eos_token_id"],
        }
        self._begin()
        return self._id

    def register_result_handler(self, request_id: str, callback: Callable[[Any], None]) -> None:
        """Remember who gets the outputs, and add the request if it is known."""
        self._receive = callback
        self._begin()

    def cancel_request(self, request_id: str) -> None:
        """End the request. Called by transformers."""
        self.cancel()

    def cancel(self) -> None:
        """End the request. Does nothing if it has ended."""
        self._batching.cancel(self._id)

    @property
    def background_thread_status(self) -> Any:
        """Whether the thread that computes has failed."""
        return self._batching.manager.background_thread_status

    def _begin(self) -> None:
        if self._options is None or self._receive is None:
            return
        self._batching.add(
            model=self._model, request_id=self._id, receive=self._receive, **self._sampling, **self._options
        )


@contextmanager
def _computing() -> Iterator[None]:
    """Convert the errors of transformers for a request that could not be computed."""
    try:
        yield
    except RuntimeError as error:
        raise RequestRefused(f"the server cannot compute any more: {error}", 503, "server_error") from error


class Stream(StreamingResponse):
    """A stream of transformers' handlers that ends its request however it ends itself.

    The handlers do so too, but not where the client has gone before the first part.
    """

    def __init__(self, parts: AsyncIterator[str], request: Request) -> None:
        super().__init__(_with_end(parts), media_type="text/event-stream")
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._request.cancel()


async def _with_end(parts: AsyncIterator[str]) -> AsyncIterator[str]:
    """Add the line with which OpenAI's streams end."""
    async for part in parts:
        yield part
    yield "data: [DONE]\n\n"


class Requests:
    """Makes a `Request` for each request: in place of transformers' state, which has one manager for all."""

    _compile = False

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        """Return that it is always used."""
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> Request:
        """Return the manager of one request. `model_id` is the name that the request has."""
        return Request(self._zoo.batching, self._zoo.resolve(model_id))


class _OfTheZoo:
    """Methods of both handlers: models by name, and fields that have no effect refused.

    Attributes:
        max_tokens: most tokens of an answer, and their number if a request does not say it.
    """

    model_manager: Any
    max_tokens: int = 1024

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        zoo: Zoo = self.model_manager
        zoo.resolve(body.get("model"))
        return body["model"], zoo.batching.served.model, zoo.tokenizer

    def _validate_request(self, body: dict[str, Any]) -> None:
        for field, value in body.items():
            if field in USED or field in IGNORED or value in NEUTRAL.get(field, ()):
                continue
            raise RequestRefused(
                f"{field!r} is not supported with continuous batching: leave it out", code="unsupported_field"
            )
        for field in ("max_tokens", "max_completion_tokens"):
            wanted = body.get(field)
            if wanted is not None and (type(wanted) is not int or not 1 <= wanted <= self.max_tokens):
                raise RequestRefused(f"{field} is {wanted!r}, and must be a whole number from 1 to {self.max_tokens}")
        for field in ("temperature", "top_p"):
            if body.get(field) is not None and type(body[field]) not in (int, float):
                raise RequestRefused(f"{field} must be a number")
        if type(body.get("stream", False)) is not bool:
            raise RequestRefused("stream must be true or false")

    def _build_generation_config(self, body: dict[str, Any], defaults: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(body, defaults, use_cb=use_cb)  # type: ignore[misc]
        has_length = body.get("max_tokens") is not None or body.get("max_completion_tokens") is not None
        if not has_length:
            config.max_new_tokens = self.max_tokens
        sampling = {
            "temperature": 1.0 if body.get("temperature") is None else float(body["temperature"]),
            "top_p": body.get("top_p"),
        }
        config.eigenzoo_request = (sampling, has_length)
        return config

    def _streaming(self, *args: Any, **kwargs: Any) -> Stream:
        parts = super()._streaming(*args, **kwargs).body_iterator  # type: ignore[misc]
        return Stream(parts, next(each for each in (*args, *kwargs.values()) if isinstance(each, Request)))


class ZooChat(_OfTheZoo, ChatCompletionHandler):  # type: ignore[misc]
    """Transformers' handler of `/v1/chat/completions`."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
            raise RequestRefused("messages must be a list of messages, each with a role and text as its content")
        tools = body.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise RequestRefused("tools must be a list of functions, each a JSON object")
        if self.model_manager.tokenizer.chat_template is None:
            raise RequestRefused("the base's tokenizer has no chat template: use /v1/completions")


class ZooCompletion(_OfTheZoo, CompletionHandler):  # type: ignore[misc]
    """Transformers' handler of `/v1/completions`."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        if not isinstance(body.get("prompt"), str) or not body["prompt"]:
            raise RequestRefused("prompt must be a text")


def _is_message(message: Any) -> bool:
    """Tell whether a message is one of texts, or of calls of tools as OpenAI's API answers them."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        return isinstance(calls, list) and all(map(_is_call, calls)) and (content is None or isinstance(content, str))
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not all(isinstance(function.get(key), str) for key in ("name", "arguments")):
        return False
    try:
        return isinstance(json.loads(function["arguments"]), dict)
    except (ValueError, RecursionError):
        return False
