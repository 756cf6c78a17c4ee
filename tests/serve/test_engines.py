"""Engines that people already run load what a bundle hands out, and answer as PEFT does.

They lie in environments of their own, `make .venv/engines`, and are skipped without them. The engines are vLLM's server for CPUs
with our plugin, and llama.cpp's server (xllamacpp) with llama.cpp's own converters.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eigenzoo as ez
from eigenzoo.errors import MismatchError, UnsupportedError, UsageError
from eigenzoo.integrations import vllm_plugin
from eigenzoo.serve.engines import BUNDLE, print_command, vllm_rank
from eigenzoo.serve.handed_out import HandedOut
from once import once

# PEFT's own use of what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

ENGINES = Path(__file__).parents[2] / ".venv" / "engines"
VLLM, LLAMA = (ENGINES / name / "bin" / "python" for name in ("vllm", "llama"))
PROMPT, NEW = "Hello zoo", 8


@dataclass(frozen=True)
class Zoo:
    """A base with byte-level tokens, six adapters of rank 4, their bundle, and a base of another width."""

    base: Path
    other: Path
    adapters: Path
    bundle: Path


def make_base(folder: Path, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 32,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            **sizes,
            num_key_value_heads=width // 32,
            initializer_range=0.15,
            bos_token_id=256,
            eos_token_id=257,
            max_position_embeddings=512,
        )
    ).eval()
    model.save_pretrained(folder)
    words = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    # llama.cpp reads no tokenizer without merges.
    tokenizer = Tokenizer(models.BPE({**words, "<s>": 256, "</s>": 257, "qx": 258}, [("q", "x")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    def build(folder: Path) -> None:
        make_base(folder / "other", 64)
        paths = []
        for seed in range(6):
            settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
            model = get_peft_model(make_base(folder / "base", 128), settings)
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.15)
            paths.append(folder / "adapters" / f"a{seed}")
            model.save_pretrained(paths[-1], save_embedding_layers=False)
        ez.fit(paths, axes=("outputs", "inputs"), rank={"outputs": 24, "inputs": 24}).save(folder / "bundle")

    folder = once(tmp_path_factory, "engine-zoo", build)
    return Zoo(folder / "base", folder / "other", folder / "adapters", folder / "bundle")


def by_peft(zoo: Zoo, name: str | None) -> tuple[list[int], list[int], list[float]]:
    """The prompt, greedy tokens and their log-probabilities."""
    ids = AutoTokenizer.from_pretrained(zoo.base)(PROMPT, return_tensors="pt")["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(zoo.base, dtype=torch.float32)
    if name is not None:
        model = PeftModel.from_pretrained(model, zoo.adapters / name)
    model.eval()
    with torch.no_grad():
        found = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0]
        scores = torch.log_softmax(model(found[None]).logits[0, ids.shape[1] - 1 : -1], -1)
    new = found[ids.shape[1] :]
    return ids[0].tolist(), new.tolist(), scores.gather(1, new[:, None])[:, 0].tolist()


@contextmanager
def vllm(zoo: Zoo, base: Path, cache: Path, rank: int = 8) -> Iterator[str]:
    """vLLM's server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        BUNDLE: str(zoo.bundle),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "EIGENZOO_CACHE": str(cache),
        "PYTHONPATH": str(Path(ez.__file__).parents[1]),
    }
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--enable-lora", "--max-loras", "4"]
    command += ["--max-lora-rank", rank, "--port", port, "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager"]
    process = subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("vLLM did not start:\n" + "".join(said[-40:]))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.communicate()


def ask(url: str, **body: Any) -> tuple[int, Any]:
    asked = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
