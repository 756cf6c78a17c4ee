"""Names and texts: escapes for terminals, HTML and Markdown, names that collide, names that no file can have."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

from attack_runner import EITHER, SAFE, Attack, Sandbox, Words
from safetensors.torch import load_file, save_file

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
NAMES = {
    "a clipboard escape": "\x1b]52;c;ZXZpbA==\x07",
    "a colour": "\x1b[31;5mred",
    "a title": "\x9d0;owned\x9c",
    "from right to left": "\u202egnp.exe",
    "lines": "m\nfault: none\nm",
    "a carriage return": "m\roverwritten",
    "rich's markup": "[bold red]x[∕] [link=file:c]y",
    "HTML": SCRIPT.replace("/", "∕"),
    "a closed attribute": "\"'><svg onload=alert(1)>",
    "front matter": "---\nlicense: mit\n---\n# Mine",
    "a Markdown link": "[click](javascript:alert(1)) ![x](http:evil) |x|",
    "a template": "{{7*7}}${7*7}#{7*7}",
    "an option": "--force",
    "a spreadsheet's formula": '=HYPERLINK("http:evil","x")',
    "zero width": "m​‍0\u2066",
    "a name of 250 bytes": "n" * 250,
    "bytes that are no UTF-8": "m\udcff",
}


def rename_model(name: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A zoo one of whose models has this name; then its bundle, report and card."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        (zoo / "m0").rename(zoo / name)
        return [
            ("inspect", zoo),
            ("fit", zoo, "-o", "out", "--rank", 1),
            ("report", zoo, "-o", "out.csv"),
            ("project", sandbox.copy("bundle"), zoo / name),
        ]

    return build


def rename_tensor(name: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A zoo one of whose tensors has this name, its metadata too."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        for folder in zoo.iterdir():
            tensors = load_file(folder / "model.safetensors")
            tensors[name] = tensors.pop("block.weight")
            save_file(tensors, folder / "model.safetensors", {"format": name})
            (folder / "config.json").write_text(json.dumps({"model_type": name, "_name_or_path": name, name: name}))
        return [
            ("inspect", zoo),
            ("fit", zoo, "-o", "out", "--rank", 1),
            ("project", sandbox.copy("bundle"), zoo / "m0"),
        ]

    return build


def base_id(text: str) -> Callable[[Sandbox], Sequence[Words]]:
    """Adapters whose config says this of their base."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("adapters")
        for folder in zoo.iterdir():
            path = folder / "adapter_config.json"
            document = {
                **json.loads(path.read_text()),
                "base_model_name_or_path": text,
                "revision": text,
                "task_type": text,
            }
            path.write_text(json.dumps(document))
        return [("inspect", zoo), ("fit", zoo, "-o", "out", "--rank", 1)]

    return build


