"""Load a base and a bundle, and serve them until a signal comes."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn

import eigenzoo as ez
from eigenzoo.errors import OutputError, UsageError
from eigenzoo.formats.opening import open_model
from eigenzoo.integrations.continuous_batching import ZooBatching
from eigenzoo.integrations.models import LOCAL, read_config, read_tokenizer, told
from eigenzoo.integrations.server.app import Limits, make_app
from eigenzoo.integrations.server.generating import Zoo
from eigenzoo.integrations.transformers_names import saved_names
from eigenzoo.passes.process import quietly
from eigenzoo.records import Progress, no_progress
from eigenzoo.serve import BASE, Served, attach

GRACE = 5
"""Seconds that running answers have to end after a signal."""


@dataclass(frozen=True)
class Server:
    """A server that listens, and has not begun to answer.

    Attributes:
        served: the base with the models.
        url: where it listens.
        base: the name of the base in requests.
        warnings: what its user should know.
    """

    served: Served
    url: str
    base: str
    warnings: tuple[str, ...]
    _listening: socket.socket
    _batching: ZooBatching
    _app: Any

    def run(self) -> None:
        """Answer until SIGINT, SIGTERM or SIGHUP. Then running answers have `GRACE` seconds to end."""
        config = uvicorn.Config(self._app, log_level="warning", timeout_graceful_shutdown=GRACE)
        server = _StoppedBySignals(config)
        with self._batching:
            asyncio.run(self._answer(server))

    async def _answer(self, server: uvicorn.Server) -> None:
        try:
            await server.serve(sockets=[self._listening])
        finally:
            self._batching.stop()  # before the loop ends, to which its thread still delivers

    def close(self) -> None:
        """Stop listening, without having answered."""
        self._listening.close()


class _StoppedBySignals(uvicorn.Server):
    """A server that ends cleanly at a signal, and does not raise it again afterwards."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Convert signals to a shutdown, but for ignored ones. A second Ctrl-C ends at once."""
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def prepare(
    bundle: str,
    base: Path,
    *,
    models: Sequence[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    max_tokens: int = 1024,
    max_queue: int = 1024,
    cache_tokens: int = 2**16,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Server:
    """Load everything and listen. All errors of the bundle, the base and the address come before it listens.

    Args:
        bundle: path or hub id of a bundle.
        base: a local checkpoint of transformers with its tokenizer.
        models: names of the models to serve. Default: all.
        api_key: key that clients must send.
        max_tokens: most tokens of one answer.
        max_queue: most requests that wait or run; more get status 429.
        cache_tokens: tokens of all running requests that the cache of keys and values holds.
        dtype: dtype of the weights; auto: that of the files.
    """
    if max_tokens < 1 or max_queue < 1 or cache_tokens < 64:
        raise UsageError(
            "limits must be positive", rule="max_tokens and max_queue at least 1, cache_tokens at least 64"
        )
    space = ez.load(bundle)
    listening, url = _bind(host, port)
    name = Path(os.path.abspath(base)).name
    open_to_all = api_key is None and not _is_loopback(host)
    hosts = None if api_key is not None or open_to_all else frozenset({"localhost", "127.0.0.1", "::1", host.lower()})
    try:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        model, tokenizer = read_language_model(base, dtype, device)
        served = attach(model, space, models, names=saved_names(model), progress=progress)
        batching = ZooBatching(served, max_new_tokens=max_tokens, max_queue=max_queue, cache_tokens=cache_tokens)
        zoo = Zoo(batching, tokenizer, name)
        app = make_app(zoo, Limits(max_tokens, api_key, hosts))
        listening.listen()
    except BaseException:
        listening.close()
        raise
    warnings = []
    if name in served.names:
        warnings.append(f"a model has the base's name {name!r}, and gets its requests; the base is {BASE!r}")
    if open_to_all:
        warnings.append(f"everybody who reaches {host} can use this server: give it a key (--api-key-file)")
    return Server(served, url, zoo.name, tuple(warnings), listening, batching, app)


def read_language_model(folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a local checkpoint, without code or pickles from it."""
    config = read_config(folder)
    files = open_model(folder)
    if files.format != "checkpoint":
        raise UsageError(
            f"this is a {files.format}",
            where=str(folder),
            rule="the base must be a transformers checkpoint",
            next_step="name the model that the zoo's adapters change",
        )
    from transformers import AutoModelForCausalLM

    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype, None)
    if wanted is None or (wanted != "auto" and not getattr(wanted, "is_floating_point", False)):
        raise UsageError(f"{dtype!r} is not a dtype of weights", next_step="choose auto, float32, bfloat16 or float16")
    load: Callable[[], Any] = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        folder, config=config, dtype=wanted, use_safetensors=True, output_loading_info=True, **LOCAL
    )
    with quietly():
        model, found = told("is not a causal language model", folder, load)
    random = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
    if random:
        raise UsageError(
            f"has no {random[0]}",
            where=str(folder),
            rule="every weight of the base is in its files",
            next_step="name a causal language model, and not an encoder or a classifier",
        )
    return model.to(device).eval(), read_tokenizer(folder)


def _bind(host: str, port: int) -> tuple[socket.socket, str]:
    """Bind a socket, which nobody can connect to yet. Raises OutputError if the address is taken or not of this machine."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart waits for old connections
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise OutputError(
            f"cannot listen: {error}",
            where=f"{host} port {port}",
            next_step="choose another port (--port; 0 takes a free one), or an address of this machine (--host)",
        ) from error
    shown = f"[{host}]" if ":" in host else host
    return bound, f"http://{shown}:{bound.getsockname()[1]}/v1"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