@pytest.mark.skipif(not VLLM.exists(), reason="vLLM is not installed: make .venv/engines")
def test_vllm_finds_the_models_of_a_bundle(zoo: Zoo, tmp_path: Path) -> None:
    """Log-probabilities and greedy tokens as PEFT's; unknown names, a wrong base and a rank too high are errors."""
    with vllm(zoo, zoo.base, tmp_path / "cache") as url:
        for name in ("a0", "a4", None):
            prompt, tokens, scores = by_peft(zoo, name)
            model = str(zoo.base) if name is None else name
            status, found = ask(
                url, model=model, prompt=prompt, max_tokens=NEW, temperature=0, logprobs=1, return_token_ids=True
            )
            assert status == 200, found
            (choice,) = found["choices"]
            assert choice["token_ids"] == tokens
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-4)
        for name in ("a9", "../a0", "/etc/passwd"):
            assert ask(url, model=name, prompt="x", max_tokens=2)[0] == 404
    with vllm(zoo, zoo.other, tmp_path / "cache") as url:
        status, found = ask(url, model="a1", prompt="x", max_tokens=2)
        assert status == 400, found
        assert "does not fit the base" in found
    with vllm(zoo, zoo.base, tmp_path / "cache", rank=1) as url:
        status, found = ask(url, model="a1", prompt="x", max_tokens=2)
        assert status == 400, found


