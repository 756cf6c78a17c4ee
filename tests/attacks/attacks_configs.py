"""Configs of adapters and checkpoints: hostile numbers, patterns, remote code, and JSON that only costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attack_runner import ANY, EITHER, REFUSED, SAFE, Attack, Sandbox, Words
from safetensors.torch import load_file, save_file
from victims import use_model

LONG = "a" * 200

CANARY_MODULE = "import pathlib\npathlib.Path({canary!r}).touch()\nclass Config: pass\nclass Model: pass\n"


def config(thorough: bool = False, **changes: Any) -> Callable[[Sandbox], Sequence[Words]]:
    """An honest adapter whose config is changed."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy("adapters") / "m3"
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return use_model(sandbox, folder, kind="adapters", thorough=thorough)

    return build


def text(file: str, data: str, kind: str = "adapters") -> Callable[[Sandbox], Sequence[Words]]:
    """An honest model with other text in a file."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy(kind) / "m3"
        (folder / file).write_bytes(data.encode("utf-8", "surrogateescape"))
        return use_model(sandbox, folder, kind=kind, thorough=None)

    return build


def long_names(**changes: Any) -> Callable[[Sandbox], Sequence[Words]]:
    """Adapters with a module whose name makes a bad pattern slow."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("adapters")
        for folder in zoo.iterdir():
            tensors = load_file(folder / "adapter_model.safetensors")
            renamed = {name.replace("block.q", f"block.{LONG}!"): values for name, values in tensors.items()}
            save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
            path = folder / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return [("inspect", zoo), ("fit", zoo, "-o", "out", "--rank", 1)]

    return build


def values(kind: str, file: str, number: float) -> Callable[[Sandbox], Sequence[Words]]:
    """A model with one odd value."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy(kind) / "m3"
        tensors = load_file(folder / file)
        first = sorted(tensors)[0]
        tensors[first].reshape(-1)[0] = number
        save_file(tensors, folder / file, {"format": "pt"})
        return use_model(sandbox, folder, kind=kind)

    return build


def subnormal(sandbox: Sandbox) -> Sequence[Words]:
    """A whole zoo of the smallest numbers there are."""
    zoo = sandbox.copy("zoo")
    for folder in zoo.iterdir():
        tensors = {name: torch.full_like(old, 1e-45) for name, old in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return [("inspect", zoo), ("fit", zoo, "-o", "out", "--rank", 1), ("evidence", zoo)]


def remote_code(file: str, entries: dict[str, Any]) -> Callable[[Sandbox], Sequence[Words]]:
    """A config that names a module beside it, which would leave a canary."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        kind = "adapters" if file.startswith("adapter") else "zoo"
        folder = sandbox.copy(kind) / "m3"
        (folder / "evil.py").write_text(CANARY_MODULE.format(canary=str(sandbox.canary)))
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
        return use_model(sandbox, folder, kind=kind, thorough=True)

    return build


