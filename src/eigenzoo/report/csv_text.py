"""Write the whole report, or the numbers of one figure, as one long CSV table. Text cells cannot be read as formulas."""

from __future__ import annotations

import base64
import csv
import gzip
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from eigenzoo.report.document import Report, read_document
from eigenzoo.report.sizes import size_table
from eigenzoo.report.tidy import HEADER, MAKERS, Cell, Row, size_rows

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters for which a spreadsheet reads a cell as a formula."""

LINK_LIMIT = 24_000
"""Largest CSV in characters for a plain download link. Larger ones are compressed and need JavaScript."""


def render_csv(document: Mapping[str, Any]) -> str:
    """Write all numbers of a document as one long table: section, layer, model, series, x, y.

    Numbers have all digits of the document. A text cell that a spreadsheet would read as a formula gets a leading apostrophe.
    """
    return write_csv(all_rows(read_document(document)))


def all_rows(report: Report) -> Iterator[Row]:
    """Yield the rows of the verdict, then those of every section."""
    verdict = report.evidence["verdict"]
    for series in ("code", "decided_by", "text"):
        yield "verdict", "", "", series, "", verdict[series]
    for series, value in (report.evidence["summary"]["test"] or {}).items():
        yield "verdict", "", "", f"test_{series}", "", value
    for control in report.evidence["controls"]:
        yield "controls", "", "", control["name"], "value", control["value"]
        yield "controls", "", "", control["name"], "control_value", control["control_value"]
    for maker in MAKERS.values():
        yield from maker(report, False)
    table = size_table(report)
    if table is not None:
        yield from size_rows(table)


def section_csv(report: Report, section: str) -> str:
    """Write one section at about forty ranks and six digits, like the page."""
    if section == "sizes":
        table = size_table(report)
        rows: Iterable[Row] = () if table is None else size_rows(table)
    else:
        rows = MAKERS[section](report, True)
    return write_csv((*row[:5], _six_digits(row[5])) for row in rows)


def write_csv(rows: Iterable[Row]) -> str:
    """Write the header and all rows with a value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([safe_cell(cell) for cell in row] for row in rows if row[5] is not None)
    return out.getvalue()


def safe_cell(cell: Cell) -> Cell:
    """Prevent a text cell from being read as a formula. Numbers are not changed.

    >>> safe_cell("=1+1"), safe_cell(-1.0), safe_cell("h.0")
    ("'=1+1", -1.0, 'h.0')
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def data_link(text: str) -> str:
    """Make a link that contains the CSV."""
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode()).decode("ascii")


def packed(text: str) -> str:
    """Compress CSV for the page: gzip in base64, with the same bytes for the same text."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode("ascii")


def _six_digits(value: Cell) -> Cell:
    return float(f"{value:.6g}") if isinstance(value, float) else value