def collide(*names: str) -> Callable[[Sandbox], Sequence[Words]]:
    """Models whose names are alike once somebody cleans them; all come back as themselves."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.files / "collide"
        for place, name in enumerate(names):
            (zoo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(sandbox.honest("zoo") / f"m{place % 4}", zoo / name)
        return [("evidence", zoo)]

    return build


class Page(HTMLParser):
    """What a browser would run or load of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.hooks: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self._within = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._within = tag == "script"
        self.scripts += [""] * self._within
        for name, value in attributes:
            if name.startswith("on"):
                self.hooks.append(name)
            if name in ("href", "src", "action", "formaction", "xlink:href", "data"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._within:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._within = False


def check_outputs(sandbox: Sandbox) -> None:
    """Look at pages and cards again: the same scripts as of an honest zoo, no handlers, no links elsewhere."""
    zoo = next(path for path in sandbox.files.iterdir() if path.is_dir() and path.name in ("zoo", "adapters"))
    assert sandbox.run("report", zoo, "-o", "out.html").code == 0
    assert sandbox.run("report", sandbox.honest(zoo.name), "-o", "outhonest.html").code == 0
    assert sandbox.run("fit", zoo, "-o", "outcard", "--rank", 1).code == 0
    page, honest = (Page((sandbox.work / name).read_text()) for name in ("out.html", "outhonest.html"))
    assert page.tags <= honest.tags
    assert page.hooks == honest.hooks == []
    assert len(page.scripts) == len(honest.scripts)
    # What is downloaded from a page is in the page: tables and figures as data, which no browser runs.
    data = ("#", "data:text/csv;", "data:application/json;", "data:image/")
    odd = [link for link in page.links if not link.startswith(data) and link not in honest.links]
    assert not odd, odd
    card = (sandbox.work / "outcard" / "README.md").read_text()
    assert all(char.isprintable() or char == "\n" for char in card)
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert sandbox.run("fit", sandbox.honest(zoo.name), "-o", "outhonestcard", "--rank", 1).code == 0
    honest_card = (sandbox.work / "outhonestcard" / "README.md").read_text()
    assert head == honest_card.removeprefix("---\n").partition("---\n")[0]
    assert not re.search(r"<\w|(?<!\\)\]\(|^---", body, re.MULTILINE), body


def check_collisions(sandbox: Sandbox) -> None:
    """Every model has a file of its own, and comes back with its own values."""
    zoo = sandbox.files / "collide"
    assert sandbox.run("fit", zoo, "-o", "outbundle", "--rank", "1.0").code == 0
    manifest = json.loads((sandbox.work / "outbundle" / "manifest.json").read_text())
    files = [model["coefficients"] for model in manifest["models"]]
    assert len(set(files)) == len(files) == sum(1 for _ in zoo.rglob("model.safetensors"))
    for number, model in enumerate(manifest["models"]):
        assert sandbox.run("rebuild", "outbundle", model["name"], "-o", f"out{number}").code == 0
        found = load_file(sandbox.work / f"out{number}" / "model.safetensors")["block.weight"]
        source = (sandbox.work / "outbundle" / model["source"]["path"]).resolve()
        true = load_file(Path(source) / "model.safetensors")["block.weight"]
        assert (found - true).norm() <= 1e-4 * true.norm(), model["name"]


CAFE = "café"
COLLISIONS = {
    "case": ("Model", "model", "MODEL"),
    "composed and decomposed": (unicodedata.normalize("NFC", CAFE), unicodedata.normalize("NFD", CAFE), "cafe"),
    "separators": ("a/b", "a_b", "a%2Fb", "a-b"),
    "dots at the end": ("m", "m.", "m..", "m "),
    "long": ("n" * 240 + "1", "n" * 240 + "2", "n" * 240),
    "reserved": ("CON", "con.txt", "nul", "basis"),
    "with its own encoding": ("a b", "a%20b", "a+b"),
}

ATTACKS = [
    *(Attack(f"model's name: {what}", rename_model(name), EITHER) for what, name in NAMES.items()),
    *(
        Attack(f"tensor's name: {what}", rename_tensor(SCRIPT if what == "HTML" else name), EITHER)
        for what, name in NAMES.items()
        if what != "bytes that are no UTF-8"
    ),
    *(
        Attack(f"base's name: {what}", base_id(NAMES[what]), SAFE)
        for what in ("a clipboard escape", "lines", "front matter")
    ),
    Attack(
        "model's name, the outputs: a closed attribute",
        rename_model(NAMES["a closed attribute"]),
        SAFE,
        after=check_outputs,
    ),
    Attack("model's name, the outputs: front matter", rename_model(NAMES["front matter"]), SAFE, after=check_outputs),
    Attack(
        "model's name, the outputs: a Markdown link", rename_model(NAMES["a Markdown link"]), SAFE, after=check_outputs
    ),
    Attack(
        "tensor's name, the outputs: HTML", rename_tensor(SCRIPT + "</script><script>"), EITHER, after=check_outputs
    ),
    *(
        Attack(f"names that collide: {what}", collide(*names), SAFE, after=check_collisions)
        for what, names in COLLISIONS.items()
    ),
]
