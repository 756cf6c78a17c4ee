"""The card is for people's eyes: what files and folders are called must stay text in it."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import torch
from bundle_files import write_zoo

import eigenzoo as ez
from eigenzoo.formats.bundle.manifest import SourceRecord

HOSTILE = {
    "tag": "<img src=x onerror=alert(1)>",
    "link": "[click](javascript:alert(1))",
    "picture": "![x](https://evil.example/track.png)",
    "reference": "[a]: https://evil.example",
    "newline": "m\n\n# Taken over\n<script>alert(1)</script>",
    "cell": "a | b | c",
    "code": "`rm -rf`",
    "entity": "&lt;script&gt;",
    "escape": "\x1b[31mred\x1b[0m",
    "bidi": "safe\u202egnp.exe",
    "autolink": "<https://evil.example>",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_stay_text(tmp_path: Path, kind: str) -> None:
    name = HOSTILE[kind]
    zoo = ez.open_zoo(write_zoo(tmp_path / "zoo", "flat")).renamed([name, "b", "c", "d", "e"])
    space = ez.fit(zoo, 2)
    source = SourceRecord(path=f"../{name.replace(chr(0), '')}", files={})
    models = [space.manifest.models[0].model_copy(update={"source": source}), *space.manifest.models[1:]]
    space.manifest = space.manifest.model_copy(update={"models": models})
    card = (space.save(tmp_path / "bundle") / "README.md").read_text(encoding="utf-8")

    rows = [line for line in card.splitlines() if line.startswith("| ") and " b |" not in line]
    row = card.splitlines()[card.splitlines().index("| model | source |") + 2]
    assert rows
    assert all(char.isprintable() for char in card.replace("\n", ""))
    assert "<" not in row
    assert not re.search(r"(?<!\\)[\[\]!`#*_]", row), "an unescaped character of Markdown"
    assert len(re.findall(r"(?<!\\)\|", row)) == 3, "the row has more cells than two"
    assert not re.search(r"^# Taken over", card, re.MULTILINE)
    # Nothing but control characters is lost: unescaped again it reads as it was.
    shown = html.unescape(re.sub(r"\\(.)", r"\1", row))
    assert (
        shown.split(" | ")[0].removeprefix("| ")
        == "".join(char if char.isprintable() else "�" for char in name).split(" | ")[0]
    )
    assert ez.load(tmp_path / "bundle").names[0] == name


def test_the_card_says_what_the_report_says(tmp_path: Path) -> None:
    paths = write_zoo(tmp_path / "zoo", "flat", num_models=12)
    torch.manual_seed(0)
    bundle = ez.fit(paths, 2).save(tmp_path / "bundle")
    report, card = ez.load(bundle).report, (bundle / "README.md").read_text()
    assert f"| {report['bytes']['whole_zoo']:,} |" in card
    assert f"| {report['bytes']['whole_bundle']:,} |" in card
    assert f"{report['residual']:.4%} is lost" in card
    assert "held out" in card
    assert "# A shared weight subspace of 12 models" in card
