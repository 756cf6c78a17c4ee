"""Links, pipes, devices, lists and globs: what lies where a file or a zoo is expected."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from attack_runner import EITHER, REFUSED, SAFE, Attack, Sandbox, Words
from victims import use_bundle, use_model, use_zoo

Put = Callable[[Sandbox, Path], object]


def link_to_secret(sandbox: Sandbox, path: Path) -> None:
    path.symlink_to(sandbox.secret)


def link_outside(sandbox: Sandbox, path: Path) -> None:
    """The file itself, moved out of the folder; a link in its place."""
    away = sandbox.files / f"away-{path.name}"
    shutil.copy(sandbox.honest("zoo") / "m3" / "model.safetensors", away)
    path.symlink_to(away)


def unix_socket(sandbox: Sandbox, path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # their addresses are short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(before)


PLACES: dict[str, Put] = {
    "a link to a secret": link_to_secret,
    "a link out of the folder": link_outside,
    "a link to itself": lambda sandbox, path: path.symlink_to(path.name),
    "a link to nothing": lambda sandbox, path: path.symlink_to("nowhere"),
    "a link to /dev/zero": lambda sandbox, path: path.symlink_to("/dev/zero"),
    "a pipe": lambda sandbox, path: os.mkfifo(path),
    "a socket": unix_socket,
    "a folder": lambda sandbox, path: path.mkdir(),
    "a link to its own folder": lambda sandbox, path: path.symlink_to("."),
}


def in_place(kind: str, file: str, put: Put) -> Callable[[Sandbox], Sequence[Words]]:
    """Put something in the place of a file of an honest model."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        model = sandbox.copy(kind) / "m3"
        (model / file).unlink(missing_ok=True)
        put(sandbox, model / file)
        return use_model(
            sandbox,
            model,
            "--allow-pickle",
            kind=kind,
            # What a model is opened by is the same code for all: one more command sees that, on one of them.
            thorough=None if put is not link_to_secret or file.startswith(("config", "tok", "chat")) else False,
        )

    return build


def in_bundle(file: str, put: Put) -> Callable[[Sandbox], Sequence[Words]]:
    """Put something in the place of a bundle's file."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        bundle = sandbox.copy("bundle")
        path = next(bundle.glob(file))
        path.unlink()
        put(sandbox, path)
        return use_bundle(sandbox, bundle)[: 1 if file == "manifest.json" and put is not link_to_secret else 2]

    return build


def hard_link(sandbox: Sandbox) -> Sequence[Words]:
    """A second name of a file of the user's: no link that anyone can see, and read only as what it claims to be."""
    model = sandbox.copy("zoo") / "m3"
    (model / "model.safetensors").unlink()
    os.link(sandbox.secret, model / "model.safetensors")
    return use_model(sandbox, model)


def hard_linked_side_file(sandbox: Sandbox) -> Sequence[Words]:
    """A tokenizer that is another name of the user's file stays a file of the sender's as far as anyone can tell."""
    zoo = sandbox.copy("zoo")
    (zoo / "m3" / "vocab.txt").symlink_to(sandbox.secret)
    return [("fit", zoo, "-o", "out", "--rank", 1), ("inspect", zoo / "m3")]


def in_module(name: str, put: Put) -> Callable[[Sandbox], Sequence[Words]]:
    """Put something into the folder of a module of sentence-transformers, or in its place."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        (zoo / "m3" / "modules.json").write_text("[]")
        (zoo / "m3" / name).parent.mkdir(exist_ok=True)
        put(sandbox, zoo / "m3" / name)
        return [("fit", zoo, "-o", "out", "--rank", 1), ("inspect", zoo / "m3")]

    return build


def lists(text: str, **others: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A zoo that is a text file of paths."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        sandbox.copy("zoo")
        for name, content in {"list": text, **others}.items():
            (sandbox.files / f"{name}.txt").write_bytes(content.encode("utf-8", "surrogateescape"))
        return use_zoo(sandbox, sandbox.files / "list.txt")[:1]

    return build


def levels(num: int) -> dict[str, str]:
    """Lists that each name the next one ten times."""
    return {f"l{level}": f"l{level + 1}.txt\n" * 10 for level in range(num)} | {f"l{num}": "zoo/m0\n"}


def giant_list(sandbox: Sandbox) -> Sequence[Words]:
    """A list of three gigabytes that takes no room on the disk."""
    (sandbox.files / "list.txt").write_text("zoo/m0\n")
    os.truncate(sandbox.files / "list.txt", 3 * 10**9)
    return use_zoo(sandbox, sandbox.files / "list.txt")[:2]


def link_maze(sandbox: Sandbox) -> Sequence[Words]:
    """Two links to the folder that they lie in: 2^40 paths below it."""
    zoo = sandbox.copy("zoo")
    for name in ("a", "b", "c"):
        (zoo / name).symlink_to(".")
    return [*use_zoo(sandbox, zoo)[:2], *use_zoo(sandbox, f"{zoo}/**")[:1]]


def deep_folders(sandbox: Sandbox) -> Sequence[Words]:
    """Two hundred folders, one in another."""
    deepest = sandbox.copy("zoo") / "deep"
    before = Path.cwd()
    deepest.mkdir()
    os.chdir(deepest)
    try:
        for _ in range(200):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(before)
    return [("inspect", sandbox.files / "zoo"), ("inspect", f"{sandbox.files}/zoo/**")]


def zoo_of_links(sandbox: Sandbox) -> Sequence[Words]:
    """A folder of models that holds a pipe, a device and a link to the secret under names of weights."""
    zoo = sandbox.copy("zoo")
    os.mkfifo(zoo / "pipe.safetensors")
    return use_zoo(sandbox, zoo)[:2]


def device_zoo(name: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A device or a folder of devices as a zoo."""
    return lambda sandbox: use_zoo(sandbox, name)[: None if name == "/dev/zero" else 1]


