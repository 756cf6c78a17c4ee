"""Render reports: plain JSON values become one self-contained page, tables or figures.

A document is plain JSON values, with these keys:

* `title`: title of the zoo;
* `evidence`: the result of `Evidence.to_dict()`;
* `function`: the result of `evaluate(...).to_dict()`, or None without a metric;
* `sizes`: the bytes of a bundle of any rank, or None: `whole_zoo`, `num_models`, `shared`, `per_model`, and for each of
  `layers` its `fixed`, `per_direction`, `per_pair` and `per_coefficient` bytes;
* `rates`: bytes and kept shares of sides (`rows`), of models cut `alone`, and of the `bundle`, or None;
* `models`: `residual` (None without a bundle), `energy` and `source` of each;
* `made_by`: `command`, `versions`, `date`, `seed`.

Needs the extra `report`; importing this package does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eigenzoo.errors import UsageError
from eigenzoo.errors import require as require_libraries

__all__ = ["check_width", "render_csv", "render_html", "render_markdown", "require", "write_figures"]

LIBRARIES = {"html": ("plotly", "jinja2", "matplotlib"), "png": ("matplotlib",), "svg": ("matplotlib",)}
"""Libraries for each format, besides numpy."""

NARROWEST, WIDEST = 6.0, 100.0
"""Smallest and largest width of a figure in centimetres. A column of a journal has about 8.5, a page 17."""

Document = Mapping[str, Any]


def render_html(document: Document) -> str:
    """Return one HTML page that needs no network: verdict, controls, tables and interactive figures.

    5 MB for a small zoo, most of it plotly.js; below 15 MB for 500 models of 200 layers. The page can be read without JavaScript.
    Every name in the document is shown as text only. The same document gives the same page.

    Raises:
        UsageError: the document holds no evidence, or a library is missing.
    """
    require("html")
    from eigenzoo.report.page import render_html as render

    return render(document)


def render_markdown(document: Document) -> str:
    """Return verdict, controls, all tables and figures' summaries as Markdown, with names escaped.

    Raises:
        UsageError: the document holds no evidence.
    """
    from eigenzoo.report.markdown import render_markdown as render

    return render(document)


def render_csv(document: Document) -> str:
    """Return all numbers as one long table: section, layer, model, series, x, y. docs/report.md describes the columns.

    Numbers have all digits of the document. A text cell that a spreadsheet would read as a formula gets a leading apostrophe.

    Raises:
        UsageError: the document holds no evidence.
    """
    from eigenzoo.report.csv_text import render_csv as render

    return render(document)


def write_figures(
    document: Document,
    folder: str | Path,
    formats: Sequence[str] = ("png", "svg"),
    width: float | None = None,
) -> list[Path]:
    """Write every figure of the page with numbers in the document as files for papers. Return their paths.

    Args:
        width: width of each figure in centimetres, from 6 to 100: 8.5 fits a column of a journal. Default: 11 to 16 cm.

    Raises:
        UsageError: a format that is not png, svg or pdf; a width out of range; the document holds no evidence, or a library
            is missing.
        OutputError: a file of that name exists already.
    """
    require("png")
    if width is not None:
        check_width(width)
    from eigenzoo.report.static_figures import write_figures as write

    return write(document, folder, formats, width)


def check_width(width: float) -> None:
    """Raise UsageError for a width of figures in centimetres that is too small for letters or takes too much memory."""
    if not NARROWEST <= width <= WIDEST:
        raise UsageError(f"a width of {width:g} cm", rule=f"figures are {NARROWEST:g} to {WIDEST:g} cm wide")


def require(format: str) -> None:
    """Raise UsageError if a library for this format is missing, before anything is measured."""
    require_libraries(*LIBRARIES.get(format, ()), where="eigenzoo.report", extra="report")
