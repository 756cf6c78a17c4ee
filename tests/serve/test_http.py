"""`eigenzoo serve` in a process of its own, asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from served_zoos import Zoo
from transformers import AutoModelForCausalLM, AutoTokenizer

import eigenzoo as ez
from eigenzoo.serve import BASE
from guard import HANG, wait_until

PROMPT = "user w3 w9 w4 w27 w11"


@contextmanager
def serving(zoo: Zoo, *words: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str], dict[str, Any]]]:
    """The command, until it says where it listens."""
    command = [
        sys.executable,
        "-m",
        "eigenzoo",
        "serve",
        str(zoo.bundle),
        "--model",
        str(zoo.base),
        "--port",
        "0",
        "--json",
    ]
    process = subprocess.Popen(
        [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None
        text = ""
        while True:
            line = process.stdout.readline()
            text += line
            if not line or line.startswith("}"):
                break
        if not text:
            raise AssertionError(process.stderr.read() if process.stderr else "")
        yield json.loads(text)["url"], process, json.loads(text)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def url(zoo: Zoo) -> Iterator[str]:
    """A server for all tests. It ends as it should, also with a stream that runs."""
    options = ("--max-tokens", "1000", "--max-queue", "80", "--cache-tokens", "32768")
    with serving(zoo, *options) as (found, process, said):
        assert said["memory"]["models"] == 20
        yield found
        with openai.OpenAI(base_url=found, api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="a0", prompt=PROMPT, max_tokens=1000, stream=True)
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=HANG) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@pytest.fixture(scope="module")
def alone(zoo: Zoo) -> Callable[..., str]:
    """What a model says, greedily, one at a time in this process."""
    model = AutoModelForCausalLM.from_pretrained(zoo.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(zoo.base)
    served = ez.serve.attach(model, ez.load(zoo.bundle))

    def say(name: str, prompt: str, count: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = served.generate(ids, models=[name], max_new_tokens=count, do_sample=False, pad_token_id=0)
        return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))

    return say


@pytest.fixture
def client() -> Iterator[Callable[..., openai.OpenAI]]:
    """Makes OpenAI's clients, and closes their connections."""
    with ExitStack() as opened:

        def make(url: str, key: str = "none") -> openai.OpenAI:
            return opened.enter_context(openai.OpenAI(base_url=url, api_key=key, max_retries=0))

        yield make


Client = Callable[..., openai.OpenAI]


def test_completions_and_chat_of_every_kind(url: str, client: Client, alone: Callable[..., str]) -> None:
    asked = client(url)
    assert {model.id for model in asked.models.list()} == {"base", *(f"a{number}" for number in range(20))}
    assert asked.models.retrieve("a3").id == "a3"
    answers = {}
    for name in ("a0", "a7", "base"):
        expected = alone(BASE if name == "base" else name, PROMPT, 15)
        found = asked.completions.create(model=name, prompt=PROMPT, max_tokens=15, temperature=0)
        assert (found.choices[0].text, found.model) == (expected, name)
        assert found.usage is not None
        assert found.usage.prompt_tokens == 6
        parts = asked.completions.create(model=name, prompt=PROMPT, max_tokens=15, temperature=0, stream=True)
        assert "".join(part.choices[0].text or "" for part in parts).split() == expected.split()
        message: Any = [{"role": "user", "content": "w3 w9 w4"}]
        spoken = asked.chat.completions.create(model=name, messages=message, max_tokens=15, temperature=0)
        answers[name] = spoken.choices[0].message.content
        assert answers[name] == alone(BASE if name == "base" else name, "user w3 w9 w4 ", 15)
        pieces = asked.chat.completions.create(model=name, messages=message, max_tokens=15, temperature=0, stream=True)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert streamed.split() == (answers[name] or "").split()
    assert len(set(answers.values())) == 3, "the models say the same"


