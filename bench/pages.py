"""Tables as Markdown, and putting them between their marks on a page."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table's lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def with_tables(page: str, tables: Mapping[str, Sequence[str]], path: Path) -> str:
    """Put each table between its marks, `<!-- name -->` and `<!-- end of name -->`; `path` is only what an error names."""
    for name, lines in tables.items():
        before, opening, rest = page.partition(f"<!-- {name} -->")
        _, closing, after = rest.partition(f"<!-- end of {name} -->")
        if not opening or not closing:
            sys.exit(f"{path}: no marks for the table {name!r}: <!-- {name} --> … <!-- end of {name} -->")
        page = "\n".join([before + opening, *lines, closing + after])
    return page
