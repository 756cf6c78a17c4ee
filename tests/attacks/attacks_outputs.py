"""Outputs: where they may not go, what they may not replace, and an attacker who is quicker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from attack_runner import EITHER, REFUSED, Attack, Sandbox, Words

Plan = Callable[[Sandbox], Sequence[Words]]


def everything(sandbox: Sandbox, target: object, *flags: str, inside: bool = False) -> list[Words]:
    """Every command that writes, to one place."""
    zoo, bundle = sandbox.copy("zoo"), sandbox.copy("bundle")
    shutil.copytree(sandbox.honest("zoo") / "m3", sandbox.files / "new", dirs_exist_ok=True)
    return [
        ("fit", zoo, "-o", target, "--rank", 1, *flags),
        ("add", bundle, sandbox.files / "new", "-o", target, *flags),
        ("rebuild", bundle, "m0", "-o", target, *flags),
        ("report", zoo, "-o", target, "--format", "html", *flags),
        ("report", zoo, "-o", target, "--format", "png", *flags),
    ]


def link(to: Callable[[Sandbox], Path], *flags: str) -> Plan:
    """The output's name is a link."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        target = sandbox.files / "target"
        target.symlink_to(to(sandbox))
        return everything(sandbox, target, *flags)

    return build


def others(*flags: str, like: str = "") -> Plan:
    """The output is a folder of somebody's, which may look like one of ours."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        target = sandbox.files / "target"
        if like:
            shutil.copytree(sandbox.honest(like), target)
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("years of work")
        return everything(sandbox, target, *flags)

    return build


def holds_link(sandbox: Sandbox) -> Sequence[Words]:
    """A bundle that may be replaced holds a link to a folder of the user's: the link may go, what it leads to stays."""
    target = sandbox.work / "out"
    precious = sandbox.root / "home" / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    shutil.copytree(sandbox.honest("bundle"), target)
    shutil.rmtree(target / "rest")
    (target / "rest").symlink_to(precious)
    return [("fit", sandbox.copy("zoo"), "-o", target, "--rank", 1, "--force")]


def planted(what: str) -> Plan:
    """Somebody has put a link at the temporary name, which for once is known."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        away = sandbox.root / "home"
        for target in ("out", "outpage"):
            (sandbox.work / f".{target}.tmp-deadbeef").symlink_to(away if what == "folder" else away / "diary.txt")
        return [*everything(sandbox, "out")[:3], ("report", sandbox.copy("zoo"), "-o", "outpage", "--format", "html")]

    return build


FIXED = "import secrets; secrets.token_hex = lambda n=4: 'deadbeef'"


def taken_away(sandbox: Sandbox) -> Sequence[Words]:
    """The output's folder is a link that leads elsewhere: the user has named it, and what is there stays."""
    (sandbox.files / "door").symlink_to(sandbox.root / "home")
    return [("fit", sandbox.copy("zoo"), "-o", sandbox.files / "door" / "diary.txt", "--rank", 1)]


def names(*targets: object) -> Plan:
    """Outputs that are no names."""
    return lambda sandbox: [words for target in targets for words in everything(sandbox, target)[:4]]


def bundle_within(sandbox: Sandbox) -> Sequence[Words]:
    """The output is the input, or lies in it."""
    zoo, bundle = sandbox.copy("zoo"), sandbox.copy("bundle")
    return [
        ("fit", zoo, "-o", zoo, "--rank", 1, "--force"),
        ("fit", zoo / "m0", zoo / "m1", zoo / "m2", "-o", zoo / "m0", "--rank", 1, "--force"),
        ("rebuild", bundle, "m0", "-o", bundle, "--force"),
        ("rebuild", bundle, "m0", "-o", bundle / "manifest.json", "--force"),
        ("report", zoo, "-o", zoo / "m0" / "model.safetensors", "--format", "html", "--force"),
        ("report", zoo, "-o", zoo / "m0" / "config.json", "--force", "--format", "html"),
    ]


ATTACKS = [
    *(
        Attack(f"output: a link to {what}{' with --force' * bool(flags)}", link(to, *flags))
        for what, to in {
            "a folder of the user's": lambda sandbox: sandbox.root / "home",
            "a file of the user's": lambda sandbox: sandbox.secret,
            "nothing": lambda sandbox: sandbox.root / "home" / "new",
            "itself": lambda sandbox: Path("target"),
            "a device": lambda sandbox: Path("/dev/null"),
        }.items()
        for flags in ((), ("--force",))
    ),
    Attack("output: a folder of others", others()),
    Attack("output: a folder of others with --force", others("--force")),
    Attack("output: a bundle with a file of somebody's, with --force", others("--force", like="bundle")),
    Attack(
        "output: a pipe", lambda box: (os.mkfifo(box.files / "pipe"), everything(box, box.files / "pipe", "--force"))[1]
    ),
    Attack("output: within the input", bundle_within, REFUSED),
    Attack("output: through a link", taken_away),
    Attack("output: no names", names("/", "..", ".", "", "/dev/null", "x" * 300)),
    Attack("output: a link at the temporary name", planted("folder"), EITHER, before=FIXED),
    Attack("output: a link to a file at the temporary name", planted("file"), EITHER, before=FIXED),
    Attack("output: a replaced bundle holds a link", holds_link, EITHER),
]