@pytest.mark.parametrize(
    "name", ["a99", "../a1", "/etc/passwd", "https://example.org/model", "a1@main", "A1", BASE + "x"]
)
def test_a_name_that_is_not_there_is_refused_and_never_the_base(url: str, client: Client, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="no model is called") as error:
        client(url).completions.create(model=name, prompt=PROMPT, max_tokens=5)
    assert error.value.code == "model_not_found"
    assert name != "A1" or "did you mean" in str(error.value).lower()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stop": ({"stop": ["w3"]}, "'stop' is not supported"),
    "n": ({"n": 2}, "'n' is not supported"),
    "seed": ({"seed": 3}, "'seed' is not supported"),
    "penalty": ({"frequency_penalty": 0.5}, "'frequency_penalty' is not supported"),
    "config": ({"extra_body": {"generation_config": '{"max_new_tokens": 9}'}}, "'generation_config' is not supported"),
    "too long": ({"max_tokens": 1001}, "whole number from 1 to 1000"),
    "cold": ({"temperature": -1}, "A temperature is at least 0"),
    "nucleus": ({"top_p": 7}, "top_p above 0 and at most 1"),
    "no prompt": ({"prompt": ""}, "prompt must be a text"),
    "tokens": ({"prompt": [[1, 2]]}, "prompt must be a text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused(url: str, client: Client, case: str) -> None:
    fields, said = REFUSED[case]
    with pytest.raises(openai.BadRequestError, match=said):
        client(url).completions.create(**{"model": "a0", "prompt": PROMPT, "max_tokens": 5, "temperature": 1, **fields})


def post(url: str, body: bytes, path: str = "/completions") -> tuple[int, dict[str, Any]]:
    asked = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_hostile_bodies_and_routes_that_would_change_the_server(url: str) -> None:
    for body in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, json.dumps({"model": {"a": 1}, "prompt": "w3"}).encode()):
        status, found = post(url, body)
        assert status == 400, found
        assert found["error"]["message"]
    status, found = post(url, json.dumps({"model": "a0", "prompt": "w3 " * 2**19}).encode())
    assert status == 413, found
    message = json.dumps(
        {
            "model": "a0",
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
        }
    )
    status, found = post(url, message.encode(), "/chat/completions")
    assert (status, "each with a role and text" in found["error"]["message"]) == (400, True)
    status, found = post(url, json.dumps({"model": "a0", "prompt": "w3 " * 40_000, "max_tokens": 5}).encode())
    assert (status, "2048 positions" in found["error"]["message"]) == (400, True)
    for path in ("/load_model", "/reset", "/docs", "/openapi.json"):
        assert post(url.removesuffix("/v1"), b"{}", path)[0] == 404
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health") as answer:
        assert json.load(answer) == {"status": "ok", "requests": 0}


def test_mistakes_are_told_before_it_listens(
    zoo: Zoo, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "empty").write_text("")
    for words, said in {
        ("--only", "a99"): "no model is called 'a99'",
        ("--max-tokens", "0"): "limits must be positive",
        ("--weights-dtype", "int8"): "'int8' is not a dtype of weights",
        ("--api-key-file", str(tmp_path / "empty")): "the API key is empty",
        ("--host", "192.0.2.1"): "cannot listen",
    }.items():
        code, _, error = call("serve", zoo.bundle, "--model", zoo.base, "--port", 0, *words)
        assert (code, said in error) == (2, True), error
    code, _, error = call("serve", zoo.bundle, "--model", zoo.base.parent / "adapters" / "a0", "--port", 0)
    assert code == 2, error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_every_signal_ends_it_cleanly(zoo: Zoo, number: signal.Signals) -> None:
    with serving(zoo) as (url, process, _):
        assert post(url, json.dumps({"model": "a0", "prompt": "w3", "max_tokens": 2}).encode())[0] == 200
        process.send_signal(number)
        assert process.wait(timeout=HANG) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
        with pytest.raises(urllib.error.URLError, match="refused"):
            post(url, b"{}")


def test_a_client_that_does_not_wait_for_its_answer_gives_back_its_place(url: str) -> None:
    """Requests without a stream, too."""
    host, port = url.removesuffix("/v1").removeprefix("http://").split(":")
    body = json.dumps({"model": "a0", "prompt": PROMPT, "max_tokens": 1000, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with ExitStack() as opened:
        for _ in range(70):
            connection = opened.enter_context(socket.create_connection((host, int(port)), timeout=HANG))
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: num_running(url) > 0)
    wait_until(lambda: num_running(url) == 0)


def num_running(url: str) -> int:
    """Requests that wait or run, as the server says."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health") as answer:
        return int(json.load(answer)["requests"])


@pytest.mark.slow
def test_sixty_four_streams_over_twenty_models(url: str, alone: Callable[..., str]) -> None:
    """Greedy and hot streams of own lengths, some cancelled: right models, right parameters, no slot left behind."""
    expected = {name: alone(name, PROMPT, 40) for name in (f"a{number}" for number in range(20))}

    async def one(asked: openai.AsyncOpenAI, number: int) -> None:
        name, length, hot = f"a{number % 20}", 5 + number % 30, number % 3 == 2
        stream = await asked.completions.create(
            model=name, prompt=PROMPT, max_tokens=length, temperature=5.0 if hot else 0, stream=True
        )
        words: list[str] = []
        async for part in stream:
            assert part.model == name
            words += (part.choices[0].text or "").split()
            if number % 7 == 3 and len(words) > 2:
                await stream.close()
                return
        assert len(words) <= length
        if not hot:
            assert words == expected[name].split()[: len(words)]
            assert len(words) == min(length, len(expected[name].split()))

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as asked:
            await asyncio.gather(*(one(asked, number) for number in range(64)))

    asyncio.run(all_of_them())
    wait_until(lambda: num_running(url) == 0)