def side_file(file: str, data: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A zoo with side files that are carried as bytes and never read as what they are."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        (zoo / "m3" / file).write_text(data)
        (zoo / "m3" / "evil.py").write_text(CANARY_MODULE.format(canary=str(sandbox.canary)))
        return [("fit", zoo, "-o", "out", "--rank", 1), ("rebuild", sandbox.copy("bundle"), zoo / "m3", "-o", "out")]

    return build


PATTERNS = {
    "(a+)+$": {"(a+)+$": 4},
    "(a|a)*$": {"(a|a)*$": 4},
    "(a|aa)+$": {"(a|aa)+$": 4},
    "a*a*a*a*a*a*a*a*b": {"a*a*a*a*a*a*a*a*b": 4},
    "(.*)(.*)(.*)(.*)(.*)(.*)x": {"(.*)(.*)(.*)(.*)(.*)(.*)x": 4},
    "optional parts": {"a?" * 40 + "a" * 40: 4},
    "a back reference": {r"(a*)\1\1\1\1b": 4},
    "bounded repetitions": {"(a{1,200}){1,200}b": 4},
    "bounded repetitions of one": {"a{1,200}a{1,200}a{1,200}a{1,200}b": 4},
    "a number too large": {"a{99999999999999999999}": 4},
    "a look-behind": {r"(?<=(a+)+)b": 4},
    "a look-ahead": {r"(?=(a+)+b)": 4},
    "no expression": {"(((": 4},
    "a megabyte": {"a" * 10**6: 4},
    "deep": {"(" * 5000 + ")" * 5000: 4},
}

ATTACKS = [
    *(
        Attack(f"{key}: {what}", long_names(**{key: pattern}), EITHER)
        for what, pattern in PATTERNS.items()
        for key in (("rank_pattern", "alpha_pattern") if what == "(a+)+$" else ("alpha_pattern",))
    ),
    Attack("alpha_pattern: a million", config(alpha_pattern={f"m{number}": 1 for number in range(10**6)}), REFUSED),
    Attack("alpha_pattern: ten thousand", config(alpha_pattern={f"m{number}.*x": 1 for number in range(9999)}), EITHER),
    Attack("alpha: negative", config(lora_alpha=-16), says="alpha"),
    Attack("alpha: zero", config(lora_alpha=0), EITHER),
    Attack("alpha: NaN", config(lora_alpha=float("nan")), says="alpha"),
    Attack("alpha: infinite", config(lora_alpha=float("inf")), says="alpha"),
    Attack(
        "alpha: 10^400", text("adapter_config.json", '{"peft_type": "LORA", "r": 2, "lora_alpha": 1' + "0" * 400 + "}")
    ),
    Attack(
        "alpha: 5000 digits",
        text("adapter_config.json", '{"peft_type": "LORA", "r": 2, "lora_alpha": ' + "9" * 5000 + "}"),
    ),
    Attack("alpha: 1e308", config(lora_alpha=1e308)),
    Attack("alpha: 1e290", config(lora_alpha=1e290), ANY),
    Attack("alpha: true", config(lora_alpha=True), says="alpha"),
    Attack("alpha: a list", config(lora_alpha=[16])),
    Attack("rank: zero", config(r=0), says="rank"),
    Attack("rank: negative", config(r=-2), says="rank"),
    Attack("rank: huge", config(r=2**62), says="rank"),
    Attack("rank: a text of escapes", config(r="\x1b[2J")),
    Attack("target modules: a slow expression", config(target_modules="(a+)+$"), SAFE),
    Attack("type: an object", config(peft_type={"a": 1})),
    Attack("an entry that nobody knows", config(run_this={"a": 1})),
    Attack("an entry with an escape for a name", config(**{"\x1b]0;x\x07": True})),
    Attack(
        "auto_mapping to a module",
        remote_code("adapter_config.json", {"auto_mapping": {"base_model_class": "Model", "parent_library": "evil"}}),
        SAFE | EITHER,
    ),
    Attack(
        "auto_map of a config",
        remote_code(
            "config.json",
            {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "trust_remote_code": True},
        ),
        EITHER,
    ),
    *(
        Attack(f"{file} of an adapter: {what}", text(file, data))
        for file in ("adapter_config.json",)
        for what, data in {
            "nested without end": '{"a":' * 100_000 + "1" + "}" * 100_000,
            "a list": "[]",
            "empty": "",
            "no UTF-8": "\udcff",
            "a key twice": '{"peft_type": "LORA", "peft_type": "IA3"}',
            "15 MB of brackets": '{"a": [' + "[]," * 5 * 10**6 + "[]]}",
            "20 MB": '{"a": "' + "x" * 20 * 2**20 + '"}',
            "Infinity": '{"peft_type": "LORA", "r": Infinity}',
        }.items()
    ),
    Attack("config.json: nested without end", text("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000, "zoo")),
    Attack(
        "config.json: quantised", text("config.json", '{"quantization_config": {"quant_method": "\\u001b[2J"}}', "zoo")
    ),
    Attack("config.json: quantised by a list", text("config.json", '{"quantization_config": [1]}', "zoo")),
    Attack(
        "side file: a template that runs code",
        side_file("chat_template.jinja", "{{ self.__init__.__globals__ }}" * 100),
        SAFE,
    ),
    Attack(
        "side file: a tokenizer that names a module",
        side_file("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.Model", null]}}'),
        SAFE,
    ),
    Attack("side file: a tokenizer that is no JSON", side_file("tokenizer.json", "\0" * 1000), SAFE),
    *(
        Attack(f"values: {what} in {file}", values(kind, file, number), codes)
        for kind, file in (("zoo", "model.safetensors"), ("adapters", "adapter_model.safetensors"))
        for what, number, codes in (
            ("NaN", float("nan"), ANY - SAFE),
            ("infinity", float("-inf"), ANY - SAFE),
            ("1e38", 1e38, EITHER),
            ("subnormal", 1e-45, SAFE),
        )
    ),
    Attack("values: nothing but subnormal", subnormal, EITHER),
]