CONVERT = """
import runpy, sys
import conversion.base as base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # it knows tokenizers by their vocabularies
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SERVE = """
import json, sys
import xllamacpp as engine
base, adapters, prompt, count = json.loads(sys.argv[1])
asked = engine.CommonParams()
asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup = base, 256, 2, False
asked.lora_adapters = [engine.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
asked.lora_init_without_apply = True
server = engine.Server(asked)
for lora in [[{"id": number, "scale": 1.0}] for number in range(len(adapters))] + [[]]:
    body = {"prompt": prompt, "n_predict": count, "temperature": 0, "lora": lora, "return_tokens": True, "n_probs": 1}
    found = server.handle_completions(json.dumps(body))
    print("FOUND " + json.dumps(found if isinstance(found, dict) else json.loads(found)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA.exists(), reason="llama.cpp is not installed: make .venv/engines")
def test_llama_cpp_loads_converted_adapters(zoo: Zoo, tmp_path: Path) -> None:
    """The printed commands convert, and the server answers as PEFT does."""
    names = ["a0", "a3"]
    handed_out = HandedOut(ez.load(zoo.bundle), zoo.base, tmp_path / "handed-out")
    lines = print_command("llama.cpp", zoo.bundle, zoo.base, handed_out, names)
    tools = next(ENGINES.glob("llama.cpp/**/convert_lora_to_gguf.py")).parent
    environment = {**os.environ, "PYTHONPATH": f"{tools}/gguf-py:{tools}"}
    for line in lines:
        words = line.split()
        if words[0] == "python":
            subprocess.run(
                [sys.executable, "-c", CONVERT, str(tools / words[1]), *words[2:], "--outtype", "f32"],
                env=environment,
                cwd=tmp_path,
                check=True,
                capture_output=True,
            )
    prompt = by_peft(zoo, None)[0]
    adapters = [str(tmp_path / f"adapter-{number}.gguf") for number in range(len(names))]
    said = subprocess.run(
        [str(LLAMA), "-c", SERVE, json.dumps([str(tmp_path / "base.gguf"), adapters, prompt, NEW])],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    answers = [json.loads(line.removeprefix("FOUND ")) for line in said.splitlines() if line.startswith("FOUND ")]
    assert len(answers) == 3
    for name, answer in zip([*names, None], answers, strict=True):
        _, tokens, scores = by_peft(zoo, name)
        assert answer["tokens"] == tokens, name
        found = [entry["logprob"] for entry in answer["completion_probabilities"]]
        assert found == pytest.approx(scores, abs=1e-3)


def test_what_is_handed_out_is_the_model(zoo: Zoo, tmp_path: Path) -> None:
    """Whole, once, under a name that says its numbers; not for a base that it does not fit."""
    handed_out = HandedOut(ez.load(zoo.bundle), zoo.base, tmp_path / "kept")
    path = handed_out.path("a2")
    assert re.fullmatch(r"a2-[0-9a-f]{24}", path.name)
    written = (path / "adapter_model.safetensors").stat().st_mtime_ns
    assert handed_out.path("a2") == path
    assert (path / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert not [entry for entry in path.parent.iterdir() if entry.name.startswith(".a2")]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(zoo.base), path).eval()
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(zoo.base), zoo.adapters / "a2").eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4)
    for name in ("a9", "../a2", ""):
        with pytest.raises(UsageError, match="no model is called"):
            handed_out.path(name)
    wrong = HandedOut(ez.load(zoo.bundle), zoo.other, tmp_path / "wrong")
    with pytest.raises(MismatchError, match="'a2': its adapter does not fit the base"):
        wrong.path("a2")
    assert [entry.name for entry in (tmp_path / "wrong").iterdir()] == [".lock"]


def test_old_adapters_are_deleted_only_when_nobody_serves(zoo: Zoo, tmp_path: Path) -> None:
    space = ez.load(zoo.bundle)
    first = HandedOut(space, zoo.base, tmp_path, max_bytes=1)
    kept = first.path("a0")
    with pytest.raises(Exception, match="none is deleted while a server lives"):
        first.path("a1")
    HandedOut(space, zoo.base, tmp_path, max_bytes=1).close()
    assert kept.exists()
    first.close()
    HandedOut(space, zoo.base, tmp_path, max_bytes=1).close()
    assert not kept.exists()


def test_commands_take_the_smallest_rank_that_an_engine_allows(zoo: Zoo, tmp_path: Path) -> None:
    assert [vllm_rank(rank) for rank in (1, 4, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(UnsupportedError, match="accepts ranks up to 512"):
        vllm_rank(513)
    handed_out = HandedOut(ez.load(zoo.bundle), zoo.base, tmp_path)
    text = "\n".join(print_command("vllm", zoo.bundle, zoo.base, handed_out, ["a0"]))
    assert "--max-lora-rank 8 --max-loras 7" in text
    with pytest.raises(UsageError, match="'sglang' is not an engine"):
        print_command("sglang", zoo.bundle, zoo.base, handed_out, [])


def test_the_plugin_is_inert_without_its_setting(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable vLLM is not even imported; with it the resolver is registered once."""
    monkeypatch.setenv("EIGENZOO_CACHE", str(tmp_path))
    monkeypatch.delenv(BUNDLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm_plugin.register()
    resolvers: dict[str, Any] = {}
    registry = types.SimpleNamespace(
        get_supported_resolvers=lambda: resolvers.keys(),
        register_resolver=lambda name, made: resolvers.update({name: made}),
    )
    resolver = types.ModuleType("vllm.lora.resolver")
    vars(resolver).update(LoRAResolver=object, LoRAResolverRegistry=registry)
    request = types.ModuleType("vllm.lora.request")
    vars(request).update(LoRARequest=types.SimpleNamespace)
    for name, module in {
        "vllm": types.ModuleType("vllm"),
        "vllm.lora": types.ModuleType("vllm.lora"),
        "vllm.lora.resolver": resolver,
        "vllm.lora.request": request,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(BUNDLE, str(zoo.bundle))
    vllm_plugin.register()
    registered = resolvers["eigenzoo"]
    vllm_plugin.register()
    assert resolvers == {"eigenzoo": registered}
    adapters = vllm_plugin.Adapters([str(zoo.bundle)])
    assert adapters.find(str(zoo.base), "../a0") is None
    assert adapters.find(str(zoo.base), "a5") == HandedOut(ez.load(zoo.bundle), zoo.base).path("a5")
    with pytest.raises(ValueError, match="does not fit the base"):
        vllm_plugin.Adapters([str(zoo.bundle)]).find(str(zoo.other), "a1")
    with pytest.raises(ValueError, match="cannot be checked"):
        vllm_plugin.Adapters([str(zoo.bundle)]).find("org/name", "a1")
