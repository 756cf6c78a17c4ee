"""docs/formats.md claims nothing without a test: every test that it names exists, and every row names one or is a dash."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_the_page_names_exists():
    assert len(NAMED) > 30
    missing = [f"{file}::{name}" for file, name in NAMED if not (ROOT / file).is_file() or name not in names_in(file)]
    assert not missing
    assert len(NAMED) == PAGE.count("tests/"), "a test is named as `tests/file.py::test_name`"


def test_every_format_names_a_test_or_is_a_dash():
    table = PAGE.split("\n\n")[2].splitlines()[2:]
    assert len(table) > 10
    for row in table:
        kind, *cells = (cell.strip() for cell in row.strip("|").split(" | "))
        assert len(cells) == 4, kind
        assert any("tests/" in cell for cell in cells) or cells == ["–"] * 4, kind
        for cell in cells:
            assert cell == "–" or "tests/" in cell or cell.startswith(("as ", "to the same")), (kind, cell)
