"""What lies beside models and what is missing in them: names of files, many files, modules that some adapters lack, advice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from attack_runner import ANY, EITHER, SAFE, Attack, Sandbox, Words
from attacks_names import NAMES, SCRIPT, check_outputs
from safetensors.torch import save_file

WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]
ZERO = ("--missing", "zero")


def named(ending: str, what: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A file of this name beside each model, and a folder of it with a model; a bundle of them, and a model of that."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        for folder in zoo.iterdir():
            (folder / f"{NAMES[what][:200]}{ending}").write_bytes(b"x")
            (folder / f"{NAMES[what][:200]}_").mkdir()
            save_file({"w": torch.ones(2)}, folder / f"{NAMES[what][:200]}_" / "model.safetensors")
        (sandbox.files / "zoo2").mkdir()
        return [
            ("inspect", zoo),
            ("inspect", zoo, "--json"),
            ("fit", zoo, "-o", "out", "--rank", 1),
            # "beside, the outputs" reads the page of such a zoo.
            ("report", zoo, "-o", "out.md"),
            ("evidence", zoo, "--json"),
            ("project", sandbox.copy("bundle"), zoo / "m0"),
        ]

    return build


def rebuilt(sandbox: Sandbox) -> None:
    """A bundle of models that have such files is whole, and gives them back."""
    assert sandbox.run("fit", sandbox.files / "zoo", "-o", "outbundle", "--rank", 1).code == 0
    for words in (("verify", "outbundle"), ("rebuild", "outbundle", "m0", "-o", "outm0")):
        ran = sandbox.run(*words)
        assert ran.code == 0, ran
        odd = {char for char in ran.out + ran.err if not char.isprintable() and char != "\n"}
        assert not odd, odd


def hidden(what: str) -> Callable[[Sandbox], Sequence[Words]]:
    """Models whose names make tools pass over them."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        (zoo / "m3").rename(zoo / f"_{NAMES[what][:200]}")
        (zoo / "m2").rename(zoo / f".{NAMES[what][:200]}")
        return [("inspect", zoo), ("fit", zoo, "-o", "out", "--rank", 1)]

    return build


def many_beside(num: int, shards: int) -> Callable[[Sandbox], Sequence[Words]]:
    """A checkpoint of many shards, in a folder below, with as many pickles beside them."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.files / "m"
        (folder / "s").mkdir(parents=True)
        names = {f"w{number}": f"s/{number}.safetensors" for number in range(shards)}
        for number in range(shards):
            save_file({f"w{number}": torch.ones(1)}, folder / "s" / f"{number}.safetensors")
        for number in range(num):
            (folder / f"x{number}.bin").touch()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        return [("inspect", folder)]

    return build


def lacking(first: int, others: int, carried: int, num: int) -> Callable[[Sandbox], Sequence[Words]]:
    """An adapter of many modules among others of few and of many tensors that are no factors."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.files / "zoo"
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": "all-linear"}
        for place in range(num):
            modules = first if place == 0 else others
            held = {
                f"base_model.model.b{place if place else ''}x{n}.lora_{side}.weight": torch.ones(1, 1)
                for n in range(modules)
                for side in "AB"
            }
            if place:
                held |= {f"base_model.model.o{n}.weight": torch.ones(1) for n in range(carried)}
            (zoo / f"m{place}").mkdir(parents=True)
            save_file(held, zoo / f"m{place}" / WEIGHTS)
            (zoo / f"m{place}" / "adapter_config.json").write_text(json.dumps(config))
        return [("inspect", zoo, *ZERO)]

    return build


def software(text: str) -> Callable[[Sandbox], Sequence[Words]]:
    """What a header says of the tool that wrote the file."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        path = sandbox.files / "m.safetensors"
        save_file({"w": torch.ones(2, 2)}, path, {"software": text})
        return [("inspect", path)]

    return build


ATTACKS = [
    *(
        Attack(f"beside, a file called: {what}", named(ending, what), SAFE, after=rebuilt)
        for what in NAMES
        for ending in (".bin", ".x")
        if "/" not in NAMES[what] and NAMES[what]
    ),
    Attack("beside, the outputs: a closed attribute", named(".bin", "a closed attribute"), SAFE, after=check_outputs),
    *(Attack(f"hidden, a model called: {what}", hidden(what), EITHER) for what in NAMES if "/" not in NAMES[what]),
    Attack("beside, many: 3,000 shards and 3,000 pickles", many_beside(3_000, 3_000), ANY),
    Attack("lacking: 20,000 modules and 20,000 tensors", lacking(20_000, 1, 20_000, 2), ANY),
    Attack("lacking: 90,000 modules in 20 adapters", lacking(90_000, 1, 0, 20), ANY),
    *(
        Attack(f"software: {what}", software(text), EITHER)
        for what, text in {
            "escapes": json.dumps({"name": "\x1b[2J" + SCRIPT, "version": {"a": ["\n"]}}),
            "30 MB of brackets": '{"name": [' + "[]," * 9 * 10**6 + "[]]}",
            "nested": "[" * 10**6,
            "a number of 10^6 digits": "9" * 10**6,
        }.items()
    ),
]
