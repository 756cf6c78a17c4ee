"""CSV: the whole report as one long table, and each figure's part of it. No text cell can be taken for a formula."""

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
"""What makes a spreadsheet read a cell as a formula."""

LINK_LIMIT = 24_000
"""Characters of CSV up to which a figure's download is a plain link; larger ones are packed and need JavaScript."""


def render_csv(document: Mapping[str, Any]) -> str:
    """Write every number of a document as one long table: section, layer, model, series, x, y.

    Numbers are those of the document, in full. A text cell that a spreadsheet would take for a formula gets a leading
    apostrophe.
    """
    return write_csv(all_rows(read_document(document)))


def all_rows(report: Report) -> Iterator[Row]:
    """The verdict, then every section."""
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
    """One section at about forty ranks and six digits, as the page shows it."""
    if section == "sizes":
        table = size_table(report)
        rows: Iterable[Row] = () if table is None else size_rows(table)
    else:
        rows = MAKERS[section](report, True)
    return write_csv((*row[:5], _six_digits(row[5])) for row in rows)


def write_csv(rows: Iterable[Row]) -> str:
    """Write rows that have a value below the header."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([safe_cell(cell) for cell in row] for row in rows if row[5] is not None)
    return out.getvalue()


def safe_cell(cell: Cell) -> Cell:
    """Guard a text cell against being read as a formula; numbers stay as they are.

    >>> safe_cell("=1+1"), safe_cell(-1.0), safe_cell("h.0")
    ("'=1+1", -1.0, 'h.0')
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def data_link(text: str) -> str:
    """Make a link that holds the CSV itself."""
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode()).decode("ascii")


def packed(text: str) -> str:
    """Pack CSV for the page: gzip in base64, the same bytes for the same text."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode("ascii")


def _six_digits(value: Cell) -> Cell:
    return float(f"{value:.6g}") if isinstance(value, float) else value
