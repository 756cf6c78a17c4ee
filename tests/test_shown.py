"""What a session or a notebook shows of public records: short, with the answer, and harmless whatever files are called."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

import eigenzoo as ez
from builders import random_stack, seeded, write_model, write_stacks
from eigenzoo.cli.console import as_json
from eigenzoo.display import html_text, markdown_text, one_line
from eigenzoo.records import UpdateRank, UpdateRanks
from eigenzoo.report.page import json_text

HOSTILE = "<img src=x>\x1b[31m"
"""A part of names that HTML and terminals act on, where it is not escaped."""

ANSWERS = {
    "Zoo": "Zoo(12 models, 2 layers, view='weight')",
    "Evidence": "Evidence(12 models, 2 layers, view='weight'): shared-subspace\nShared subspace",
    "LayerEvidence": "): shared-subspace",
    "Lineage": "Lineage(12 models, cosines of weights): groups of 12 models; 0 duplicates",
    "LayerMoments": "LayerMoments(12 models, 63 values)",
    "Inspection": "Inspection(12 models, 2 layers, view='weight', ",
    "Plan": "choices): no choice keeps a larger share of the models' differences than it takes",
    "Subspace": "Subspace(12 models, 2 layers, view='weight', axes=('models',))",
    "Coefficients": "2 layers, 4 numbers): 0.",
    "RebuiltModel": "2 layers, format='checkpoint', view='weight')",
    "FunctionEvidence": "12 models, not all held out; 12 fitted)\n",
    "Verification": "kind='bundle', ",
}
NAMES = (
    HOSTILE,
    "[click](javascript:alert(1))",
    "![x](https://evil.example/t.png)",
    "[a]: https://evil.example",
    "m\n\n# Taken over",
    "a | b",
    "`rm -rf` *x* _y_ ~~z~~",
    "&lt;script&gt;",
    "www.evil.example <https://evil.example>",
    "WWW.evil.example HTTPS://evil.example",
    "safe\u202egnp.exe",
    "</td></table><script>alert('x')</script>",
    "$x^2$ @someone",
    "\x07\x9b2J",
)
"""What terminals, HTML and Markdown act on where it is not escaped."""

TABLES = {"Evidence", "Inspection", "Plan", "FunctionEvidence", "Verification"}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("shown")
    noise = 0.1 * torch.randn(12, 9, 7, generator=seeded(1), dtype=torch.float64)
    stacks = {f"{HOSTILE}.q": random_stack(12, (9, 7), 0, rank=2) + noise, "k": random_stack(12, (6, 8), 2, rank=2)}
    write_stacks(root / "zoo", stacks)
    write_model(root / "zoo" / f"m{HOSTILE}", {name: stack[0].float() for name, stack in stacks.items()})
    (root / "zoo" / "m0").rename(root / "m0")
    zoo = ez.open_zoo(root / "zoo")
    space = ez.fit(zoo, rank=2)
    name = next(name for name in zoo.names if HOSTILE[:5] in name)
    found = ez.evidence(zoo)
    made = [
        zoo,
        found,
        found.layers[next(iter(zoo.layers))],
        found.lineage,
        space.moments(next(name for name in zoo.layers if HOSTILE[:5] in name)),
        ez.inspect(zoo),
        ez.plan(zoo),
        space,
        space.coefficients(name),
        space.rebuild(name),
        ez.evaluate(space, lambda path: 0.5, zoo),
        ez.load(space.save(root / "bundle")).verify(),
    ]
    return {type(record).__name__: record for record in made}


class Tags(HTMLParser):
    """Tags and text of a piece of HTML."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", ["a@b.com", "mailto:a@b.com", "xmpp:a_b@c_d.org/x", "x@www.a.com", "a@b.c@d.e"])
def test_a_mail_address_in_markdown_is_no_link(name: str) -> None:
    # GitHub's renderer joins what escapes and entities stand for to one text, and looks for addresses in that.
    texts = re.sub(r"\\(.)", r"\1", markdown_text(name)).split("<!-- -->")
    assert "".join(texts) == name
    assert not any(re.search(r"[\w.+-]@[\w-]+\.\w", text) for text in texts)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_hostile_name_is_text_for_each_reader(name: str) -> None:
    shown = one_line(name)
    assert shown.isprintable()
    page = Tags(f"<i>{html_text(name)}</i>")
    assert (page.tags, page.text) == (["i"], shown)
    # Sites make links of these wherever they stand; what renders here does not.
    assert not re.search(r"(?<!\\)://|www\.", markdown_text(name), re.IGNORECASE)
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(f"| {markdown_text(name)} |\n|---|")
    table = Tags(markdown)
    assert table.tags == ["table", "thead", "tr", "th"]
    assert table.text.strip() == shown.strip()
    assert json.loads(as_json({name: name})) == {name: name}
    assert all(char.isprintable() or char == "\n" for char in as_json({name: name}))
    assert json.loads(json_text({name: name})) == {name: name}
    assert Tags(f"<script>{json_text(name)}</script>").tags == ["script"]


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_record_is_shown_in_a_few_lines_with_its_answer(records: dict[str, Any], kind: str) -> None:
    shown = repr(records[kind])
    assert ANSWERS[kind] in shown
    assert len(shown) < 1000
    assert all(char.isprintable() or char == "\n" for char in shown)


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_a_notebook_shows_a_table_without_the_files_own_markup(records: dict[str, Any], kind: str) -> None:
    page = records[kind]._repr_html_()
    tags = Tags(page).tags
    assert set(tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert tags.count("tr") > 2
    assert page.isprintable()


def test_ranks_of_a_rebuilt_adapter_are_shown_in_one_line() -> None:
    ranks = UpdateRanks({f"layer {place}": UpdateRank(4, 8, 2, 1.0, 0.25) for place in range(100)})
    assert repr(ranks) == "UpdateRanks(100 layers, rank=4, whole=8, original=2, loss=0.25)"


def test_a_failed_verification_shows_its_faults(tmp_path: Path) -> None:
    bundle = ez.fit(write_stacks(tmp_path / "zoo", {"w": random_stack(4, (5, 6))}), rank=1).save(tmp_path / "bundle")
    (file,) = bundle.rglob("basis*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    verification = ez.load(bundle).verify()
    first, *faults = repr(verification).splitlines()
    assert first.endswith(f" checks): {len(verification.faults)} faults")
    assert tuple(faults) == verification.faults != ()
