"""Words on the command line: rules of `--split`, and ids of the hub, where nothing may connect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attack_runner import REFUSED, SAFE, Attack, Sandbox, Words
from attacks_names import SCRIPT
from safetensors.torch import load_file, save_file


def split(*rules: str, more: dict[str, torch.Tensor] | None = None) -> Callable[[Sandbox], Sequence[Words]]:
    """Rules for a zoo, whose models may have more tensors."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        for folder in zoo.iterdir() if more else ():
            path = folder / "model.safetensors"
            save_file({**load_file(path), **(more or {})}, path, {"format": "pt"})
        words = tuple(word for rule in rules for word in ("--split", rule))
        return [("fit", zoo, "-o", "out", "--rank", 1, *words)]

    return build


def hub(word: str, *, bundle: bool = False) -> Callable[[Sandbox], Sequence[Words]]:
    """A word in the place of a model, and of a bundle."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        if bundle:
            return [("verify", "--", word), ("rebuild", "-o", "out", "--", word, "m0")]
        return [("inspect", "--", word), ("fit", sandbox.copy("zoo"), "-o", "out", "--rank", 1, "--", word)]

    return build


def pushed(word: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A bundle pushed to a place of such a name; nothing can connect."""
    return lambda sandbox: [("push", "--", sandbox.copy("bundle"), word)]


WORDS = {
    "..": "../x",
    "a revision of ..": "org/name@../../etc",
    "a revision of an absolute path": "org/name@/etc/passwd",
    "a folder of ..": "org/name/../../etc",
    "a folder of . and ..": "org/name/./..@main",
    "encoded ..": "org/name/%2e%2e/%2e%2e",
    "backslashes": "org/name/..\\..\\etc",
    "10^5 characters": "org/" + "a" * 10**5,
    "a revision of 10^5 characters": "org/name@" + "a" * 10**5,
    "a folder of 50,000 levels": "org/name" + "/a" * 50_000,
    "a name of nearly 96": "o" * 96 + "/" + "-" * 96,
    "escapes": "org/\x1b]0;x\x07name",
    "a revision of escapes": "org/name@\x1b]52;c;YQ==\x07",
    "lines": "org/name\nfault: none",
    "HTML": f"org/{SCRIPT}",
    "turned text": "org/name@\u202egnp",
    "an option": "--token/x",
    "a sound id that is not there": "org/name@main",
    "a commit that is not there": "org/name@" + "a" * 40,
    "a URL with a password": "https://user:secret-word@127.0.0.1:1/x.safetensors",
    "a URL of the hub with ..": "hf://org/name/../../x",
    "a URL of a file": "file:///etc/passwd",
    "a URL of a file in one": "simplecache::file:///etc/passwd",
    "a URL of no scheme": "\x1b://x/y",
    "half a character": "org/\udcff",
}

ATTACKS = [
    Attack("split: sound, as the control", split("*.weight=2"), SAFE),
    *(
        Attack(f"split: {what}", split(*rules))
        for what, rules in {
            "10^9 parts": ("*.weight=1000000000",),
            "9999 parts": ("*.weight=9999",),
            "10^5 digits": ("*.weight=" + "9" * 10**5,),
            "digits of another script": ("*.weight=٤",),
            "10^5 names": ("*.weight=" + ",".join(f"n{number}" for number in range(10**5)),),
            "a share of 10^9": ("*.weight=q:1000000000,k:1",),
            "shares that no side has": ("*.weight=q:999999,k:1",),
            "a name of 10^5 characters": ("*.weight=" + "q" * 10**5 + ",k",),
            "a name of ..": ("*.weight=../q,k",),
            "a name of escapes": ("*.weight=\x1b[2J,k",),
            "a name of HTML": (f"*.weight={SCRIPT},k",),
            "a name of another script": ("*.weight=ｑ,q\u202e",),
            "names twice": ("*.weight=q,q",),
            "two rules for one tensor": ("*.weight=2", "block.*=4"),
            "no glob": ("=2",),
            "no rule": ("*",),
            "nothing": ("",),
            "a glob of 20,000 stars": ("*a" * 10**4 + "=2",),
            "a glob of escapes": ("\x1b[2J=2",),
            "a glob that never ends": ("[" * 10**4 + "=2",),
            "nothing matches": ("*.other=2",),
        }.items()
    ),
    Attack(
        "split: a part with the name of a tensor", split("block.weight=q,k", more={"block.weight.q": torch.ones(2)})
    ),
    Attack(
        "split: parts of parts with one name",
        split("a.*=q,k", more={"a.w": torch.ones(4, 2), "a.w.q": torch.ones(4, 2)}),
    ),
    Attack("split: of a tensor of no outputs", split("a=2", more={"a": torch.ones(0, 2)})),
    Attack("split: of a slow name", split("*a*a*a*a*a*a*a*a*b=2", more={"a" * 5000: torch.ones(2, 2)})),
    Attack("split: the parts of adapters", lambda box: [("fit", box.copy("adapters"), "-o", "out", "--split", "*=2")]),
    *(Attack(f"hub: {what}", hub(word), REFUSED) for what, word in WORDS.items()),
    *(
        Attack(f"hub, as a bundle: {what}", hub(word, bundle=True), REFUSED)
        for what, word in WORDS.items()
        if what
        in ("..", "a revision of ..", "10^5 characters", "a sound id that is not there", "a revision of escapes")
    ),
    *(
        Attack(f"hub, pushed to: {what}", pushed(WORDS[what]), REFUSED)
        for what in ("..", "a revision of ..", "escapes", "10^5 characters", "a sound id that is not there")
    ),
]
