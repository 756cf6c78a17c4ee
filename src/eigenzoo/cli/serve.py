"""`eigenzoo serve BUNDLE --model BASE`: answer requests for all models of a bundle over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import complain, print_json, progress_bar, say
from eigenzoo.display import counted, in_bytes
from eigenzoo.errors import UsageError, require

API_KEY = "EIGENZOO_API_KEY"
NEEDED = ("fastapi", "jinja2", "openai", "transformers", "uvicorn")
"""Libraries of the extra `serve`."""


def command(
    bundle: options.BundleArgument,
    model: Annotated[
        Path,
        typer.Option(
            help="The base: a local transformers checkpoint of a causal language model, with its tokenizer.",
            show_default=False,
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Serve only this model of the bundle (repeatable). Default: all.", show_default=False),
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen at. Other machines reach the server only at an address such as 0.0.0.0."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at. 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help=f"File with the key that clients must send. Default: the environment variable {API_KEY}, or no key.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer, and the default of a request.")] = 1024,
    max_queue: Annotated[int, typer.Option(help="Most requests that wait or run. More get status 429.")] = 1024,
    cache_tokens: Annotated[
        int, typer.Option(help="Tokens of all running requests together whose keys and values are in memory.")
    ] = 65_536,
    weights_dtype: Annotated[
        str, typer.Option(help="Dtype of the base in memory: auto (that of its files), float32, bfloat16 or float16.")
    ] = "auto",
    print_command: Annotated[
        str | None,
        typer.Option(
            help="Do not serve, but print the commands that serve the bundle by another engine: vllm or llama.cpp.",
            metavar="ENGINE",
            show_default=False,
        ),
    ] = None,
    device: options.Device = "cpu",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Serve the models of a bundle over HTTP, as OpenAI's API: chat, completions, streaming, /v1/models. Stop it with Ctrl-C."""
    if print_command is not None:
        _print_command(print_command, bundle, model, only, as_json=json)
        return
    require(*NEEDED, where="eigenzoo serve", extra="serve")
    key = _read_key(api_key_file)
    with progress_bar(quiet=quiet or json) as progress:
        from eigenzoo.integrations.server.running import prepare

        server = prepare(
            bundle,
            model,
            models=only or None,
            host=host,
            port=port,
            api_key=key,
            max_tokens=max_tokens,
            max_queue=max_queue,
            cache_tokens=cache_tokens,
            dtype=weights_dtype,
            device=device,
            progress=progress,
        )
    memory = server.served.memory()
    for warning in server.warnings:
        complain(f"warning: {warning}")
    if json:
        print_json({"url": server.url, "base": server.base, "models": list(server.served.names), "memory": memory})
    else:
        _describe(server.url, server.base, server.served.names, memory)
    server.run()


def _print_command(engine: str, bundle: str, model: Path, only: list[str] | None, *, as_json: bool) -> None:
    import eigenzoo as ez
    from eigenzoo.serve.engines import print_command

    lines = print_command(ez.load(bundle), model, engine, only)
    if as_json:
        print_json({"engine": engine, "commands": lines})
        return
    print("\n".join(lines))


def _describe(url: str, base: str, names: tuple[str, ...], memory: dict[str, Any]) -> None:
    say(
        f"{counted(len(names), 'model')} besides the base {base!r}, in {in_bytes(memory['basis'])} that they share and "
        f"{in_bytes(memory['per_model'])} for each"
    )
    if memory["lora"] is not None and memory["pays_from"] is not None and len(names) < memory["pays_from"]:
        say(f"as plain LoRAs they would take less: cores pay from {memory['pays_from']} models on")
    say(f"serving at {url} (stop with Ctrl-C)")
    say(f"try: curl {url}/completions -H 'Content-Type: application/json' -d '{_example(names[0] if names else base)}'")


def _example(name: str) -> str:
    import json

    return json.dumps({"model": name, "prompt": "Once upon a time", "max_tokens": 20})


def _read_key(file: Path | None) -> str | None:
    """Return the key of clients, or None. Raises UsageError for an empty one."""
    key = os.environ.get(API_KEY) if file is None else file.read_text().strip()
    if key == "":
        raise UsageError(
            "the API key is empty",
            where=API_KEY if file is None else str(file),
            next_step="write a long random key there, or leave it out",
        )
    return key
