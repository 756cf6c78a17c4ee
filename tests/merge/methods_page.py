"""The table of methods in docs/merge.md, made of their signatures: `python tests/merge/methods_page.py --write`."""

from __future__ import annotations

import sys
from pathlib import Path

from eigenzoo.merge.method import Method
from eigenzoo.merge.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "merge.md"
BEGIN, END = "<!-- methods -->\n", "<!-- /methods -->"
EXACT = {"gram": "inner products", "core": "any frame", "factors": "factors", "elements": "a named space"}


def row(method: Method) -> str:
    options = [
        f"`{name}` {'/'.join(each.choices) + ', ' if each.choices else ''}{each.default}"
        for name, each in method.parameters.items()
    ]
    exact = f"space `{method.space}`" if method.space else EXACT[method.kind]
    cells = (f"`{method.name}`", method.summary.rstrip("."), method.formula, exact, "; ".join(options), method.source)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table() -> str:
    head = "| method | result | formula | exact in | options | source |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(row(method) for method in METHODS.values()) + "\n"


def with_table(text: str) -> str:
    """The page with the table between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