def one_folder_by_many_names(line: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A list whose every line looks at one large folder again, under another name."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        for number in range(10_000):
            (zoo / f"{number}.md").touch()
        names = ("".join("//."[int(bit) :][:2] for bit in f"{number:016b}") for number in range(20_000))
        (sandbox.files / "list.txt").write_text("".join(f"zoo{name}/{line}\n" for name in names))
        return [("inspect", sandbox.files / "list.txt")]

    return build


ATTACKS = [
    *(
        Attack(f"in the place of {file}: {what}", in_place(kind, file, put), REFUSED)
        for kind, file in (
            ("zoo", "model.safetensors"),
            ("zoo", "config.json"),
            ("adapters", "adapter_config.json"),
            ("adapters", "adapter_model.safetensors"),
        )
        for what, put in PLACES.items()
    ),
    *(
        Attack(f"in the place of {file}: {what}", in_place("zoo", file, put))
        for file in ("tokenizer.json", "chat_template.jinja")
        for what, put in list(PLACES.items())[:6]
    ),
    *(
        Attack(f"in a module's folder: {what}", in_module("1_Pooling/config.json", put), REFUSED)
        for what, put in PLACES.items()
    ),
    *(
        Attack(f"in the place of a module's folder: {what}", in_module("1_Pooling", put), EITHER)
        for what, put in PLACES.items()
    ),
    *(
        Attack(f"in the place of a bundle's {file}: {what}", in_bundle(file, put))
        for file in ("manifest.json", "basis.safetensors", "coefficients/m0.safetensors", "rest/*.json")
        for what, put in PLACES.items()
    ),
    Attack("a hard link to a secret as weights", hard_link),
    Attack("a link to a secret as a side file", hard_linked_side_file),
    Attack("a pipe among models", zoo_of_links),
    *(Attack(f"as a zoo: {name}", device_zoo(name)) for name in ("/dev/zero", "/dev/stdin", "/dev", "/proc/self/fd")),
    Attack("list: itself", lists("list.txt\n"), says="names itself"),
    Attack("list: two that name each other", lists("b.txt\n", b="list.txt\n"), says="names itself"),
    Attack("list: ten levels of ten", lists("l0.txt\n", **levels(10)), EITHER),
    Attack("list: a device", lists("/dev/zero\n")),
    Attack("list: a secret", lists("../secret.txt\n")),
    Attack("list: a million lines", lists("zoo/m0\n" * 10**6), EITHER),
    Attack("list: a million names of nothing", lists("".join(f"no{number}\n" for number in range(10**6)))),
    Attack("list: no text", lists("\udcff\udcfe\n")),
    Attack("list: zero bytes", lists("a\0b\n")),
    Attack("list: escapes", lists("\x1b]52;c;YQ==\x07\n")),
    Attack("list: three gigabytes", giant_list),
    Attack("list: a name of 10^5 characters", lists("a" * 10**5 + "\n")),
    Attack("glob: a maze of links", link_maze, EITHER),
    Attack("glob: everything below the root", lists("/**\n")),
    Attack(
        "glob: in a list, ten levels of a maze",
        lambda box: (link_maze(box), lists("zoo" + "/*" * 10 + "\n")(box))[1],
        EITHER,
    ),
    Attack("glob: in a list, a maze of links", lambda box: (link_maze(box), lists("zoo/**\n")(box))[1], EITHER),
    Attack("glob: in a list, ** four thousand times", lists("../**/" + "**/" * 4000 + "m?\n"), EITHER),
    Attack("glob: in a list, **/* four thousand times", lists("**/*/" * 4000 + "m?\n"), says="glob is too long"),
    Attack("glob: in a list, a million of *a", lists("zoo/" + "*a" * 10**6 + "\n"), says="glob is too long"),
    Attack("list: a folder by many names", one_folder_by_many_names(""), says="too many names"),
    Attack("list: a glob by many names", one_folder_by_many_names("m[0-3]"), says="too many names"),
    Attack("folders: two hundred levels", deep_folders, EITHER),
    Attack("paths: sound, as the control", lists("zoo/m0\nzoo/m1\nzoo/m2\nzoo/m3\n"), SAFE),
]
